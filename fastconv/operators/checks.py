"""The argument checks of the public functions, and those of csrc/common/checks.cpp once more.

The former see to it that what goes to the dispatcher has the types of its schema. The latter are for tensors without
data and for the reference; the words are the same in both places: tests/ops/test_errors.py runs one table of bad
arguments against them all.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
ACTIVATIONS = ("none", "relu", "relu6")
# The most of anything that a size is computed from, other than a batch; the C++ checks say why.
_MOST = 2**31 - 1
# What to pass instead
DENSE = "pass groups=1 for a dense convolution"
CHANNELS = "pass the number of channels to sum over"
# Of the separable op's two convolutions: what weight, bias, and residual (or gradient) are called there.
OF_DEPTHWISE = ("depthwise_weight", "depthwise_bias", "")
OF_POINTWISE = ("pointwise_weight", "pointwise_bias", "grad_output")
# In a message: entries of a list, characters of one of them, characters of a text
_SHOWN, _ENTRY, _TEXT = 8, 20, 40


def fail(op: str, got: object, needed: object, remedy: str) -> NoReturn:
    raise RuntimeError(f"fastconv::{op}: got {got}, needed {needed}; {remedy}")


def _list(values: Sequence[object]) -> str:
    entries = [_literal(value, _ENTRY) or _type(value, _ENTRY) for value in values[:_SHOWN]]
    return f"[{', '.join(entries + ['...'] * (len(values) > _SHOWN))}]"


def _literal(value: object, room: int = _TEXT) -> str | None:
    """A number, a text or None, in no more characters than a message has room for."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value if len(value) <= room else value[:room] + "...")
    return repr(value) if value is None or isinstance(value, (int, float, torch.SymInt)) else None


def _type(value: object, room: int = _TEXT) -> str:
    return "Tensor" if isinstance(value, Tensor) else type(value).__name__[:room]


def given(name: str, value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"{name} {_list(value)}"
    return f"{name} {_literal(value) or 'of type ' + _type(value)}"


def _shape(tensor: Tensor) -> str:
    return _list(tensor.shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ------------------------------------------------------------------------- what a caller may hand in


def tensors(op: str, /, **given: Any) -> None:
    """Each is a dense tensor of a dtype that the ops take."""
    for name, value in given.items():
        if not _is_usable(value):
            _refuse(op, name, value)


def optional_tensors(op: str, /, **given: Any) -> None:
    """The same for arguments that may be None."""
    for name, value in given.items():
        if value is not None and not _is_usable(value):
            _refuse(op, name, value)


def tensor_list(op: str, name: str, values: Any, *, optional: bool = False) -> list[Any]:
    """The same for the entries of a list, which is returned as one; they may be None if they are `optional`."""
    if not isinstance(values, (Sequence, torch.nn.ParameterList)) or isinstance(values, (str, bytes)):
        fail(op, given(name, values), "a list of tensors", f"pass {name} as a list, with one entry for each branch")
    found = list(values)
    for i, value in enumerate(found):
        if not (_is_usable(value) or (optional and value is None)):
            _refuse(op, f"{name}[{i}]", value)
    return found


def _is_usable(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.dtype in FLOATING and value.layout is torch.strided and not value.is_nested
    )


def _refuse(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        fail(op, given(name, value), "a tensor", "pass a torch.Tensor")
    if value.is_nested:
        fail(op, f"{name} that is nested", "a dense tensor", "call the op for each of its tensors")
    if value.layout is not torch.strided:
        fail(op, f"{name} of layout {value.layout}", "a dense tensor", f"convert it with {name}.to_dense()")
    floating_dtype(op, name, value)


def floating_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        fail(
            op,
            f"{name} of dtype {_dtype(tensor)}",
            "float32, float64, bfloat16 or float16",
            f"convert it with {name}.{'dequantize' if tensor.is_quantized else 'float'}()",
        )


def summands(op: str, input: Any, other: Any) -> None:
    """Two tensors whose sum has a dtype that the ops take: one of them may hold integers."""
    for name, value, beside in (("input", input, other), ("other", other, input)):
        if not _is_usable(value) and not (_is_usable(beside) and _holds_integers(value)):
            _refuse(op, name, value)


def _holds_integers(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.dtype in INTEGERS and value.layout is torch.strided and not value.is_nested
    )


def is_activation(name: Any) -> bool:
    return isinstance(name, str) and name in ACTIVATIONS


def padded(op: str, input: Tensor, borders: Sequence[int], mode: str) -> None:
    """The input can be padded with these borders (left, right, top, bottom) made of its own pixels."""
    if input.dim() not in (3, 4):
        fail(op, f"input of shape {_shape(input)}", "[N, C, H, W] or [C, H, W]", "reshape it")
    sizes = zip((input.shape[-1], input.shape[-2]), (max(borders[:2]), max(borders[2:])), strict=True)
    if input.shape[-3] == 0 or any(border > _most_padding(size, mode) for size, border in sizes):
        fail(
            op,
            f"padding {_list(borders[::-2])} with padding_mode '{mode}' for input of shape {_shape(input)}",
            "pixels enough to fill it",
            "pass a larger input or less padding",
        )
    storage(op, "input", input)


def _most_padding(size: int, mode: str) -> int:
    if mode == "replicate" and size > 0:
        return _MOST
    return size - 1 if mode == "reflect" else size


def pair(op: str, name: str, value: Any, least: int) -> list[int]:
    """An int or a pair as the dispatcher's list."""
    if type(value) is int and least <= value <= _MOST:
        return [value, value]
    entries = list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value, value]
    values = [_integer(entry) for entry in entries]
    if any(entry is None for entry in values):
        fail(op, given(name, value), "two integers (height, width)", "pass an int or a pair")
    _pair(op, name, values, least)
    return values


def count(op: str, name: str, value: Any, remedy: str) -> int:
    """An int from 1 on."""
    if type(value) is int and 1 <= value <= _MOST:
        return value
    number = _integer(value)
    if number is None:
        fail(op, given(name, value), "an integer", remedy)
    _count(op, name, number, remedy)
    return number


def real(op: str, name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    fail(op, given(name, value), "a number", "pass a float")


def _integer(value: Any) -> Any:
    """As an int; None for what is none, such as a bool or a tensor."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        return None
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


# -------------------------------------------------------------------- as in csrc/common/checks.cpp


def activation(op: str, name: Any) -> None:
    if not is_activation(name):
        fail(
            op,
            given("activation", name),
            "'none', 'relu' or 'relu6'",
            "apply other activations after the op",
        )


def floating(op: str, input: Tensor) -> None:
    floating_dtype(op, "input", input)
    storage(op, "input", input)


def storage(op: str, name: str, tensor: Tensor) -> None:
    """All elements lie within the memory: it can be freed or shrunk behind a tensor's back."""
    if torch.compiler.is_compiling() or not _has_memory(tensor):
        return
    span = tensor.numel()
    if not tensor.is_contiguous():
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + span) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if needed > held:
        fail(
            op,
            f"{name} of shape {_shape(tensor)} with {held} bytes of storage",
            needed,
            "restore the storage before the call",
        )


def like_input(op: str, input: Tensor, name: str, other: Tensor) -> None:
    if other.device != input.device:
        fail(
            op,
            f"{name} on {other.device} beside input on {input.device}",
            "one device",
            f"move it with {name}.to(input.device)",
        )
    if other.dtype != input.dtype:
        fail(
            op,
            f"{name} of dtype {_dtype(other)} beside input of dtype {_dtype(input)}",
            "one dtype",
            f"convert it with {name}.to(input.dtype)",
        )
    storage(op, name, other)


def same_shape(op: str, input: Tensor, name: str, other: Tensor) -> None:
    if other.shape != input.shape:
        fail(
            op,
            f"{name} of shape {_shape(other)} beside input of shape {_shape(input)}",
            "one shape",
            "expand it first",
        )


def _pair(op: str, name: str, values: Sequence[int], least: int) -> None:
    if len(values) != 2:
        fail(
            op,
            f"{name} {_list(values)}",
            "two integers (height, width)",
            "pass an int or a pair",
        )
    if values[0] < least or values[1] < least:
        fail(
            op,
            f"{name} {_list(values)}",
            f"at least {least} in both directions",
            f"pass a larger {name}",
        )
    if _is_more(values[0]) or _is_more(values[1]):
        fail(op, f"{name} {_list(values)}", f"at most {_MOST} in both directions", f"pass a smaller {name}")


def _count(op: str, name: str, value: int, remedy: str) -> None:
    if value < 1:
        fail(op, f"{name} {_literal(value)}", "at least 1", remedy)
    if _is_more(value):
        fail(op, f"{name} {_literal(value)}", f"at most {_MOST}", f"pass a smaller {name}")


def _is_more(value: int, most: int = _MOST) -> bool:
    """Whether a number is known to exceed what it may be; a symbolic one is not asked, which would restrict it."""
    return type(value) is int and not torch.compiler.is_compiling() and value > most


def image(op: str, name: str, tensor: Tensor, axes: str) -> None:
    if tensor.dim() != 4:
        fail(op, f"{name} of shape {_shape(tensor)}", f"4 dimensions {axes}", "reshape it")
    for axis in (1, 2, 3):
        if _is_more(tensor.shape[axis]):
            fail(op, f"{name} of shape {_shape(tensor)}", f"at most {_MOST} in dimension {axis}", "split it")


def images(op: str, input: Tensor, weight: Tensor, weight_name: str = "weight") -> None:
    image(op, "input", input, "(N, C, H, W)")
    image(op, weight_name, weight, "(K, C / groups, R, S)")


def _result(op: str, shape: Sequence[int], like: Tensor) -> None:
    """A tensor of this shape can exist."""
    size = like.element_size()
    for extent in shape:  # math.prod stops torch.compile where an extent is dynamic
        size = size * extent
    if 0 not in shape and _is_more(size, 2**63 - 1):
        fail(
            op,
            f"arguments for a result of shape {_list(shape)}",
            f"one of at most {2**63 - 1} bytes",
            "pass smaller ones",
        )


def conv2d(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    names: tuple[str, str, str] = ("weight", "bias", "residual"),
) -> list[int]:
    """Returns the shape of the convolution's output. `names` are those of weight, bias and residual in the op."""
    weight_name, bias_name, residual_name = names
    images(op, input, weight, weight_name)
    floating(op, input)
    like_input(op, input, weight_name, weight)
    _pair(op, "stride", stride, 1)
    _pair(op, "padding", padding, 0)
    _pair(op, "dilation", dilation, 1)
    _count(op, "groups", groups, DENSE)
    batch, channels, *pixels = input.shape
    out_channels, group_channels, *kernel = weight.shape
    if min(weight.shape) < 1:
        fail(
            op,
            f"{weight_name} of shape {_shape(weight)}",
            "at least one filter element",
            f"pass a non-empty {weight_name}",
        )
    if out_channels % groups:
        fail(
            op,
            f"{out_channels} output channels in {weight_name} of shape {_shape(weight)}",
            f"a multiple of groups {groups}",
            f"change {weight_name} or groups",
        )
    if channels != group_channels * groups:
        fail(
            op,
            f"{channels} channels in input of shape {_shape(input)}",
            f"{group_channels * groups} ({weight_name}.shape[1] {group_channels} x groups {groups})",
            f"change input, {weight_name} or groups",
        )
    output_shape = [batch, out_channels]
    for axis, name in enumerate(("height", "width")):
        padded = pixels[axis] + 2 * padding[axis]
        if _is_more(padded):
            fail(op, f"a padded {name} of {padded}", f"at most {_MOST}", "pass a smaller padding")
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        if extent > padded:
            fail(
                op,
                f"a filter that spans {extent} pixels over a padded {name} of {padded}",
                "at most that",
                "add padding or shrink the filter",
            )
        output_shape.append((padded - extent) // stride[axis] + 1)
    _result(op, output_shape, input)
    if bias is not None:
        like_input(op, input, bias_name, bias)
        if tuple(bias.shape) != (out_channels,):
            fail(
                op,
                f"{bias_name} of shape {_shape(bias)}",
                f"[{out_channels}], one value for each output channel",
                "reshape it",
            )
    if residual is not None:
        like_input(op, input, residual_name, residual)
        if list(residual.shape) != output_shape:
            fail(
                op,
                f"{residual_name} of shape {_shape(residual)}",
                f"{_list(output_shape)}, the shape of the convolution's output",
                "expand it first",
            )
    return output_shape


def pointwise_weight(op: str, name: str, weight: Tensor) -> None:
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (1, 1):
        fail(
            op,
            f"{name} of shape {_shape(weight)}",
            "[K, C, 1, 1]",
            "use conv2d_relu for larger filters",
        )


def depthwise_weight(op: str, name: str, input: Tensor, weight: Tensor) -> int:
    """Returns the number of groups, which is the input's number of channels."""
    image(op, "input", input, "(N, C, H, W)")
    channels = input.shape[1]
    if weight.dim() != 4 or weight.shape[1] != 1 or channels == 0 or weight.shape[0] % channels:
        fail(
            op,
            f"{name} of shape {_shape(weight)}",
            f"[{channels} * multiplier, 1, R, S] for input of shape {_shape(input)}",
            "use conv2d_relu for other groups",
        )
    return channels


def of_branch(i: int) -> tuple[str, str, str]:
    """What weight, bias and gradient of a group's branch are called."""
    return f"weights[{i}]", f"biases[{i}]", f"grad_outputs[{i}]"


def group(op: str, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    if not weights or len(biases) not in (0, len(weights)):
        fail(
            op,
            f"{len(weights)} weights and {len(biases)} biases",
            "at least one weight and as many biases",
            "use None for no bias",
        )


def destination(
    op: str, name: str, out: Tensor, shape: Sequence[int], like: Tensor, others: Iterable[Tensor | None]
) -> None:
    """A result of this shape, in the dtype and on the device of `like`, can go into `out`, which overlaps neither
    itself nor the others.

    Of tensors without memory of their own, as while torch.compile traces, only the former is known.
    """
    if (list(out.shape), out.dtype, out.device) != (list(shape), like.dtype, like.device):
        fail(
            op,
            f"{name} of shape {_shape(out)}, {_dtype(out)} on {out.device}",
            f"{_list(shape)}, {_dtype(like)} on {like.device}, as the result is",
            "allocate it so, it is not resized",
        )
    storage(op, name, out)
    if _overlaps_itself(out):
        fail(
            op,
            f"{name} of shape {_shape(out)} with strides {_list(out.stride())}",
            "memory for every element",
            "pass a tensor whose elements do not overlap",
        )
    if any(other is not None and _overlap(out, other) for other in others):
        fail(
            op,
            f"{name} that overlaps the memory of another argument",
            "memory of its own",
            "pass another tensor, or a slice that nothing else uses",
        )


def destinations(
    op: str, out: Sequence[Tensor], shapes: Sequence[Sequence[int]], like: Tensor, others: Iterable[Tensor | None]
) -> None:
    if len(out) != len(shapes):
        fail(op, f"{len(out)} tensors in out", f"{len(shapes)}, one for each weight", "pass as many")
    taken = list(others)
    for i, (tensor, shape) in enumerate(zip(out, shapes, strict=True)):
        destination(op, f"out[{i}]", tensor, shape, like, taken)
        taken.append(tensor)


def _has_memory(tensor: Tensor) -> bool:
    if isinstance(tensor, (FakeTensor, FunctionalTensor)) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type in ("cpu", "cuda") and tensor.numel() > 0


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory; taken for granted where the strides interleave too wildly to tell."""
    extents = list(zip(tensor.stride(), tensor.shape, strict=True))
    if torch.compiler.is_compiling() or not all(type(number) is int for extent in extents for number in extent):
        return any(size > 1 and stride == 0 for stride, size in extents)
    if 0 in tensor.shape:
        return False
    steps: list[tuple[int, tuple[int, int]]] = []  # the longest first
    reach = 0
    for stride, size in sorted(extents):
        if size == 1:
            continue
        if stride == 0 or any(stride == shorter for shorter, _ in steps):
            return True
        # In a tensor that was allocated, sliced or permuted a step is longer than all the shorter ones together.
        if stride <= reach:
            work = [1000]
            # at least one step of this dimension, none of a longer one, back to where it began
            if _add_up(0, [(stride, (1, size - 1)), *steps], work) or work[0] < 0:
                return True
        steps.insert(0, (stride, (1 - size, size - 1)))
        reach += stride * (size - 1)
    return False


def _overlap(one: Tensor, two: Tensor) -> bool:
    if torch.compiler.is_compiling() or not (_has_memory(one) and _has_memory(two)):
        return False
    # the distance that one step covers, and the fewest and the most steps from a byte of one to a byte of the other
    steps: dict[int, tuple[int, int]] = {}

    def add(length: int, least: int, most: int) -> None:
        low, high = steps.get(length, (0, 0))
        steps[length] = (low + least, high + most)

    size = one.element_size()
    for extent, stride in zip(one.shape, one.stride(), strict=True):
        add(stride * size, 0, extent - 1)
    for extent, stride in zip(two.shape, two.stride(), strict=True):
        add(stride * size, 1 - extent, 0)
    add(1, 1 - size, size - 1)
    steps.pop(0, None)
    return _add_up(two.data_ptr() - one.data_ptr(), sorted(steps.items(), reverse=True), [1000])


def _add_up(distance: int, steps: list[tuple[int, tuple[int, int]]], work: list[int]) -> bool:
    """Whether the steps, the longest first, add up to this distance.

    What the shorter ones can reach leaves few counts of the longest to try, in slices of one tensor at most three;
    gives up, hence no, when `work` tries are spent and it is then negative.
    """
    if not steps:
        return distance == 0
    (length, (least, most)), *shorter = steps
    low = sum(step * fewest for step, (fewest, _) in shorter)
    high = sum(step * highest for step, (_, highest) in shorter)
    for count in range(max(least, -((high - distance) // length)), min(most, (distance - low) // length) + 1):
        work[0] -= 1
        if work[0] < 0:
            return False
        if _add_up(distance - count * length, shorter, work):
            return True
    return False


def writable(op: str, out: Tensor) -> None:
    """torch's own rule for what is written in place."""
    if out.is_inference() and not torch.is_inference_mode_enabled():
        fail(
            op,
            "out that was made in inference mode",
            "a tensor from outside of it",
            "clone it, or call the op within torch.inference_mode()",
        )


def no_gradient(op: str, needed: bool) -> None:
    if needed:
        fail(
            op,
            "out beside an argument that requires grad",
            "no such argument while gradients are recorded",
            "call it without out, or within torch.no_grad()",
        )


def local_response_norm(op: str, input: Tensor, size: int, kind: str) -> None:
    if input.dim() < 3:
        fail(
            op,
            f"input of shape {_shape(input)}",
            "at least 3 dimensions (N, C, ...)",
            "reshape it",
        )
    floating(op, input)
    _count(op, "size", size, CHANNELS)
    activation(op, kind)

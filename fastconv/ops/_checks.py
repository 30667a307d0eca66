"""The argument checks of csrc/common/checks.cpp, for tensors without data and for the reference.

The words are the same in both places: tests/test_errors.py runs one table of bad arguments against
them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "relu6")


def fail(op: str, got: object, needed: object, remedy: str) -> None:
    raise RuntimeError(f"fastconv::{op}: got {got}, needed {needed}; {remedy}")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def activation(op: str, name: str) -> None:
    if name not in ACTIVATIONS:
        fail(
            op,
            f"activation '{name}'",
            "'none', 'relu' or 'relu6'",
            "apply other activations after the op",
        )


def floating(op: str, input: Tensor) -> None:
    if input.dtype not in FLOATING:
        fail(
            op,
            f"input of dtype {_dtype(input)}",
            "float32, float64, bfloat16 or float16",
            "convert it with input.float()",
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
            f"{name} {list(values)}",
            "two integers (height, width)",
            "pass an int or a pair",
        )
    if values[0] < least or values[1] < least:
        fail(
            op,
            f"{name} {list(values)}",
            f"at least {least} in both directions",
            f"pass a larger {name}",
        )


def _four_dimensions(op: str, name: str, tensor: Tensor, axes: str) -> None:
    if tensor.dim() != 4:
        fail(op, f"{name} of shape {_shape(tensor)}", f"4 dimensions {axes}", "reshape it")


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
    residual_name: str = "residual",
) -> list[int]:
    """Returns the shape of the convolution's output."""
    _four_dimensions(op, "input", input, "(N, C, H, W)")
    _four_dimensions(op, "weight", weight, "(K, C / groups, R, S)")
    floating(op, input)
    like_input(op, input, "weight", weight)
    _pair(op, "stride", stride, 1)
    _pair(op, "padding", padding, 0)
    _pair(op, "dilation", dilation, 1)
    if groups < 1:
        fail(op, f"groups {groups}", "at least 1", "pass groups=1 for a dense convolution")
    batch, channels, *pixels = input.shape
    out_channels, group_channels, *kernel = weight.shape
    if min(weight.shape) < 1:
        fail(
            op,
            f"weight of shape {_shape(weight)}",
            "at least one filter element",
            "pass a non-empty weight",
        )
    if out_channels % groups:
        fail(
            op,
            f"{out_channels} output channels in weight of shape {_shape(weight)}",
            f"a multiple of groups {groups}",
            "change weight or groups",
        )
    if channels != group_channels * groups:
        fail(
            op,
            f"{channels} channels in input of shape {_shape(input)}",
            f"{group_channels * groups} (weight.shape[1] {group_channels} x groups {groups})",
            "change input, weight or groups",
        )
    output_shape = [batch, out_channels]
    for axis, name in enumerate(("height", "width")):
        padded = pixels[axis] + 2 * padding[axis]
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        if extent > padded:
            fail(
                op,
                f"a filter that spans {extent} pixels over a padded {name} of {padded}",
                "at most that",
                "add padding or shrink the filter",
            )
        output_shape.append((padded - extent) // stride[axis] + 1)
    if bias is not None:
        like_input(op, input, "bias", bias)
        if tuple(bias.shape) != (out_channels,):
            fail(
                op,
                f"bias of shape {_shape(bias)}",
                f"[{out_channels}], one value for each output channel",
                "reshape it",
            )
    if residual is not None:
        like_input(op, input, residual_name, residual)
        if list(residual.shape) != output_shape:
            fail(
                op,
                f"{residual_name} of shape {_shape(residual)}",
                f"{output_shape}, the shape of the convolution's output",
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
    _four_dimensions(op, "input", input, "(N, C, H, W)")
    channels = input.shape[1]
    if weight.dim() != 4 or weight.shape[1] != 1 or channels == 0 or weight.shape[0] % channels:
        fail(
            op,
            f"{name} of shape {_shape(weight)}",
            f"[{channels} * multiplier, 1, R, S] for input of shape {_shape(input)}",
            "use conv2d_relu for other groups",
        )
    return channels


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
            f"{list(shape)}, {_dtype(like)} on {like.device}, as the result is",
            "allocate it so, it is not resized",
        )
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        fail(
            op,
            f"{name} of shape {_shape(out)} with strides {list(out.stride())}",
            "memory for every element",
            "pass a tensor that is not expanded",
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
    wrapped = isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not (wrapped or tensor.is_meta or tensor.numel() == 0)


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
    gives up, hence no, when `work` tries are spent.
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
    if size < 1:
        fail(op, f"size {size}", "at least 1", "pass the number of channels to sum over")
    activation(op, kind)

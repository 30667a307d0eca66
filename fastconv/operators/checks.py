"""What every backend checks of an operator's arguments, as csrc/common/checks.cpp does for the C++ kernels.

For tensors without data, for the reference and for the Triton kernels; the words are the same in both places:
tests/ops/test_errors.py runs one table of bad arguments against them all. Where results go (``out``) is in
`fastconv.operators.destinations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import activations
from .convolution import POINTWISE, FusedConvolution, output_shape
from .messages import dtype_of, fail, given, listed, literal, shape_of

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The most of anything that a size is computed from, other than a batch; the C++ checks say why.
MOST = 2**31 - 1
# What to pass instead
DENSE = "pass groups=1 for a dense convolution"
CHANNELS = "pass the number of channels to sum over"


class Names(NamedTuple):
    """What a convolution's tensors are called in its operator; in a backward the residual is the output's gradient."""

    weight: str = "weight"
    bias: str = "bias"
    residual: str = "residual"


OWN_NAMES = Names()


def activation(op: str, name: Any) -> None:
    if not activations.is_activation(name):
        fail(
            op,
            given("activation", name),
            "'none', 'relu' or 'relu6'",
            "apply other activations after the op",
        )


def floating_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        fail(
            op,
            f"{name} of dtype {dtype_of(tensor)}",
            "float32, float64, bfloat16 or float16",
            f"convert it with {name}.{'dequantize' if tensor.is_quantized else 'float'}()",
        )


def floating(op: str, input: Tensor) -> None:
    floating_dtype(op, "input", input)
    storage(op, "input", input)


def storage(op: str, name: str, tensor: Tensor) -> None:
    """All elements lie within the memory: it can be freed or shrunk behind a tensor's back."""
    if torch.compiler.is_compiling() or not has_memory(tensor):
        return
    span = tensor.numel()
    in_channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if not tensor.is_contiguous() and not in_channels_last:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + span) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if needed > held:
        fail(
            op,
            f"{name} of shape {shape_of(tensor)} with {held} bytes of storage",
            needed,
            "restore the storage before the call",
        )


def has_memory(tensor: Tensor) -> bool:
    if isinstance(tensor, (FakeTensor, FunctionalTensor)) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type in ("cpu", "cuda") and tensor.numel() > 0


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
            f"{name} of dtype {dtype_of(other)} beside input of dtype {dtype_of(input)}",
            "one dtype",
            f"convert it with {name}.to(input.dtype)",
        )
    storage(op, name, other)


def same_shape(op: str, input: Tensor, name: str, other: Tensor) -> None:
    if other.shape != input.shape:
        fail(
            op,
            f"{name} of shape {shape_of(other)} beside input of shape {shape_of(input)}",
            "one shape",
            "expand it first",
        )


def pair(op: str, name: str, values: Sequence[int], least: int) -> None:
    if len(values) != 2:
        fail(
            op,
            f"{name} {listed(values)}",
            "two integers (height, width)",
            "pass an int or a pair",
        )
    if values[0] < least or values[1] < least:
        fail(
            op,
            f"{name} {listed(values)}",
            f"at least {least} in both directions",
            f"pass a larger {name}",
        )
    if _is_more(values[0]) or _is_more(values[1]):
        fail(op, f"{name} {listed(values)}", f"at most {MOST} in both directions", f"pass a smaller {name}")


def count(op: str, name: str, value: int, remedy: str) -> None:
    if value < 1:
        fail(op, f"{name} {literal(value)}", "at least 1", remedy)
    if _is_more(value):
        fail(op, f"{name} {literal(value)}", f"at most {MOST}", f"pass a smaller {name}")


def _is_more(value: int, most: int = MOST) -> bool:
    """Whether a number is known to exceed what it may be; a symbolic one is not asked, which would restrict it."""
    return type(value) is int and not torch.compiler.is_compiling() and value > most


def image(op: str, name: str, tensor: Tensor, axes: str) -> None:
    if tensor.dim() != 4:
        fail(op, f"{name} of shape {shape_of(tensor)}", f"4 dimensions {axes}", "reshape it")
    for axis in (1, 2, 3):
        if _is_more(tensor.shape[axis]):
            fail(op, f"{name} of shape {shape_of(tensor)}", f"at most {MOST} in dimension {axis}", "split it")


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
            f"arguments for a result of shape {listed(shape)}",
            f"one of at most {2**63 - 1} bytes",
            "pass smaller ones",
        )


def conv2d(op: str, conv: FusedConvolution, names: Names = OWN_NAMES) -> list[int]:
    """Returns the shape of the convolution's output."""
    input, weight, bias, residual, geometry, kind = conv
    images(op, input, weight, names.weight)
    floating(op, input)
    like_input(op, input, names.weight, weight)
    pair(op, "stride", geometry.stride, 1)
    pair(op, "padding", geometry.padding, 0)
    pair(op, "dilation", geometry.dilation, 1)
    count(op, "groups", geometry.groups, DENSE)
    _filters(op, input, weight, geometry.groups, names.weight)
    for axis, name in ((2, "height"), (3, "width")):
        padded = input.shape[axis] + 2 * geometry.padding[axis - 2]
        if _is_more(padded):
            fail(op, f"a padded {name} of {padded}", f"at most {MOST}", "pass a smaller padding")
        extent = geometry.dilation[axis - 2] * (weight.shape[axis] - 1) + 1
        if extent > padded:
            fail(
                op,
                f"a filter that spans {extent} pixels over a padded {name} of {padded}",
                "at most that",
                "add padding or shrink the filter",
            )
    shape = output_shape(input.shape, weight.shape, geometry)
    _result(op, shape, input)
    activation(op, kind)
    if bias is not None:
        like_input(op, input, names.bias, bias)
        if tuple(bias.shape) != (weight.shape[0],):
            fail(
                op,
                f"{names.bias} of shape {shape_of(bias)}",
                f"[{weight.shape[0]}], one value for each output channel",
                "reshape it",
            )
    if residual is not None:
        like_input(op, input, names.residual, residual)
        if list(residual.shape) != shape:
            fail(
                op,
                f"{names.residual} of shape {shape_of(residual)}",
                f"{listed(shape)}, the shape of the convolution's output",
                "expand it first",
            )
    return shape


def _filters(op: str, input: Tensor, weight: Tensor, groups: int, name: str) -> None:
    """The weight has filters for the input's channels."""
    out_channels, group_channels = weight.shape[:2]
    if min(weight.shape) < 1:
        fail(
            op,
            f"{name} of shape {shape_of(weight)}",
            "at least one filter element",
            f"pass a non-empty {name}",
        )
    if out_channels % groups:
        fail(
            op,
            f"{out_channels} output channels in {name} of shape {shape_of(weight)}",
            f"a multiple of groups {groups}",
            f"change {name} or groups",
        )
    if input.shape[1] != group_channels * groups:
        fail(
            op,
            f"{input.shape[1]} channels in input of shape {shape_of(input)}",
            f"{group_channels * groups} ({name}.shape[1] {group_channels} x groups {groups})",
            f"change input, {name} or groups",
        )


def pointwise_weight(op: str, name: str, weight: Tensor) -> None:
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (1, 1):
        fail(
            op,
            f"{name} of shape {shape_of(weight)}",
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
            f"{name} of shape {shape_of(weight)}",
            f"[{channels} * multiplier, 1, R, S] for input of shape {shape_of(input)}",
            "use conv2d_relu for other groups",
        )
    return channels


def mask_source(op: str, grad_output: Tensor, output: Tensor | None, activation: str) -> None:
    """In a backward: the forward's output is there where the activation's mask is read from it."""
    if activation == "none":
        return
    if output is None:
        fail(op, "no output", "it for the activation's mask", "pass the forward's output")
    like_input(op, grad_output, "output", output)
    same_shape(op, grad_output, "output", output)


def group(op: str, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    if not weights or len(biases) not in (0, len(weights)):
        fail(
            op,
            f"{len(weights)} weights and {len(biases)} biases",
            "at least one weight and as many biases",
            "use None for no bias",
        )


def pointwise_group(
    op: str, input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], kind: str
) -> list[list[int]]:
    """Returns the shape of each branch's result."""
    group(op, weights, biases)
    activation(op, kind)
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    return [_branch(op, i, input, *tensors, None) for i, tensors in enumerate(zip(weights, given, strict=True))]


def pointwise_group_backward(
    op: str,
    grad_outputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    input: Tensor,
    weights: Sequence[Tensor],
    kind: str,
) -> None:
    activation(op, kind)
    needed = 0 if kind == "none" else len(weights)
    if not weights or len(grad_outputs) != len(weights) or len(outputs) != needed:
        fail(
            op,
            f"{len(weights)} weights, {len(grad_outputs)} gradients and {len(outputs)} outputs",
            "as many of each, and no outputs without an activation",
            "pass what the forward had",
        )
    for i, (weight, grad) in enumerate(zip(weights, grad_outputs, strict=True)):
        _branch(op, i, input, weight, None, grad)
        if outputs:
            like_input(op, input, f"outputs[{i}]", outputs[i])
            same_shape(op, grad, f"outputs[{i}]", outputs[i])


def _branch(op: str, i: int, input: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None) -> list[int]:
    names = Names(f"weights[{i}]", f"biases[{i}]", f"grad_outputs[{i}]")
    pointwise_weight(op, names.weight, weight)
    return conv2d(op, FusedConvolution(input, weight, bias, grad, POINTWISE, "none"), names)


def elementwise(op: str, input: Tensor, name: str, other: Tensor, kind: str) -> None:
    """Two tensors of one shape, and an activation."""
    activation(op, kind)
    floating(op, input)
    like_input(op, input, name, other)
    same_shape(op, input, name, other)


def local_response_norm(op: str, input: Tensor, size: int, kind: str, grad_output: Tensor | None = None) -> None:
    if input.dim() < 3:
        fail(
            op,
            f"input of shape {shape_of(input)}",
            "at least 3 dimensions (N, C, ...)",
            "reshape it",
        )
    floating(op, input)
    count(op, "size", size, CHANNELS)
    activation(op, kind)
    if grad_output is not None:
        like_input(op, input, "grad_output", grad_output)
        same_shape(op, input, "grad_output", grad_output)

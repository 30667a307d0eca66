"""What the convolution ops share: reading arguments, activations, gradients and second gradients.

Letters: N batch, C input channels, H W input pixels, K output channels, R S filter, P Q output
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for

from . import checks
from .registration import AutocastRule, Operator, autocast_to_low_precision, cast

aten = torch.ops.aten

_LONG = 1024  # a stride that no image has

Size2 = int | Sequence[int]
Padding = int | Sequence[int] | str


# ---------------------------------------------------------------------------------------- arguments


def batch(op: str, input: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """An unbatched [C, H, W] as a batch of one, and what takes the batch off the result."""
    if input.dim() == 3:
        checks.storage(op, "input", input)
        return input.unsqueeze(0), _first
    return input, as_it_is


def batch_like(op: str, unbatch: Callable[[Tensor], Tensor], name: str, tensor: Tensor | None) -> Tensor | None:
    """What goes with the input, or None, as a batch of one if `batch` made the input one."""
    if tensor is None or unbatch is as_it_is:
        return tensor
    checks.storage(op, name, tensor)
    return tensor.unsqueeze(0)


def _first(output: Tensor) -> Tensor:
    return output.squeeze(0)


def as_it_is(output: Tensor) -> Tensor:
    return output


def geometry(
    op: str, input: Tensor, weight: Tensor, stride: Size2, padding: Padding, dilation: Size2
) -> tuple[Tensor, Callable[[Tensor], Tensor], list[int], list[int], list[int]]:
    """The input as a batch, what takes the batch off the result, then stride, padding and dilation as lists."""
    input, unbatch = batch(op, input)
    steps, spread = checks.pair(op, "stride", stride, 1), checks.pair(op, "dilation", dilation, 1)
    input, border = _resolve_padding(op, input, weight, steps, padding, spread)
    return input, unbatch, within(input, steps, border), border, spread


def within(input: Tensor, stride: list[int], padding: list[int]) -> list[int]:
    """The strides, or shorter ones that leave the padded image with their first step as well.

    torch's CPU backward crashes where a stride is thousands of times longer than the image.
    """
    if max(stride) <= _LONG or input.dim() != 4:
        return stride
    sizes = zip(stride, input.shape[2:], padding, strict=True)
    return [min(step, max(size + 2 * border, 1)) if step > _LONG else step for step, size, border in sizes]


def _resolve_padding(
    op: str, input: Tensor, weight: Tensor, stride: list[int], padding: Padding, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """``"same"`` and ``"valid"`` in numbers.

    "same" keeps H and W. Where that takes an odd number of rows or columns, the input itself is
    padded with the last of them (bottom, right), as ``torch.nn.functional.conv2d`` does.
    """
    if not isinstance(padding, str):
        return input, checks.pair(op, "padding", padding, 0)
    if padding == "valid":
        return input, [0, 0]
    if padding != "same":
        checks.fail(op, checks.given("padding", padding), "integers, 'same' or 'valid'", "pass one of them")
    if any(step != 1 for step in stride):
        checks.fail(op, f"padding 'same' with stride {stride}", "stride 1", "pass the padding in numbers")
    checks.images(op, input, weight)
    total = [d * (r - 1) for d, r in zip(dilation, weight.shape[2:], strict=True)]
    odd = [t % 2 for t in total]
    if any(odd):
        checks.storage(op, "input", input)
        input = F.pad(input, (0, odd[1], 0, odd[0]))
    return input, [t // 2 for t in total]


# -------------------------------------------------------------------------------------- activations


def activate(value: Tensor, activation: str) -> Tensor:
    """The activation as aten has it."""
    if activation == "relu":
        return with_plain_strides(F.relu(value))
    if activation == "relu6":
        return F.relu6(value)
    return value


def with_plain_strides(value: Tensor) -> Tensor:
    """Contiguous in dimensions of one element, too, if it is contiguous at all.

    So eager's ReLU and its sums leave what is both contiguous and channels_last; torch's fake kernels of them do not.
    """
    if value.is_contiguous() and value.stride() != make_contiguous_strides_for(value.shape):
        return value.view(-1).view(value.shape)
    return value


def mask(grad: Tensor, output: Tensor | None, activation: str) -> Tensor:
    """The gradient before the activation, from the one after it and the activation's output."""
    if activation == "relu":
        return aten.threshold_backward(grad, output, 0)
    if activation == "relu6":
        return aten.hardtanh_backward(grad, output, 0, 6)
    return grad


# ------------------------------------------------------------------------------ convolution in aten


class Convolution:
    """A convolution's linear maps in aten: of the input, and their adjoints (dgrad, wgrad)."""

    def __init__(self, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> None:
        self._geometry = (stride, padding, dilation, False, [0, 0], groups)

    def fprop(self, input: Tensor, weight: Tensor) -> Tensor:
        return aten.convolution(input, weight, None, *self._geometry)

    def dgrad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the input; of `input` only the shape counts."""
        return aten.convolution_backward(grad, input, weight, None, *self._geometry, [True, False, False])[0]

    def wgrad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight; of `weight` only the shape counts."""
        if len(input) == 1 and self._geometry[-1] > 1:  # as `with_whole_batch_stride` in csrc/cpu/conv2d.cpp
            weight = weight.contiguous()
        return aten.convolution_backward(grad, input, weight, None, *self._geometry, [False, True, False])[1]


def per_channel(bias: Tensor) -> Tensor:
    """A vector [K] as [K, 1, 1], to be broadcast over pixels."""
    return bias[:, None, None]


def total(terms: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of those that are there, or None."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def autocast_with_residual(position: int, convolve: Callable[..., Tensor]) -> AutocastRule:
    """The autocast rule for a convolution that adds the residual at this position among its
    arguments.

    Eager adds a residual that is wider than the convolution's result in the residual's dtype; that
    sum is not fused. `convolve` takes the operator's arguments and leaves out residual and
    activation.
    """

    def rule(function: Callable[..., Any], device: str, args: tuple[Any, ...]) -> Any:
        residual, activation = args[position], args[-1]
        dtype = torch.get_autocast_dtype(device)
        if residual is None or torch.promote_types(residual.dtype, dtype) == dtype:
            return autocast_to_low_precision(function, device, args)
        return activate(convolve(*cast(args, dtype)) + residual, activation)

    return rule


# ---------------------------------------------------------------------------------- conv2d_backward


def empty_gradient(like: Tensor) -> Tensor:
    return like.new_empty([0])


def masked_like(grad: Tensor, output: Tensor | None) -> Tensor:
    """The gradient before the activation, for its layout: the activation's output's, if any."""
    return grad if output is None else torch.empty_like(output)


def where_wanted(gradients: Sequence[Tensor], wanted: Sequence[bool], input: Tensor) -> tuple[Tensor, ...]:
    """As operators return gradients: those outside of the mask as empty tensors."""
    return tuple(g if want else empty_gradient(input) for g, want in zip(gradients, wanted, strict=True))


def fake_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, *geometry: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias and residual, for their shapes and layouts."""
    stride, padding, dilation, groups = geometry
    if 0 in input.shape:  # torch's own fake kernel does not say what eager does then
        grad_bias = input.new_empty([weight.shape[0]])
        return torch.empty_like(input), torch.empty_like(weight), grad_bias, torch.empty_like(grad)
    grad_input, grad_weight, grad_bias = aten.convolution_backward(
        grad,
        input,
        weight,
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [True, True, True],
    )
    return grad_input, grad_weight, grad_bias, torch.empty_like(grad)


def _fake(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    op = "conv2d_backward"
    geometry = (stride, padding, dilation, groups)
    checks.conv2d(op, input, weight, None, grad_output, *geometry, ("weight", "bias", "grad_output"))
    checks.activation(op, activation)
    grad = masked_like(grad_output, output)
    found = fake_gradients(grad, input, weight, *geometry)
    return where_wanted(found, output_mask, input)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, forward_output, input, weight, *geometry, ctx.activation, ctx.output_mask = inputs
    ctx.convolution = Convolution(*geometry)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_output, forward_output, input, weight)


def _backward(
    ctx: Any,
    gg_input: Tensor | None,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    gg_residual: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradient of the four gradients, which are bilinear in grad_output and (weight, input)."""
    grad_output, output, input, weight = ctx.saved_tensors
    gg_input, gg_weight, gg_bias, gg_residual = (
        gg if wanted else None
        for gg, wanted in zip((gg_input, gg_weight, gg_bias, gg_residual), ctx.output_mask, strict=True)
    )
    conv = ctx.convolution
    grad = mask(grad_output, output, ctx.activation)
    for_grad = total(
        [
            None if gg_input is None else conv.fprop(gg_input, weight),
            None if gg_weight is None else conv.fprop(input, gg_weight),
            None if gg_bias is None else per_channel(gg_bias).expand_as(grad),
            gg_residual,
        ]
    )
    return (
        None if for_grad is None else mask(for_grad, output, ctx.activation),
        None,
        None if gg_weight is None else conv.dgrad(grad, input, gg_weight),
        None if gg_input is None else conv.wgrad(grad, gg_input, weight),
        *[None] * 6,
    )


conv2d_backward = Operator("conv2d_backward", fake=_fake, setup_context=_setup_context, backward=_backward)


def save_for_backward(ctx: Any, activation: str, output: Tensor, input: Tensor, weight: Tensor) -> None:
    """Keeps what `gradients` needs; the output only where there is a mask to read from it."""
    ctx.activation = activation
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(None if activation == "none" else output, input, weight)


def gradients(
    ctx: Any,
    grad: Tensor | None,
    geometry: tuple[list[int], list[int], list[int], int],
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias and residual; None where not wanted or not to be had."""
    if grad is None or not any(wanted):
        return None, None, None, None
    output, input, weight = ctx.saved_tensors
    found = conv2d_backward(ctx.namespace, grad, output, input, weight, *geometry, ctx.activation, list(wanted))
    return tuple(g if want else None for g, want in zip(found, wanted, strict=True))

"""Gradients and second gradients of a convolution: the operator `conv2d_backward`, and what ops need around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import checks
from .activations import mask
from .convolution import FusedConvolution, Geometry
from .registration import Operator

aten = torch.ops.aten

_NAMES = checks.Names(residual="grad_output")


# --------------------------------------------------------------------------------------- linear maps


class LinearMaps:
    """What a convolution is in aten, of its input and of its weight; and the adjoints of both (dgrad, wgrad)."""

    def __init__(self, geometry: Geometry) -> None:
        stride, padding, dilation, groups = geometry
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


# ------------------------------------------------------------------------------- gradients without data


def empty_gradient(like: Tensor) -> Tensor:
    return like.new_empty([0])


def masked_like(grad: Tensor, output: Tensor | None) -> Tensor:
    """The gradient before the activation, for its layout: the activation's output's, if any."""
    return grad if output is None else torch.empty_like(output)


def where_wanted(gradients: Sequence[Tensor], wanted: Sequence[bool], input: Tensor) -> tuple[Tensor, ...]:
    """As operators return gradients: those outside of the mask as empty tensors."""
    return tuple(g if want else empty_gradient(input) for g, want in zip(gradients, wanted, strict=True))


def fake_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias and residual, for their shapes and layouts."""
    if 0 in input.shape:  # torch's own fake kernel does not say what eager does then
        grad_bias = input.new_empty([weight.shape[0]])
        return torch.empty_like(input), torch.empty_like(weight), grad_bias, torch.empty_like(grad)
    return *by_aten(grad, input, weight, geometry, [True] * 3), torch.empty_like(grad)


def by_aten(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias from that before the activation; what is not wanted may be None."""
    stride, padding, dilation, groups = geometry
    if groups > 1 and len(input) == 1 and suggest_memory_format(weight) == torch.channels_last:
        input = _with_whole_batch_stride(input)
    sizes = ([weight.shape[0]], stride, padding, dilation, False, [0, 0], groups)
    return aten.convolution_backward(grad, input, weight, *sizes, wanted)


def _with_whole_batch_stride(image: Tensor) -> Tensor:
    """As in csrc/cpu/conv2d.cpp, which says why: aten's float64 gradient of the weight would be wrong."""
    first, *others = image.stride()
    extent = max(size * stride for size, stride in zip(image.shape[1:], others, strict=True))
    return image if first >= extent else image.as_strided(image.shape, (extent, *others))


# -------------------------------------------------------------------------------------- the operator


class Backward(NamedTuple):
    """The operator's arguments; the mask is for the gradients of input, weight, bias and residual.

    Without an activation the forward's output may be None. The convolution has no bias and no residual, as the
    gradients do without them.
    """

    grad_output: Tensor
    output: Tensor | None
    conv: FusedConvolution
    output_mask: Sequence[bool]


def read(args: Sequence[Any]) -> Backward:
    """The arguments in one form, not checked."""
    grad_output, output, input, weight, *geometry, activation, output_mask = args
    conv = FusedConvolution(input, weight, None, None, Geometry(*geometry), activation)
    return Backward(grad_output, output, conv, output_mask)


def check(args: Backward) -> None:
    op = "conv2d_backward"
    checks.conv2d(op, args.conv._replace(residual=args.grad_output), _NAMES)
    checks.mask_source(op, args.grad_output, args.output, args.conv.activation)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    given = read(args)
    check(given)
    grad_output, output, (input, weight, _, _, geometry, _), output_mask = given
    return where_wanted(fake_gradients(masked_like(grad_output, output), input, weight, geometry), output_mask, input)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, forward_output, conv, ctx.output_mask = read(inputs)
    ctx.convolution, ctx.activation = LinearMaps(conv.geometry), conv.activation
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_output, forward_output, conv.input, conv.weight)


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


# ----------------------------------------------------------------------------- in an op's own gradient


def save_for_backward(ctx: Any, activation: str, output: Tensor, input: Tensor, weight: Tensor) -> None:
    """Keeps what `gradients` needs; the output only where there is a mask to read from it."""
    ctx.activation = activation
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(None if activation == "none" else output, input, weight)


def gradients(
    ctx: Any, grad: Tensor | None, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight, bias and residual; None where not wanted or not to be had."""
    if grad is None or not any(wanted):
        return None, None, None, None
    output, input, weight = ctx.saved_tensors
    found = conv2d_backward(ctx.namespace, grad, output, input, weight, *geometry, ctx.activation, list(wanted))
    first, second, third, fourth = (g if want else None for g, want in zip(found, wanted, strict=True))
    return first, second, third, fourth

"""The operators that are one convolution with more or less around it: conv2d_relu, conv2d_add_relu, pointwise_conv2d
and depthwise_conv2d. Their arguments in one form, and what such an operator registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autocast, checks
from .activations import activate
from .conv2d_backward import gradients, save_for_backward
from .convolution import POINTWISE, FusedConvolution, Geometry, by_aten


def read(op: str, args: Sequence[Any]) -> FusedConvolution:
    """What the arguments of the operator `op` say; checked as far as the reading needs it."""
    return _READERS[op](*args)


# ---------------------------------------------------------------------------------- each op's arguments


def _conv2d_relu(input: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> FusedConvolution:
    *geometry, activation = others
    return FusedConvolution(input, weight, bias, None, Geometry(*geometry), activation)


def _conv2d_add_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *others: Any
) -> FusedConvolution:
    *geometry, activation = others
    return FusedConvolution(input, weight, bias, residual, Geometry(*geometry), activation)


def _pointwise_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: list[int], activation: str
) -> FusedConvolution:
    checks.pointwise_weight("pointwise_conv2d", "weight", weight)
    return FusedConvolution(input, weight, bias, residual, POINTWISE._replace(stride=stride), activation)


def _depthwise_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> FusedConvolution:
    groups = checks.depthwise_weight("depthwise_conv2d", "weight", input, weight)
    stride, padding, dilation, activation = others
    return FusedConvolution(input, weight, bias, None, Geometry(stride, padding, dilation, groups), activation)


_READERS: dict[str, Callable[..., FusedConvolution]] = {
    "conv2d_relu": _conv2d_relu,
    "conv2d_add_relu": _conv2d_add_relu,
    "pointwise_conv2d": _pointwise_conv2d,
    "depthwise_conv2d": _depthwise_conv2d,
}
NAMES = tuple(_READERS)
# The residual's place among the arguments of the operators that have one; the others have a list of numbers there.
_RESIDUAL = 3


# --------------------------------------------------------------------------------- what they register


def rules(op: str) -> dict[str, Any]:
    """What `fastconv.operators.registration.PublicOperator` takes beside the name and the reference."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        conv = read(op, inputs)
        ctx.geometry, ctx.arguments = conv.geometry, len(inputs)
        save_for_backward(ctx, conv.activation, output, conv.input, conv.weight)

    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradients(ctx, grad, ctx.geometry, ctx.needs_input_grad[: _RESIDUAL + 1])
        return *found, *[None] * (ctx.arguments - len(found))

    def autocast_rule(function: Callable[..., Any], device: str, args: tuple[Any, ...]) -> Any:
        """Eager adds a residual that is wider than the convolution's result in the residual's dtype; that sum is not
        fused."""
        residual, dtype = args[_RESIDUAL], torch.get_autocast_dtype(device)
        if not isinstance(residual, Tensor) or torch.promote_types(residual.dtype, dtype) == dtype:
            return autocast.to_low_precision(function, device, args)
        conv = read(op, autocast.cast(args, dtype))
        return activate(by_aten(conv._replace(residual=None, activation="none")) + residual, conv.activation)

    return {
        "setup_context": setup_context,
        "backward": backward,
        "autocast": autocast_rule,
        "fold_batch": (0, _RESIDUAL),
    }

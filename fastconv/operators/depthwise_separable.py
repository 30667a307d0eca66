"""The depthwise separable operators as the two convolutions that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import checks
from .convolution import POINTWISE, FusedConvolution, Geometry

_DEPTHWISE = checks.Names("depthwise_weight", "depthwise_bias")
_POINTWISE = checks.Names("pointwise_weight", "pointwise_bias", "grad_output")


def read(op: str, args: Sequence[Any], grad_output: Tensor | None = None) -> tuple[FusedConvolution, FusedConvolution]:
    """The depthwise convolution and the 1x1 of the forward's arguments, checked; and the gradient of the output, if
    there is one.

    The latter's input, which is the former's result, has its shape, dtype and device, but no memory to speak of.
    """
    input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, *numbers, inner, outer = args
    stride, padding, dilation = numbers
    groups = checks.depthwise_weight(op, "depthwise_weight", input, depthwise_weight)
    checks.pointwise_weight(op, "pointwise_weight", pointwise_weight)
    depthwise = FusedConvolution(
        input, depthwise_weight, depthwise_bias, None, Geometry(stride, padding, dilation, groups), inner
    )
    hidden = input.new_empty(1).expand(checks.conv2d(op, depthwise, _DEPTHWISE))
    pointwise = FusedConvolution(hidden, pointwise_weight, pointwise_bias, None, POINTWISE, outer)
    checks.conv2d(op, pointwise._replace(residual=grad_output), _POINTWISE)
    return depthwise, pointwise


class Backward(NamedTuple):
    """The arguments of the backward; the mask is for the gradients of the five tensors."""

    grad_output: Tensor
    output: Tensor | None
    depthwise: FusedConvolution
    pointwise: FusedConvolution
    output_mask: Sequence[bool]


def read_backward(args: Sequence[Any]) -> Backward:
    """The two convolutions as from `read`, of arguments without the pointwise bias; checked."""
    op = "depthwise_separable_conv2d_backward"
    grad_output, output, input, depthwise_weight, pointwise_weight, depthwise_bias, *others, output_mask = args
    tensors = (input, depthwise_weight, pointwise_weight, depthwise_bias, None)
    depthwise, pointwise = read(op, (*tensors, *others), grad_output)
    checks.mask_source(op, grad_output, output, pointwise.activation)
    return Backward(grad_output, output, depthwise, pointwise, output_mask)

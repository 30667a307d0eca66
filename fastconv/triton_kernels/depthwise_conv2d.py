"""Depthwise convolution + bias + activation in one kernel, see `_depthwise`."""

from __future__ import annotations

from torch import Tensor

from ..operators import checks
from . import _conv


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
) -> Tensor:
    """`fastconv.ops.depthwise_conv2d`: input [N, C, H, W], weight [C * M, 1, R, S], bias [C * M] -> [N, C * M, P, Q].

    float16, bfloat16 and float32; float64 by the aten composition.
    """
    op = "depthwise_conv2d"
    checks.activation(op, activation)
    groups = checks.depthwise_weight(op, "weight", input, weight)
    checks.conv2d(op, input, weight, bias, None, stride, padding, dilation, groups)
    return _conv.convolve(input, weight, bias, None, (stride, padding, dilation, groups), activation)

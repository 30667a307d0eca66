"""1x1 convolution with bias, residual and activation: `_implicit_gemm` with one tap, hence no test for padding."""

from __future__ import annotations

from torch import Tensor

from ..ops import _checks
from . import _conv


def pointwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    activation: str,
    *,
    output: Tensor | None = None,
) -> Tensor:
    """`fastconv.ops.pointwise_conv2d`: input [N, C, H, W], weight [K, C, 1, 1], bias [K] -> [N, K, P, Q].

    float16, bfloat16 and float32; float64 by the aten composition. `input` may be a slice of channels of a wider
    tensor, and so may `output`, which the operator does not have: it is written in place.
    """
    op = "pointwise_conv2d"
    _checks.activation(op, activation)
    _checks.pointwise_weight(op, "weight", weight)
    _checks.conv2d(op, input, weight, bias, residual, stride, [0, 0], [1, 1], 1)
    return _conv.convolution(input, weight, bias, residual, (stride, [0, 0], [1, 1], 1), activation, output)

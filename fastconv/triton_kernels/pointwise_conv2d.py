"""1x1 convolution with bias, residual and activation: `_implicit_gemm` with one tap, hence no test for padding."""

from __future__ import annotations

from torch import Tensor

from ..operators import checks
from . import _conv


def pointwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    activation: str,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`fastconv.ops.pointwise_conv2d`: input [N, C, H, W], weight [K, C, 1, 1], bias [K] -> [N, K, P, Q].

    float16, bfloat16 and float32; float64 by the aten composition. `input` may be a slice of channels of a wider
    tensor, and so may `out`, which is written in place.
    """
    op = "pointwise_conv2d"
    checks.activation(op, activation)
    checks.pointwise_weight(op, "weight", weight)
    geometry: _conv.Geometry = (stride, [0, 0], [1, 1], 1)
    shape = checks.conv2d(op, input, weight, bias, residual, *geometry)
    if out is not None:
        checks.destination(op, "out", out, shape, input, [input, weight, bias, residual])
    return _conv.convolve(input, weight, bias, residual, geometry, activation, out)

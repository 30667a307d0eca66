"""Convolution + bias + ReLU in one kernel, see `_implicit_gemm`."""

from __future__ import annotations

from torch import Tensor

from ..operators import checks
from . import _conv


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`fastconv.ops.conv2d_relu`: input [N, C, H, W], weight [K, C / groups, R, S], bias [K] -> [N, K, P, Q].

    float16, bfloat16 and float32; float64 by the aten composition. One filter for each channel goes to the depthwise
    kernel.
    """
    op = "conv2d_relu"
    checks.activation(op, activation)
    geometry = (stride, padding, dilation, groups)
    shape = checks.conv2d(op, input, weight, bias, None, *geometry)
    if out is not None:
        checks.destination(op, "out", out, shape, input, [input, weight, bias])
    return _conv.convolve(input, weight, bias, None, geometry, activation, out)

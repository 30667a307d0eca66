"""Convolution + bias + residual + ReLU in one kernel, see `_implicit_gemm`."""

from __future__ import annotations

from torch import Tensor

from ..operators import checks
from . import _conv


def conv2d_add_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`fastconv.ops.conv2d_add_relu`: as `conv2d_relu`, with residual [N, K, P, Q] of any strides.

    float16, bfloat16 and float32; float64 by the aten composition.
    """
    op = "conv2d_add_relu"
    checks.activation(op, activation)
    geometry = (stride, padding, dilation, groups)
    shape = checks.conv2d(op, input, weight, bias, residual, *geometry)
    if out is not None:
        checks.destination(op, "out", out, shape, input, [input, weight, bias, residual])
    return _conv.convolve(input, weight, bias, residual, geometry, activation, out)

"""1x1 convolution with bias, residual and activation: `conv2d_fprop` with one tap, hence no test for padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _conv


def pointwise_conv2d(*args: Any, out: Tensor | None = None) -> Tensor:
    """`fastconv.ops.pointwise_conv2d`: input [N, C, H, W], weight [K, C, 1, 1], bias [K] -> [N, K, P, Q].

    float16, bfloat16 and float32; float64 by the aten composition. `input` may be a slice of channels of a wider
    tensor, and so may `out`, which is written in place.
    """
    return _conv.forward("pointwise_conv2d", args, out)

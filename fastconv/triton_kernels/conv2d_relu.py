"""Convolution + bias + ReLU in one kernel, see `conv2d_fprop`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _conv


def conv2d_relu(*args: Any, out: Tensor | None = None) -> Tensor:
    """`fastconv.ops.conv2d_relu`: input [N, C, H, W], weight [K, C / groups, R, S], bias [K] -> [N, K, P, Q].

    float16, bfloat16 and float32; float64 by the aten composition. One filter for each channel goes to the depthwise
    kernel.
    """
    return _conv.forward("conv2d_relu", args, out)

"""Convolution + bias + residual + ReLU in one kernel, see `conv2d_fprop`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _conv


def conv2d_add_relu(*args: Any, out: Tensor | None = None) -> Tensor:
    """`fastconv.ops.conv2d_add_relu`: as `conv2d_relu`, with residual [N, K, P, Q] of any strides.

    float16, bfloat16 and float32; float64 by the aten composition.
    """
    return _conv.forward("conv2d_add_relu", args, out)

"""Depthwise convolution + bias + activation in one kernel, see `depthwise`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _conv


def depthwise_conv2d(*args: Any) -> Tensor:
    """`fastconv.ops.depthwise_conv2d`: input [N, C, H, W], weight [C * M, 1, R, S], bias [C * M] -> [N, C * M, P, Q].

    float16, bfloat16 and float32; float64 by the aten composition.
    """
    return _conv.forward("depthwise_conv2d", args)

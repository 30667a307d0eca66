"""cuDNN's fused convolutions, as torch has them: the best that a user could write by hand on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastconv.aten_kernels.cudnn import fused
from fastconv.measure.calls import Layer
from fastconv.operators.convolution import FusedConvolution, Geometry


def has(layer: Layer) -> bool:
    """Whether there is one for it: they know ReLU alone, and no gradients."""
    is_dense = layer.op in ("conv2d_relu", "conv2d_add_relu", "pointwise_conv2d", "pointwise_conv2d_group")
    return is_dense and layer.activation == "relu"


def call(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    weights: list[Tensor] | None = None,
    biases: list[Tensor] | None = None,
    activation: str = "relu",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Any:
    """What an op for which `has` says yes computes."""
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    if weights is not None:
        given = biases or [None] * len(weights)
        convs = [FusedConvolution(input, w, b, None, geometry, activation) for w, b in zip(weights, given, strict=True)]
        return [fused(conv) for conv in convs]
    return fused(FusedConvolution(input, weight, bias, residual, geometry, activation))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)

"""A 2-d convolution with its epilogue, as every layer below the public functions has it: one value.

Letters: N batch, C input channels, H W input pixels, K output channels, R S filter, P Q output pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .activations import activate, with_plain_strides


class Geometry(NamedTuple):
    """Stride, padding and dilation as (height, width), and the number of groups."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


POINTWISE = Geometry([1, 1], [0, 0], [1, 1], 1)


def output_shape(input: Sequence[int], weight: Sequence[int], geometry: Geometry) -> list[int]:
    """[N, K, P, Q] for input [N, C, H, W] and weight [K, C / groups, R, S] that were checked."""
    stride, padding, dilation, _ = geometry
    pixels = [
        (side + 2 * border - d * (taps - 1) - 1) // step + 1
        for side, border, d, taps, step in zip(input[2:], padding, dilation, weight[2:], stride, strict=True)
    ]
    return [input[0], weight[0], *pixels]


class FusedConvolution(NamedTuple):
    """activation(conv2d(input, weight) + bias + residual)."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    geometry: Geometry
    activation: str


def by_aten(conv: FusedConvolution) -> Tensor:
    """The meaning, in the layout of torch.nn.functional.conv2d."""
    output = F.conv2d(conv.input, conv.weight, conv.bias, *conv.geometry)
    if conv.residual is not None:
        output = with_plain_strides(output + conv.residual)
    return activate(output, conv.activation)

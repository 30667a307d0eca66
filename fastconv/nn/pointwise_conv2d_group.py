"""Module for :func:`fastconv.ops.pointwise_conv2d_group`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ._base import checked_activation


class PointwiseConv2dGroup(torch.nn.ModuleList):
    """Several 1x1 convolutions of one input, in one op: a ``torch.nn.ModuleList`` of
    ``torch.nn.Conv2d``.

    Args:
        in_channels: C.
        out_channels: K_i of each branch.
        bias: whether the branches have one.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``, for all branches.
        device, dtype: as for ``torch.nn.Conv2d``.

    Shape: [N, C, H, W] or [C, H, W] to a list of [N, K_i, H, W] or [K_i, H, W].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Sequence[int],
        bias: bool = True,
        *,
        activation: str = "none",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            torch.nn.Conv2d(in_channels, k, 1, bias=bias, device=device, dtype=dtype) for k in out_channels
        )
        self.activation = checked_activation(self, activation)

    def forward(self, input: Tensor) -> list[Tensor]:
        convs = cast(list[torch.nn.Conv2d], list(self))
        return ops.pointwise_conv2d_group(
            input,
            [conv.weight for conv in convs],
            [conv.bias for conv in convs],
            activation=self.activation,
        )

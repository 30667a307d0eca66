"""Module for :func:`fastconv.ops.depthwise_separable_conv2d`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from ._base import checked_activation, pad


class DepthwiseSeparableConv2d(torch.nn.Module):
    """A depthwise ``torch.nn.Conv2d`` and the 1x1 ``torch.nn.Conv2d`` that follows it, in one op.

    The two convolutions are the submodules ``depthwise`` and ``pointwise``, which name the
    state_dict.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size, stride, padding, dilation, padding_mode: of the depthwise convolution, as for
            ``torch.nn.Conv2d``.
        multiplier: filters for each input channel.
        bias: whether the two convolutions have one.
        depthwise_activation, pointwise_activation: ``"none"``, ``"relu"`` or ``"relu6"``; between
            the two convolutions and after them.
        device, dtype: as for ``torch.nn.Conv2d``.

    Shape: [N, C, H, W] or [C, H, W] to [N, K, P, Q] or [K, P, Q].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        multiplier: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        depthwise_activation: str = "none",
        pointwise_activation: str = "none",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = in_channels * multiplier
        self.depthwise = torch.nn.Conv2d(
            in_channels,
            hidden,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.pointwise = torch.nn.Conv2d(hidden, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.depthwise_activation = checked_activation(self, depthwise_activation)
        self.pointwise_activation = checked_activation(self, pointwise_activation)

    def forward(self, input: Tensor) -> Tensor:
        depthwise, pointwise = self.depthwise, self.pointwise
        input, padding = pad("depthwise_separable_conv2d", depthwise, input)
        return ops.depthwise_separable_conv2d(
            input,
            depthwise.weight,
            pointwise.weight,
            depthwise.bias,
            pointwise.bias,
            depthwise.stride,
            padding,
            depthwise.dilation,
            depthwise_activation=self.depthwise_activation,
            pointwise_activation=self.pointwise_activation,
        )

    def extra_repr(self) -> str:
        return f"depthwise_activation={self.depthwise_activation!r}, pointwise_activation={self.pointwise_activation!r}"

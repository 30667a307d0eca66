"""Module for :func:`fastconv.ops.depthwise_conv2d`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ._base import ActivatedConv2d, pad, require


class DepthwiseConv2d(ActivatedConv2d):
    """``torch.nn.Conv2d`` with as many groups as input channels, and optionally an activation, in
    one op.

    Takes the arguments of ``torch.nn.Conv2d`` (``groups`` may be left out) and has its parameters
    and state_dict.

    Args:
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.

    Shape: [N, C, H, W] or [C, H, W] to [N, K, P, Q] or [K, P, Q], where K is a multiple of C.

    Raises:
        ValueError: ``groups`` is not the number of input channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int | None = None,
        *args: Any,
        activation: str = "none",
        **kwargs: Any,
    ) -> None:
        groups = in_channels if groups is None else groups
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*sizes, *args, activation=activation, **kwargs)
        require(
            self,
            groups == in_channels,
            f"groups {groups}",
            f"{in_channels}, the number of input channels",
            "use Conv2dReLU for other groups",
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = pad("depthwise_conv2d", self, input)
        return ops.depthwise_conv2d(
            input, weight, bias, self.stride, padding, self.dilation, activation=self.activation
        )

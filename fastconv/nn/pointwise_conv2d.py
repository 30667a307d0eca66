"""Module for :func:`fastconv.ops.pointwise_conv2d`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ._base import ActivatedConv2d, require


class PointwiseConv2d(ActivatedConv2d):
    """``torch.nn.Conv2d`` with a 1x1 filter, and optionally a residual and an activation, in one
    op.

    Takes the arguments of ``torch.nn.Conv2d`` (the filter's size may be left out) and has its
    parameters and state_dict; ``forward`` takes an optional residual as its second argument.

    Args:
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.

    Shape: input [N, C, H, W] and residual [N, K, P, Q] to [N, K, P, Q]; or all without N.

    Raises:
        ValueError: the filter is not 1x1, or there is padding, or more than one group.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        *args: Any,
        activation: str = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, activation=activation, **kwargs)
        plain = self.kernel_size == (1, 1) and self.padding in ((0, 0), "valid", "same") and self.groups == 1
        require(
            self,
            plain,
            f"kernel_size {self.kernel_size}, padding {self.padding}, groups {self.groups}",
            "a 1x1 filter without padding in one group",
            "use Conv2dReLU for other convolutions",
        )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.pointwise_conv2d(input, self.weight, self.bias, residual, self.stride, activation=self.activation)

"""Module for :func:`fastconv.ops.conv2d_relu`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ._base import ActivatedConv2d, pad


class Conv2dReLU(ActivatedConv2d):
    """``torch.nn.Conv2d`` followed by a ReLU, in one op.

    Takes the arguments of ``torch.nn.Conv2d`` and has its parameters and state_dict.

    Args:
        activation: ``"relu"`` or ``"relu6"``.

    Shape: [N, C, H, W] or [C, H, W] to [N, K, P, Q] or [K, P, Q], as for ``torch.nn.Conv2d``.
    """

    def __init__(self, *args: Any, activation: str = "relu", **kwargs: Any) -> None:
        super().__init__(*args, activation=activation, **kwargs)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = pad("conv2d_relu", self, input)
        return ops.conv2d_relu(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, activation=self.activation
        )

"""Module for :func:`fastconv.ops.conv2d_add_relu`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ._base import ActivatedConv2d, pad


class Conv2dAddReLU(ActivatedConv2d):
    """``torch.nn.Conv2d``, plus a residual, then a ReLU, in one op.

    Takes the arguments of ``torch.nn.Conv2d`` and has its parameters and state_dict; ``forward``
    takes the residual as its second argument.

    Args:
        activation: ``"relu"``, ``"relu6"`` or ``"none"``.

    Shape: input [N, C, H, W] and residual [N, K, P, Q] to [N, K, P, Q]; or all without N.
    """

    def __init__(self, *args: Any, activation: str = "relu", **kwargs: Any) -> None:
        super().__init__(*args, activation=activation, **kwargs)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        input, padding = pad("conv2d_add_relu", self, input)
        return ops.conv2d_add_relu(
            input,
            self.weight,
            self.bias,
            residual,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
        )

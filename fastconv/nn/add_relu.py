"""Module for :func:`fastconv.ops.add_relu`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ._base import checked_activation


class AddReLU(torch.nn.Module):
    """``relu(input + other)`` in one op; broadcasts and promotes dtypes as ``input + other`` does.

    Args:
        activation: ``"relu"`` or ``"relu6"``.
    """

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        self.activation = checked_activation(self, activation)

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        return ops.add_relu(input, other, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

"""Module for :func:`fastconv.ops.local_response_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ._base import checked_activation


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """``torch.nn.LocalResponseNorm`` in one pass each way; takes its arguments, and has no
    parameters either.

    Args:
        size, alpha, beta, k: as torch's.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``, applied to the input first.

    Shape: [N, C, ...] to the same.
    """

    def __init__(
        self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, activation: str = "none"
    ) -> None:
        super().__init__(size, alpha, beta, k)
        self.activation = checked_activation(self, activation)

    def forward(self, input: Tensor) -> Tensor:
        return ops.local_response_norm(input, self.size, self.alpha, self.beta, self.k, activation=self.activation)

    def extra_repr(self) -> str:
        shown = "" if self.activation == "none" else f", activation={self.activation!r}"
        return super().extra_repr() + shown

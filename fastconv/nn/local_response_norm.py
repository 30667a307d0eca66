"""Module for :func:`fastconv.ops.local_response_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """``torch.nn.LocalResponseNorm`` in one pass each way; takes its arguments, and has no
    parameters either.

    Shape: [N, C, ...] to the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.local_response_norm(input, self.size, self.alpha, self.beta, self.k)

"""Local response normalization in aten."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate


def by_aten(input: Tensor, size: int, alpha: float, beta: float, k: float, activation: str) -> Tensor:
    """The meaning of the op, in any dtype and layout."""
    a = activate(input, activation)
    reach = _reach(size, input)
    if reach < size:
        size, alpha = reach, alpha * reach / size
    wide = at_least_32_bits(a)  # squares overflow; aten has no CPU kernel
    if a.dim() > 4 and wide.stride(-2) != wide.shape[-1] * wide.stride(-1):  # aten's view of the volume would raise
        return torch.empty_like(input).copy_(F.local_response_norm(wide.contiguous(), size, alpha, beta, k))
    return F.local_response_norm(wide, size, alpha, beta, k).to(a.dtype)


def at_least_32_bits(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def window_sum(values: Tensor, size: int, *, adjoint: bool = False) -> Tensor:
    """Sums over the `size` channels around each one; the adjoint mirrors the window."""
    size = _reach(size, values)
    before, after = size // 2, (size - 1) // 2
    if adjoint:
        before, after = after, before
    flat = values.flatten(2).unsqueeze(1)
    sums = F.avg_pool2d(F.pad(flat, (0, 0, before, after)), (size, 1), stride=1, divisor_override=1)
    return sums.reshape(values.shape)


def _reach(size: int, input: Tensor) -> int:
    """A window that sums as many channels; aten pads with the whole window, however large."""
    return min(size, 2 * max(input.shape[1], 1) + size % 2)

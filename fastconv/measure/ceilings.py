"""What a machine can do at best, measured: what the time of a layer is held against."""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from fastconv.measure.timing import clock, cold_cache, durations


@functools.lru_cache(maxsize=2)
def copy_seconds(nbytes: int, device: torch.device) -> float:
    """The time of a copy that reads and writes so many bytes in total, in the same caches."""
    source, target = torch.rand(2, max(1, nbytes // 8), device=device)
    flush = cold_cache(device)

    def setup() -> tuple[tuple[Tensor], dict[str, Any]]:
        flush()
        return (source,), {}

    return statistics.median(durations(target.copy_, setup, clock(device), 20))


@functools.cache
def flop_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of a large matrix product on a GPU; on a CPU, where it says less, without limit."""
    if device.type != "cuda":
        return math.inf
    side = 8192
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    target = functools.partial(torch.mm, left, right)
    return 2 * side**3 / statistics.median(durations(target, lambda: ((), {}), clock(device), 10))

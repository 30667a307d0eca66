"""One call for each entry of the table, which stands for the entry's shape class: what `python -m fastconv tune` times.

A kernel's samples are made beside its launcher, by a function registered under the kernel's name in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Attributes:
    tensors: what both functions are called with.
    run: launches the kernel, and returns what it wrote.
    reference: the same by torch, in any dtype.
    taps: of the filter, for `launch.guarded`.
    """

    tensors: tuple[Tensor, ...]
    run: Callable[..., list[Tensor]]
    reference: Callable[..., list[Tensor]]
    taps: int = 1


class Maker:
    """Random tensors of the dtype, layout and width that an entry's name asks for.

    Values are multiples of 1/8 below 4, and weights besides scaled by a power of two. Sums of their products are exact
    in float32, and the factors in TF32 and 16 bits: a wrong result cannot hide behind rounding.
    """

    def __init__(self, entry: str, batch: int, side: int, device: torch.device) -> None:
        self.classes = entry.split()
        self.width = {"narrow": 32, "medium": 64, "wide": 256}.get(self.classes[-1], 0)
        self.side = side
        self._batch, self._device = batch, device
        self._dtype = torch.float32 if self.classes[0] in ("tf32", "ieee") else torch.float16
        self._layout = torch.contiguous_format if self.classes[0] == "pixels" else torch.channels_last

    def values(self, *shape: int) -> Tensor:
        eighths = (torch.randn(shape, device=self._device) * 8).round().clamp(-31, 31)
        return (eighths / 8).to(self._dtype)

    def images(self, channels: int, *, shrink: int = 1) -> Tensor:
        """Of a whole side, or of one `shrink` times smaller, as deeper in a network."""
        side = self.side // shrink
        return self.values(self._batch, channels, side, side).contiguous(memory_format=self._layout)

    def filters(self, K: int, C: int, taps: int = 1) -> Tensor:
        """[K, C, taps, taps], so that a convolution's result is about as large as its input."""
        scale = 2.0 ** -round(math.log2(C * taps**2) / 2)
        return (self.values(K, C, taps, taps) * scale).contiguous(memory_format=torch.channels_last)


SAMPLES: dict[str, Callable[[Maker], Sample]] = {}


def sample(kernel: str) -> Callable[[Callable[[Maker], Sample]], Callable[[Maker], Sample]]:
    """Registers what makes the samples of a kernel's entries."""

    def register(make: Callable[[Maker], Sample]) -> Callable[[Maker], Sample]:
        SAMPLES[kernel] = make
        return make

    return register

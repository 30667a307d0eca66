"""What the tests of the CUDA kernels share: operands, the mask of an activation, the emulator's order and size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import emulator
from fastconv.operators import backends
from support.cases import FORMATS
from support.kernel_backends import device_of, emulated, on


def operators(backend: str) -> Any:
    """The operators of the backend, ``torch.ops.<namespace>``."""
    return getattr(torch.ops, backends.namespace(backend))


def random(
    backend: str, *shape: int, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0, scale: float = 1.0
) -> Tensor:
    """Normal numbers on the backend's device, the same for every backend; `layout` is that of images."""
    value = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value = value.to(device_of(backend), dtype)
    return value.contiguous(memory_format=FORMATS[layout]) if value.dim() == 4 else value


def among_nan(tensor: Tensor) -> Tensor:
    """The same values and strides between NaNs, one element off any alignment."""
    margin = 65
    memory = torch.full((tensor.numel() + 2 * margin,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), margin).copy_(tensor)


def through_mask(grad: Tensor, output: Tensor, activation: str) -> Tensor:
    """The gradient in front of an activation that gave this output."""
    inside = torch.ones_like(output, dtype=torch.bool)
    if activation != "none":
        inside = output > 0
    if activation == "relu6":
        inside &= output < 6
    return torch.where(inside, grad, 0)


# Of an H100, but few multiprocessors: csrc/cuda/runtime/device_info.h
HOPPER = (90, 4, 2048, 227 << 10, 228 << 10, 50 << 20)


@contextmanager
def emulated_hopper(multiprocessors: int = HOPPER[1]) -> Iterator[emulator.Library]:
    """As `emulated_gpu`, on one of compute capability 9.0."""
    with emulated_gpu() as library:
        library.device((HOPPER[0], multiprocessors, *HOPPER[2:]))
        yield library


@contextmanager
def emulated_gpu(multiprocessors: int | None = None, shared_per_block: int | None = None) -> Iterator[emulator.Library]:
    """Inside, ops run in the emulator, on a GPU of this size: small grids are spread over it. Launches count from 0."""
    library = emulated()
    if multiprocessors is not None:
        library.multiprocessors(multiprocessors)
    if shared_per_block is not None:
        library.shared_per_block(shared_per_block)
    library.reset_statistics()
    try:
        with on("cuda-emulated"):
            yield library
    finally:
        library.reset_device()


def check_same_bits_in_any_order(call: Callable[[], Sequence[Tensor]]) -> None:
    """Of threads and blocks, in the emulator."""
    library = emulated()
    results = []
    try:
        for seed in (1, 2, 3):
            library.seed(seed)
            results.append(call())
    finally:
        library.seed(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

"""The CUDA kernels on the CPU: build.py makes the libraries, this talks to them."""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .build import Emulator, find_clang

__all__ = ["MULTIPROCESSORS", "Emulator", "Library", "find_clang", "library", "load"]

MULTIPROCESSORS = 4  # of the emulated GPU, unless a test asks for others


class Library:
    """A loaded library with the emulator in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        self.functions.fastconv_emulator_statistics.restype = ctypes.c_char_p

    @property
    def checks_plain_accesses(self) -> bool:
        """Whether the kernels' plain loads and stores are seen: clang built them."""
        return bool(self.functions.fastconv_emulator_checks_plain_accesses())

    def seed(self, seed: int) -> None:
        """Chooses the order in which threads and blocks run."""
        self.functions.fastconv_emulator_seed(ctypes.c_uint64(seed))

    def multiprocessors(self, count: int) -> None:
        """How many the heuristics find; `MULTIPROCESSORS` at first."""
        self.functions.fastconv_emulator_multiprocessors(count)

    def statistics(self) -> dict[str, Any]:
        """Counts since the last reset; "launches" by kernel."""
        return json.loads(self.functions.fastconv_emulator_statistics())

    def reset_statistics(self) -> None:
        self.functions.fastconv_emulator_reset_statistics()

    def launches(self) -> dict[str, int]:
        return self.statistics()["launches"]

    def kernel_table(self) -> list[dict[str, Any]]:
        table = self.functions.fastconv_cuda_kernel_table
        table.restype = ctypes.c_char_p
        return json.loads(table())

    @contextmanager
    def force_kernel(self, op: str, name: str) -> Iterator[None]:
        """Inside, `op` runs this kernel, whatever the heuristics would choose."""
        force = self.functions.fastconv_cuda_force_kernel
        if force(op.encode(), name.encode()):
            raise ValueError(f"{op} has no kernel {name}")
        try:
            yield
        finally:
            force(op.encode(), None)


@functools.cache
def load(name: str, clang: bool = True, ucontext: bool = False) -> Library:
    """A library of build.py, built at first use; without clang where there is none."""
    emulator = Emulator(find_clang() if clang else None, ucontext)
    return Library(emulator.build(name, quiet=True))


@functools.cache
def library() -> Library:
    """The ops of torch.ops.fastconv_emulated."""
    import torch

    loaded = load("fastconv_emulated")
    torch.ops.load_library(str(loaded.path))
    return loaded

"""The CUDA kernels on the CPU: build.py makes the libraries, this talks to them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .build import Emulator, find_clang

__all__ = ["Emulator", "Library", "find_clang", "library", "load"]


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
        """How many the emulated GPU has; 4 at first, so that small tensors fill them."""
        self.functions.fastconv_emulator_multiprocessors(count)

    def shared_per_block(self, size: int) -> None:
        """Bytes of shared memory that a block may have; 99 KiB at first, as compute capability 8.6 has it."""
        self.functions.fastconv_emulator_shared_per_block(size)

    def reset_device(self) -> None:
        """Makes the emulated GPU again what it was at first."""
        self.functions.fastconv_emulator_reset_device()

    def device(self, facts: Sequence[int]) -> None:
        """Makes the emulated GPU another: the fields of csrc/cuda/runtime/device_info.h, in their order."""
        *numbers, l2_bytes = facts
        self.functions.fastconv_emulator_device(*numbers, ctypes.c_int64(l2_bytes))

    @contextlib.contextmanager
    def planning(self) -> Iterator[list[dict[str, Any]]]:
        """Within the block launches are checked and noted but do not run, and tensors of any size are not touched.

        At its end the list has a dictionary for each launch: kernel, grid, threads, shared_bytes, and in `code` where
        the kernel lies in this library.
        """
        launches: list[dict[str, Any]] = []
        self.functions.fastconv_emulator_plan_only(1)
        try:
            yield launches
            launches += self._json("fastconv_emulator_planned")
        finally:
            self.functions.fastconv_emulator_plan_only(0)

    def statistics(self) -> dict[str, Any]:
        """Counts since the last reset; "launches" and "instructions" by kernel."""
        return json.loads(self.functions.fastconv_emulator_statistics())

    def reset_statistics(self) -> None:
        self.functions.fastconv_emulator_reset_statistics()

    def launches(self) -> dict[str, int]:
        return self.statistics()["launches"]

    # What fastconv.operators.kernels asks of a library

    def kernel_table(self) -> list[dict[str, Any]]:
        return self._json("fastconv_cuda_kernel_table")

    def force_kernel(self, op: str, name: str | None) -> int:
        return self.functions.fastconv_cuda_force_kernel(op.encode(), None if name is None else name.encode())

    def find_kernel(self, op: str, name: str) -> int:
        return self.functions.fastconv_cuda_find_kernel(op.encode(), name.encode())

    def prefer_kernels(self, kernels: Sequence[int]) -> None:
        self.functions.fastconv_cuda_prefer_kernels((ctypes.c_int * len(kernels))(*kernels), len(kernels))

    def end_preference(self) -> None:
        self.functions.fastconv_cuda_end_preference()

    def disable_kernels(self, names: Sequence[str]) -> None:
        encoded = [name.encode() for name in names]
        self.functions.fastconv_cuda_disable_kernels((ctypes.c_char_p * len(encoded))(*encoded), len(encoded))

    def conformance_cases(self) -> list[dict[str, Any]]:
        return self._json("fastconv_cuda_conformance_cases")

    def conformance_run(self, index: int, given: int, out: int, stream: int) -> None:
        case = self.conformance_cases()[index]
        functions = self.functions
        functions.fastconv_cuda_conformance_run.restype = ctypes.c_char_p
        for name, address, words in ((b"in", given, case["in_words"]), (b"out", out, case["out_words"])):
            writable = int(name == b"out")
            functions.fastconv_emulator_name_memory(
                name, ctypes.c_void_p(address), ctypes.c_uint64(4 * words), writable
            )
        try:
            said = functions.fastconv_cuda_conformance_run(
                index, ctypes.c_void_p(given), ctypes.c_void_p(out), ctypes.c_void_p(stream)
            )
        finally:
            functions.fastconv_emulator_forget_memory()
        if said:
            raise RuntimeError(said.decode())

    def record_choices(self, on: bool) -> None:
        self.functions.fastconv_cuda_record_choices(int(on))

    def take_choices(self) -> list[dict[str, Any]]:
        return self._json("fastconv_cuda_take_choices")

    def _json(self, name: str) -> Any:
        function = self.functions[name]
        function.restype = ctypes.c_char_p
        return json.loads(function())


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

"""The CUDA kernels: which there are, which was chosen for a call and why not the others, and how to force one.

>>> from fastconv.operators import kernels
>>> with kernels.choices() as made:
...     y = fastconv.ops.conv2d_relu(x, w, b, backend="cuda")
>>> print(made[0])
>>> with kernels.forced("conv2d_fprop", "conv2d_fprop_fp16_64x64_sm80"):
...     y = fastconv.ops.conv2d_relu(x, w, b, backend="cuda")

Both hold for the whole process, all threads included: they are for looking and for testing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from . import library


class Library(Protocol):
    """A library with CUDA kernels: fastconv._C, or another of the same source."""

    def kernel_table(self) -> list[dict[str, Any]]: ...
    def force_kernel(self, op: str, name: str | None) -> int: ...
    def record_choices(self, on: bool) -> None: ...
    def take_choices(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Candidate:
    """A kernel that was considered.

    Attributes:
        kernel: its name.
        reason: why it could not run the call, or should not although it could; "" if neither.
        score: an estimate of the share of the device that it would use, 0 to 1; the largest is chosen. Estimated from
            the shape of its grid, not measured.
    """

    kernel: str
    reason: str
    score: float


@dataclass(frozen=True)
class Choice:
    """What was considered for one launch.

    Attributes:
        op: whose kernels they are, as in `table`: of a convolution one pass.
        arch: of the device, 80 for compute capability 8.0.
        multiprocessors: of the device.
        chosen: the kernel that ran, "" if none did and others took over.
        candidates: all of the op's kernels.
    """

    op: str
    arch: int
    multiprocessors: int
    chosen: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = [f"{self.op} on sm_{self.arch} with {self.multiprocessors} multiprocessors: {self.chosen or 'none'}"]
        for candidate in self.candidates:
            mark = "*" if candidate.kernel == self.chosen else " "
            said = candidate.reason or f"score {candidate.score:.3g}"
            lines.append(f"{mark} {candidate.kernel}: {said}")
        return "\n".join(lines)


_libraries: dict[str, Library] = {}
_forced: dict[tuple[str, str], str] = {}  # by backend and op
_open: list[list[Choice]] = []  # the lists of the blocks in which choices are noted, the innermost last


def add(backend: str, found: Library) -> None:
    """Makes the kernels of a backend known."""
    _libraries[backend] = found


def table(backend: str = "cuda") -> list[dict[str, Any]]:
    """Every kernel: its name, op, arch, tile, stages, threads, shared_bytes, and what it needs of its tensors.

    Empty where the library was built without CUDA.
    """
    return _libraries[backend].kernel_table() if backend in _libraries else []


@contextlib.contextmanager
def forced(op: str, kernel: str, backend: str = "cuda") -> Iterator[None]:
    """Within the block, `op` runs this kernel or fails, where it runs one of its kernels; both names as in `table`.

    Raises:
        ValueError: the op has no such kernel to choose.
        RuntimeError: raised by the call inside whose tensors the kernel does not take; it says why.
    """
    if backend not in _libraries or _libraries[backend].force_kernel(op, kernel) != 0:
        known = [entry["name"] for entry in table(backend) if entry["op"] == op]
        raise ValueError(
            f"fastconv: got kernel {kernel!r} of {op!r}, needed one of {', '.join(known) or 'those in kernels.table()'}"
        )
    before = _forced.get((backend, op))
    _forced[backend, op] = kernel
    try:
        yield
    finally:
        _libraries[backend].force_kernel(op, before)
        if before is None:
            del _forced[backend, op]
        else:
            _forced[backend, op] = before


@contextlib.contextmanager
def choices() -> Iterator[list[Choice]]:
    """Within the block, choices among kernels are noted; the list is filled at its end, in order."""
    made: list[Choice] = []
    _collect()
    _open.append(made)
    for each in _libraries.values():
        each.record_choices(True)
    try:
        yield made
    finally:
        _collect()
        _open.pop()
        for each in _libraries.values():
            each.record_choices(bool(_open))


def _collect() -> None:
    """Gives what was noted since the last time to all blocks that are open."""
    for each in _libraries.values():
        for choice in each.take_choices():
            candidates = tuple(Candidate(**candidate) for candidate in choice.pop("candidates"))
            for made in _open:
                made.append(Choice(**choice, candidates=candidates))


if library.LOADED and library.has_cuda():
    from fastconv import _C

    add("cuda", _C)

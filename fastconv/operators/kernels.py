"""The CUDA kernels: which there are, which was chosen for a call and why not the others, how to force or prefer one.

>>> from fastconv.operators import kernels
>>> with kernels.choices() as made:
...     y = fastconv.ops.conv2d_relu(x, w, b, backend="cuda")
>>> print(made[0])
>>> with kernels.forced("conv2d_fprop", "conv2d_fprop_fp16_64x64_sm80"):
...     y = fastconv.ops.conv2d_relu(x, w, b, backend="cuda")

Both hold for the whole process, all threads included: they are for looking and for testing. `preferred` is for what was
measured: it holds for the thread alone, and gives way where a kernel cannot run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from . import library


class Library(Protocol):
    """A library with CUDA kernels: fastconv._C, or another of the same source."""

    def kernel_table(self) -> list[dict[str, Any]]: ...
    def force_kernel(self, op: str, name: str | None) -> int: ...
    def find_kernel(self, op: str, name: str) -> int: ...
    def prefer_kernels(self, kernels: Sequence[int]) -> None: ...
    def end_preference(self) -> None: ...
    def record_choices(self, on: bool) -> None: ...
    def take_choices(self) -> list[dict[str, Any]]: ...
    def disable_kernels(self, names: Sequence[str]) -> None: ...
    def conformance_cases(self) -> list[dict[str, Any]]: ...
    def conformance_run(self, index: int, given: int, out: int, stream: int) -> None: ...


@dataclass(frozen=True)
class Candidate:
    """A kernel that was considered.

    Attributes:
        kernel: its name.
        reason: why it could not run the call, or should not although it could; "" if neither.
        score: an estimate of the share of the device that it would use, 0 to 1; the largest is chosen. Estimated from
            the shape of its grid, not measured.
        blocks: of its grid; this and what follows is 0 where it cannot run the call.
        resident: blocks on a multiprocessor at once.
        fill: useful work by all work, where tiles reach beyond the edges of a matrix.
        waves: blocks by the places for blocks in all the waves that they take.
        splits: how many blocks share the depth of a tile.
        unproven: whether it is chosen only where `fastconv.qualify` found it right and faster, whatever its score.
    """

    kernel: str
    reason: str
    score: float = 0
    blocks: int = 0
    resident: int = 0
    fill: float = 0
    waves: float = 0
    splits: int = 0
    unproven: bool = False

    @property
    def outlook(self) -> str:
        """The numbers in words."""
        text = f"score {self.score:.3g}: {self.blocks} blocks, fill {self.fill:.2f}, waves {self.waves:.2f}"
        text += f", {self.splits} splits" if self.splits > 1 else ""
        return f"{text}; only where it is qualified" if self.unproven else text


@dataclass(frozen=True)
class Choice:
    """What was considered for one launch.

    Attributes:
        backend: whose library chose.
        op: whose kernels they are, as in `table`: of a convolution one pass.
        arch: of the device, 80 for compute capability 8.0.
        multiprocessors: of the device.
        chosen: the kernel that ran, "" if none did and others took over.
        candidates: all of the op's kernels.
    """

    backend: str
    op: str
    arch: int
    multiprocessors: int
    chosen: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = [f"{self.op} on sm_{self.arch} with {self.multiprocessors} multiprocessors: {self.chosen or 'none'}"]
        for candidate in self.candidates:
            mark = "*" if candidate.kernel == self.chosen else " "
            lines.append(f"{mark} {candidate.kernel}: {candidate.reason or candidate.outlook}")
        return "\n".join(lines)


_libraries: dict[str, Library] = {}
_forced: dict[tuple[str, str], str] = {}  # by backend and op
_disabled: tuple[str, ...] = ()
_open: list[list[Choice]] = []  # the lists of the blocks in which choices are noted, the innermost last


def add(backend: str, found: Library) -> None:
    """Makes the kernels of a backend known."""
    _libraries[backend] = found
    if _disabled:
        found.disable_kernels(_disabled)
    _preference.cache_clear()


def library_of(backend: str) -> Library | None:
    """The library with the backend's CUDA kernels; None where it has none."""
    return _libraries.get(backend)


def table(backend: str = "cuda") -> list[dict[str, Any]]:
    """Every kernel: its name, op, arch, tile, stages, threads, shared_bytes, what it needs of its tensors, and the
    instructions that it uses, by their names in csrc/cuda/runtime/instructions.h.

    Empty where the library was built without CUDA.
    """
    return _libraries[backend].kernel_table() if backend in _libraries else []


def disable(names: Iterable[str]) -> None:
    """Lets no call of this process run these kernels; replaces what was disabled before.

    For kernels whose instructions are known to be wrong on a GPU of this machine. A call that only such a kernel could
    run fails, as one that forces it does. Names that no kernel has are passed over.
    """
    global _disabled
    found = tuple(sorted(names))
    if found != _disabled:
        _disabled = found
        for each in _libraries.values():
            each.disable_kernels(found)


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


class _Preference:
    def __init__(self, library: Library, kernels: tuple[int, ...]) -> None:
        self._library, self._kernels = library, kernels

    def __enter__(self) -> None:
        self._library.prefer_kernels(self._kernels)

    def __exit__(self, *exception: object) -> None:
        self._library.end_preference()


@functools.lru_cache(maxsize=4096)
def _preference(backend: str, names: tuple[tuple[str, str], ...]) -> _Preference:
    """Finding kernels by their names takes longer than all the rest."""
    library = _libraries[backend]
    return _Preference(library, tuple(library.find_kernel(op, kernel) for op, kernel in names))


def preferred(names: Mapping[str, str], backend: str = "cuda") -> contextlib.AbstractContextManager[None]:
    """Within the block, calls that this thread makes run these kernels, by op, where they can; names as in `table`.

    Where a kernel cannot run the call the choice is free, as without the block; so it is where the op has no kernel of
    that name, as a table of measurements may be older than the library. What is forced goes before what is preferred.
    Of blocks within blocks the innermost counts, op by op. What is returned can be entered any number of times, by
    several threads at once. autograd runs the backward of CUDA tensors on a thread of its own, which prefers nothing:
    there the block belongs around the call of the backward operator.

    Raises:
        ValueError: the backend has no CUDA kernels.
    """
    if backend not in _libraries:
        raise ValueError(
            f"fastconv: got backend {backend!r}, needed one with CUDA kernels "
            f"({', '.join(_libraries) or 'this build has none'})"
        )
    return _preference(backend, tuple(names.items()))


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
    for backend, each in _libraries.items():
        for choice in each.take_choices():
            candidates = tuple(Candidate(**candidate) for candidate in choice.pop("candidates"))
            for made in _open:
                made.append(Choice(backend, **choice, candidates=candidates))


if library.LOADED and library.has_cuda():
    from fastconv import _C

    add("cuda", _C)

"""Tables of measured times on disk, and what may happen to them there."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastconv.operators.table_files import export
from fastconv.operators.tables import Candidate, Entry, Table

HERE = {"device": "NVIDIA Test ü", "torch": "2.14.1"}
OLDER = {**HERE, "torch": "2.13.0"}
RIGHT = Candidate("cuda", {"conv2d_fprop": "conv2d_fprop_fp16_64x64_sm80"}, outcome="ok", seconds=(1e-5, 9e-6, 2e-5))
LOSES_NAN = Candidate("triton", outcome="refused", reason="loses NaN", keeps_nan=False)
CPU = torch.device("cpu")


def entry(size: int = 1, *candidates: Candidate, complete: bool = True) -> Entry:
    return Entry("conv2d_relu", "float16 3x3, größer", (size,), candidates or (RIGHT,), complete=complete)


def table(*entries: Entry, made: dict[str, str] = HERE) -> Table:
    return Table(made, entries={one.key: one for one in entries})


class Messages:
    """What the package warned of, each time that it did."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self._caught = caught

    def __iter__(self) -> Iterator[str]:
        return (str(one.message) for one in self._caught if str(one.message).startswith("fastconv: "))


# ------------------------------------------------------------------------------------- damaged files


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def unreadable(path: Path) -> None:
    """For root, too: the memory of this process begins with an address that nothing is at."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def huge(path: Path) -> None:
    """Sparse, and else what was there."""
    os.truncate(path, 65 * 2**20)


def with_text(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_text("utf-8")).encode())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "cut short": (lambda path: os.truncate(path, path.stat().st_size // 2), "not JSON"),
    "a byte less": (lambda path: os.truncate(path, path.stat().st_size - 2), "not JSON"),
    "no JSON": (lambda path: path.write_text("fastconv"), "not JSON"),
    "bytes": (lambda path: path.write_bytes(bytes(range(256))), "not JSON"),
    "another encoding": (lambda path: path.write_text(path.read_text("utf-8"), "utf-16"), "not JSON"),
    "deep": (lambda path: path.write_text("[" * 10**6), "not JSON"),
    "a long number": (lambda path: path.write_text("1" * 10**5), "is not used: "),
    "NaN": (with_text(lambda text: text.replace("1e-05", "NaN")), "NaN is no number"),
    "infinity": (with_text(lambda text: text.replace("1e-05", "-Infinity")), "-Infinity is no number"),
    "overflow": (with_text(lambda text: text.replace("1e-05", "1e999")), "entries[0].candidates[0].seconds[0] inf"),
    "types": (with_text(lambda text: text.replace('"ok"', "7")), "entries[0].candidates[0].outcome 7"),
    "of another device": (
        lambda path: export(table(entry(), made={**HERE, "device": "NVIDIA Other"}), path),
        "device NVIDIA Other (here NVIDIA Test ü)",
    ),
    "of other versions": (lambda path: export(table(entry(), made=OLDER), path), "torch 2.13.0 (here 2.14.1)"),
    "huge": (huge, f"{65 * 2**20} bytes"),
    "a directory": (directory, "not a file"),
    "a pipe": (pipe, "not a file"),
    "unreadable": (unreadable, os.strerror(errno.EIO)),
}

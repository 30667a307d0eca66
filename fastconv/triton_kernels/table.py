"""Block sizes of every kernel, by shape class.

A shape class says what kind of filter (pointwise, spatial; ragged: a number of channels that 16-byte loads cannot
take, like the 3 of an image), how many columns a tile has work for (narrow: up to
32 channels, medium: 64, wide), which operands ("16bit", "tf32", "ieee": float32 as torch's switches have it), or in
which direction the tensors lie (pixels, channels). The batch size is no part of it: a new batch size never compiles or
tunes anything.

The entries below were chosen by reasoning and by what the compiler reports (no spills, at most 99 KiB of shared memory,
so that they also fit the smaller cards of each generation); they were not measured on a GPU yet. `python -m fastconv
tune` measures on yours and writes a table of your own, which is read once, before the first launch. It has a section
for every GPU, each with the versions that it was measured with: others compile other kernels.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from ..version import __version__
from .launch import guarded

Config = dict[str, int]
Table = dict[str, dict[str, Config]]


def _gemm(m: int, n: int, k: int, warps: int, stages: int, **more: int) -> Config:
    """A tile of m x n sums that advances k terms a step."""
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, **more, "num_warps": warps, "num_stages": stages}


def _tile(m: int, n: int, warps: int) -> Config:
    """A tile of m pixels x n channels of a kernel without a matrix product."""
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": 2}


# Tiles of rows that run through all columns before the next ones start, see _device.grouped_tile.
_GROUP = {"GROUP": 8}

SHIPPED: Table = {
    # rows: output pixels; columns: output channels; terms: input channels of one tap (stems: all taps')
    "conv2d_fprop": {
        "16bit pointwise narrow": _gemm(128, 32, 64, 4, 3, **_GROUP),
        "16bit pointwise medium": _gemm(128, 64, 64, 4, 3, **_GROUP),
        "16bit pointwise wide": _gemm(128, 128, 64, 8, 3, **_GROUP),
        "16bit spatial narrow": _gemm(128, 32, 64, 4, 3, **_GROUP),
        "16bit spatial medium": _gemm(128, 64, 64, 4, 3, **_GROUP),
        "16bit spatial wide": _gemm(64, 128, 64, 4, 3, **_GROUP),
        "16bit ragged narrow": _gemm(128, 32, 32, 4, 2, **_GROUP),
        "16bit ragged medium": _gemm(64, 64, 32, 4, 2, **_GROUP),
        "16bit ragged wide": _gemm(64, 64, 32, 4, 2, **_GROUP),
        "tf32 pointwise narrow": _gemm(128, 32, 32, 4, 3, **_GROUP),
        "tf32 pointwise medium": _gemm(128, 64, 32, 4, 3, **_GROUP),
        "tf32 pointwise wide": _gemm(128, 128, 32, 8, 3, **_GROUP),
        "tf32 spatial narrow": _gemm(128, 32, 32, 4, 3, **_GROUP),
        "tf32 spatial medium": _gemm(128, 64, 32, 4, 3, **_GROUP),
        "tf32 spatial wide": _gemm(128, 64, 32, 4, 3, **_GROUP),
        "tf32 ragged narrow": _gemm(64, 32, 32, 4, 2, **_GROUP),
        "tf32 ragged medium": _gemm(64, 64, 32, 4, 2, **_GROUP),
        "tf32 ragged wide": _gemm(64, 64, 32, 4, 2, **_GROUP),
        # sums of true float32 products live in registers, one thread's worth at a time
        "ieee pointwise narrow": _gemm(64, 32, 16, 4, 2, **_GROUP),
        "ieee pointwise medium": _gemm(64, 64, 16, 4, 2, **_GROUP),
        "ieee pointwise wide": _gemm(64, 64, 16, 4, 2, **_GROUP),
        "ieee spatial narrow": _gemm(64, 32, 16, 4, 2, **_GROUP),
        "ieee spatial medium": _gemm(64, 64, 16, 4, 2, **_GROUP),
        "ieee spatial wide": _gemm(64, 64, 16, 4, 2, **_GROUP),
        "ieee ragged narrow": _gemm(64, 32, 16, 4, 2, **_GROUP),
        "ieee ragged medium": _gemm(64, 64, 16, 4, 2, **_GROUP),
        "ieee ragged wide": _gemm(64, 64, 16, 4, 2, **_GROUP),
    },
    # rows: input pixels; columns: input channels; terms: output channels of one tap
    "conv2d_dgrad": {
        "16bit pointwise narrow": _gemm(128, 32, 64, 4, 3, **_GROUP),
        "16bit pointwise medium": _gemm(128, 64, 64, 4, 3, **_GROUP),
        "16bit pointwise wide": _gemm(128, 128, 64, 8, 3, **_GROUP),
        "16bit spatial narrow": _gemm(128, 32, 64, 4, 3, **_GROUP),
        "16bit spatial medium": _gemm(128, 64, 64, 4, 3, **_GROUP),
        "16bit spatial wide": _gemm(64, 128, 64, 4, 3, **_GROUP),
        "tf32 pointwise narrow": _gemm(128, 32, 32, 4, 3, **_GROUP),
        "tf32 pointwise medium": _gemm(128, 64, 32, 4, 3, **_GROUP),
        "tf32 pointwise wide": _gemm(128, 64, 32, 4, 3, **_GROUP),
        "tf32 spatial narrow": _gemm(128, 32, 32, 4, 3, **_GROUP),
        "tf32 spatial medium": _gemm(128, 64, 32, 4, 3, **_GROUP),
        "tf32 spatial wide": _gemm(128, 64, 32, 4, 3, **_GROUP),
        "ieee pointwise narrow": _gemm(64, 32, 16, 4, 2, **_GROUP),
        "ieee pointwise medium": _gemm(64, 32, 16, 4, 2, **_GROUP),
        "ieee pointwise wide": _gemm(64, 32, 16, 4, 2, **_GROUP),
        "ieee spatial narrow": _gemm(64, 32, 16, 4, 2, **_GROUP),
        "ieee spatial medium": _gemm(64, 64, 16, 4, 2, **_GROUP),
        "ieee spatial wide": _gemm(64, 64, 16, 4, 2, **_GROUP),
    },
    # rows: output channels; columns: input channels at one tap (stems: of all taps); terms: pixels. The width is K's.
    "conv2d_wgrad": {
        "16bit dense narrow": _gemm(32, 64, 64, 4, 3),
        "16bit dense medium": _gemm(64, 64, 64, 4, 3),
        "16bit dense wide": _gemm(128, 64, 64, 4, 3),
        "16bit ragged narrow": _gemm(32, 64, 32, 4, 2),
        "16bit ragged medium": _gemm(64, 64, 32, 4, 2),
        "16bit ragged wide": _gemm(128, 32, 32, 4, 2),
        "tf32 dense narrow": _gemm(32, 64, 32, 4, 3),
        "tf32 dense medium": _gemm(64, 64, 32, 4, 3),
        "tf32 dense wide": _gemm(64, 64, 32, 4, 3),
        "tf32 ragged narrow": _gemm(32, 64, 32, 4, 2),
        "tf32 ragged medium": _gemm(64, 64, 32, 4, 2),
        "tf32 ragged wide": _gemm(64, 64, 32, 4, 2),
        "ieee dense narrow": _gemm(32, 32, 16, 4, 2),
        "ieee dense medium": _gemm(64, 64, 16, 4, 2),
        "ieee dense wide": _gemm(64, 64, 16, 4, 2),
        "ieee ragged narrow": _gemm(32, 64, 16, 4, 2),
        "ieee ragged medium": _gemm(64, 64, 16, 4, 2),
        "ieee ragged wide": _gemm(64, 64, 16, 4, 2),
    },
    # as conv2d_fprop's pointwise; a tile never straddles two branches, so tiles are no wider than branches are
    "pointwise_group": {
        "16bit narrow": _gemm(128, 32, 64, 4, 3),
        "16bit medium": _gemm(64, 64, 64, 4, 3),
        "16bit wide": _gemm(64, 64, 64, 4, 3),
        "tf32 narrow": _gemm(128, 32, 32, 4, 3),
        "tf32 medium": _gemm(64, 64, 32, 4, 3),
        "tf32 wide": _gemm(64, 64, 32, 4, 3),
        "ieee narrow": _gemm(64, 32, 16, 4, 2),
        "ieee medium": _gemm(64, 64, 16, 4, 2),
        "ieee wide": _gemm(64, 64, 16, 4, 2),
    },
    # columns: output channels, as many as registers allow: the depthwise part is computed once for each tile of them
    "depthwise_separable_fprop": {
        "16bit narrow": _gemm(64, 32, 32, 4, 2),
        "16bit medium": _gemm(64, 64, 32, 8, 2),
        "16bit wide": _gemm(64, 128, 32, 8, 2),
        "tf32 narrow": _gemm(64, 32, 32, 4, 2),
        "tf32 medium": _gemm(64, 64, 32, 8, 2),
        "tf32 wide": _gemm(64, 64, 32, 8, 2),
        "ieee narrow": _gemm(64, 32, 16, 4, 2),
        "ieee medium": _gemm(64, 64, 16, 4, 2),
        "ieee wide": _gemm(64, 64, 16, 4, 2),
    },
    "depthwise_fprop": {"pixels": _tile(128, 4, 4), "channels": _tile(16, 64, 4)},
    "depthwise_dgrad": {"pixels": _tile(256, 4, 4), "channels": _tile(16, 64, 4)},
    "depthwise_wgrad": {"pixels": _tile(256, 4, 4), "channels": _tile(32, 64, 4)},
    "mask_and_sum": {"pixels": _tile(256, 4, 4), "channels": _tile(32, 64, 4)},
    "sum_parts": {"any": {"BLOCK": 256, "num_warps": 4, "num_stages": 2}},
    # a tile holds all channels of its pixels where they fit; BLOCK_N is the least number of channels where they do not
    "local_response_norm": {
        "pixels": {"ELEMENTS": 2048, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
        "channels": {"ELEMENTS": 2048, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
    },
    "add_relu": {"any": {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}},
}


def problem(kernel: str, name: str, config: Any) -> str | None:
    """What is wrong with an entry that did not come from here; None if nothing is."""
    entry = f"the entry '{kernel}', '{name}'"
    shipped = SHIPPED.get(kernel, {}).get(name)
    if shipped is None:
        return f"{entry} is unknown"
    if not isinstance(config, dict) or config.keys() != shipped.keys():
        return f"{entry} is {config}, needed one with {', '.join(shipped)}"
    for key, value in config.items():
        if key == "num_stages":
            fits, needed = value in range(1, 9), "1 to 8"
        elif key == "num_warps":
            fits, needed = value in (1, 2, 4, 8, 16), "1, 2, 4, 8 or 16"
        else:
            # a matrix product has at least 16 in each direction
            least = 16 if key.startswith("BLOCK") and "BLOCK_K" in shipped else 1
            fits = value in [2**i for i in range(13)] and value >= least
            needed = f"a power of two from {least} to 4096"
        if type(value) is not int or not fits:
            return f"{entry} has {key} = {value!r}, needed {needed}"
    return None


# -------------------------------------------------------------------------------- the user's own

FORMAT = "fastconv Triton table 1"


def user_path() -> Path:
    """Where `python -m fastconv tune` writes: FASTCONV_TRITON_TABLE, or a file in the user's cache folder."""
    named = os.environ.get("FASTCONV_TRITON_TABLE")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "fastconv" / "triton_table.json"


def device_name() -> str:
    """The GPU whose section counts; "" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def versions() -> dict[str, str]:
    """What a section has to be measured with to count."""
    return {"fastconv": __version__, "triton": triton.__version__}


def _load(path: Path) -> dict[str, Any]:
    """The sections of a file, by GPU; none without a file. ValueError where `tune` did not write it."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("gpus"), dict):
        raise ValueError(f"not a file with the format '{FORMAT}'")
    return content["gpus"]


def _section_problem(section: Any) -> str | None:
    """Why a GPU's section does not count; None if it does."""
    if not isinstance(section, dict) or not isinstance(section.get("entries"), dict) or "fatal" not in section:
        return "its section for this GPU lacks entries"
    if section.get("versions") != versions():
        return f"measured with {section.get('versions')}, this is {versions()}"
    for kernel, rows in section["entries"].items():
        if not isinstance(rows, dict):
            return f"'{kernel}' has no entries"
        for name, config in rows.items():
            if (found := problem(kernel, name, config)) is not None:
                return found
    return None


def user_entries() -> Table:
    """What was measured on this GPU; where the file cannot serve, a warning and nothing."""
    gpu, path = device_name(), user_path()
    if not gpu:
        return {}
    try:
        section = _load(path).get(gpu)
        found = None if section is None else _section_problem(section)
    except (OSError, ValueError) as error:
        section, found = None, str(error)
    if found is not None:
        warnings.warn(
            f"fastconv: {path} is not used, the shipped block sizes are: {found}; remove the file, or run "
            "`python -m fastconv tune` once more",
            stacklevel=2,
        )
        return {}
    return {} if section is None else section["entries"]


class Measured:
    """This GPU's section of the user's table while `python -m fastconv tune` fills it.

    Whatever is added is saved at once. A section that does not count (any more) starts anew; other GPUs' are kept.
    """

    def __init__(self, path: Path) -> None:
        """OSError or ValueError where `path` cannot be written, or holds something else, which is left as it is."""
        self.path = path
        self._section: dict[str, Any] = _load(path).get(device_name(), {})
        if _section_problem(self._section) is not None:
            self._section = {"versions": versions(), "entries": {}, "fatal": []}
        self._save()

    def has(self, kernel: str, name: str) -> bool:
        return name in self._section["entries"].get(kernel, {})

    def add(self, kernel: str, name: str, config: Config) -> None:
        self._section["entries"].setdefault(kernel, {})[name] = config
        self._save()

    def add_fatal(self, kernel: str, name: str, config: Config) -> None:
        """Remembers what ended the run: it would end the next one, too."""
        self._section["fatal"].append([kernel, name, config])
        self._save()

    def is_fatal(self, kernel: str, name: str, config: Config) -> bool:
        return [kernel, name, config] in self._section["fatal"]

    def _save(self) -> None:
        """In one step: whoever reads finds the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "gpus": {**_load(self.path), device_name(): self._section}}
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            part.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------- the choice


@functools.cache
def _chosen() -> Table:
    """The shipped table with the user's entries in their places."""
    found = {kernel: dict(rows) for kernel, rows in SHIPPED.items()}
    for kernel, rows in user_entries().items():
        found[kernel].update(rows)
    return found


def forget() -> None:
    """Has the user's file read again at the next choice: it, or the GPU, is another one now."""
    _chosen.cache_clear()


@contextlib.contextmanager
def trial(kernel: str, name: str, config: Config) -> Iterator[None]:
    """Inside, every launch of this process takes `config` for the entry."""
    rows = _chosen()[kernel]
    before, rows[name] = rows[name], config
    try:
        yield
    finally:
        rows[name] = before


def config(kernel: str, *classes: str, filter: tuple[int, int] = (1, 1)) -> Config:
    """The entry of a kernel for a shape class, with the guard for filters larger than 1x1."""
    return guarded(_chosen()[kernel][" ".join(classes)], filter[0] * filter[1])

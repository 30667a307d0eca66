"""Block sizes of every kernel, by shape class.

A shape class says what kind of filter (pointwise, spatial; ragged: a number of channels that 16-byte loads cannot
take, like the 3 of an image), how many columns a tile has work for (narrow: up to
32 channels, medium: 64, wide), which operands ("16bit", "tf32", "ieee": float32 as torch's switches have it), or in
which direction the tensors lie (pixels, channels). The batch size is no part of it: a new batch size never compiles or
tunes anything.

The entries below were chosen by reasoning and by what the compiler reports (no spills, at most 99 KiB of shared memory,
so that they also fit the smaller cards of each generation); they were not measured on a GPU yet. `python -m fastconv
tune` measures on yours and writes a table of your own, which is read once, before the first launch.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

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


def user_path() -> Path:
    """Where `python -m fastconv tune` writes: FASTCONV_TRITON_TABLE, or a file in the user's cache folder."""
    named = os.environ.get("FASTCONV_TRITON_TABLE")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastconv" / "triton_table.json"


def write(entries: Table, facts: dict[str, Any], path: Path) -> None:
    """Writes a user table, with the facts of what it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"measured_on": facts, "entries": entries}, indent=1) + "\n")


def device_name() -> str:
    """The GPU that a user table has to be measured on to count; "" without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@functools.cache
def user_entries() -> Table:
    """The user's table; empty where there is none, or it was measured on another GPU."""
    path = user_path()
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        entries, measured_on = content["entries"], content["measured_on"]["gpu"]
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"fastconv: {path} is not a table that `python -m fastconv tune` wrote ({error!r}); remove it"
        ) from error
    if measured_on != device_name():
        return {}
    known = {kernel: {name: set(config) for name, config in rows.items()} for kernel, rows in SHIPPED.items()}
    for kernel, rows in entries.items():
        for name, config in rows.items():
            if set(config) != known.get(kernel, {}).get(name):
                raise RuntimeError(f"fastconv: {path} has an unknown entry '{kernel}', '{name}'; remove the file")
    return entries


@functools.cache
def _find(kernel: str, name: str) -> Config:
    return user_entries().get(kernel, {}).get(name) or SHIPPED[kernel][name]


def config(kernel: str, *classes: str, filter: tuple[int, int] = (1, 1)) -> Config:
    """The entry of a kernel for a shape class, with the guard for filters larger than 1x1."""
    from ._launch import guarded

    return guarded(_find(kernel, " ".join(classes)), filter[0] * filter[1])

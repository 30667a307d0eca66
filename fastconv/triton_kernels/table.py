"""Block sizes of every kernel, by shape class.

A shape class says what kind of filter (pointwise, spatial; ragged: a number of channels that 16-byte loads cannot
take, like the 3 of an image), how many columns a tile has work for (narrow: up to
32 channels, medium: 64, wide), which operands ("16bit", "tf32", "ieee": float32 as torch's switches have it), or in
which direction the tensors lie (pixels, channels). The batch size is no part of it: a new batch size never compiles or
tunes anything.

The entries below were chosen by reasoning and by what the compiler reports (no spills, at most 99 KiB of shared memory,
so that they also fit the smaller cards of each generation); they were not measured on a GPU yet. `preferred` puts
others in their places, for one call: variants of the backend, which `python -m fastconv qualify --search` measures.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from .launch import guarded, listening

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


_STAGES, _WARPS = frozenset(range(1, 9)), frozenset((1, 2, 4, 8, 16))
_SIZES = frozenset(2**i for i in range(13))
# a matrix product has at least 16 in each direction
_MATRIX_SIZES = frozenset(size for size in _SIZES if size >= 16)


def problem(kernel: str, name: str, config: Any) -> str | None:
    """What is wrong with an entry that did not come from here; None if nothing is."""
    shipped = SHIPPED.get(kernel, {}).get(name)
    if shipped is None:
        return f"the entry '{kernel}', '{name}' is unknown"
    if not isinstance(config, dict) or config.keys() != shipped.keys():
        return f"the entry '{kernel}', '{name}' is {config}, needed one with {', '.join(shipped)}"
    for key, value in config.items():
        if key == "num_stages":
            fitting, needed = _STAGES, "1 to 8"
        elif key == "num_warps":
            fitting, needed = _WARPS, "1, 2, 4, 8 or 16"
        elif key.startswith("BLOCK") and "BLOCK_K" in shipped:
            fitting, needed = _MATRIX_SIZES, "a power of two from 16 to 4096"
        else:
            fitting, needed = _SIZES, "a power of two from 1 to 4096"
        if type(value) is not int or value not in fitting:
            return f"the entry '{kernel}', '{name}' has {key} = {value!r}, needed {needed}"
    return None


# ------------------------------------------------------------------------------------- the choice


class Asked(NamedTuple):
    """What a launcher asked for.

    Attributes:
        entry: its kernel and its shape class in one, "conv2d_fprop 16bit spatial wide".
        taps: of the filter, see `guarded`.
        config: what it was given.
    """

    entry: str
    taps: int
    config: Config


class _Preferred(threading.local):
    """Of a thread: what counts in each of the blocks that are open, the innermost last."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Config]] = [{}]


_preferred = _Preferred()
_asked: list[list[Asked]] = []


class _Preference:
    def __init__(self, configs: dict[str, Config]) -> None:
        self._configs = configs

    def __enter__(self) -> None:
        _preferred.blocks.append({**_preferred.blocks[-1], **self._configs})

    def __exit__(self, *exception: object) -> None:
        _preferred.blocks.pop()


def preferred(configs: Mapping[str, Config]) -> contextlib.AbstractContextManager[None]:
    """Within the block this thread's launches take these entries in place of the shipped ones, by `Asked.entry`.

    One that may not stand in the table (see `problem`) is passed over: whoever wrote it may have known another one.
    Of blocks within blocks the innermost counts, entry by entry. What is returned can be entered any number of times,
    by several threads at once: keeping it saves looking at the entries again.
    """
    return _Preference(
        {entry: dict(config) for entry, config in configs.items() if problem(*split_entry(entry), config) is None}
    )


def noted() -> contextlib.AbstractContextManager[list[Asked]]:
    """Yields a list of what launchers ask for within the block, on any thread: what there is to vary in a call."""
    return listening(_asked)


def split_entry(entry: str) -> tuple[str, str]:
    """The kernel and the shape class of an `Asked.entry`."""
    kernel, _, name = entry.partition(" ")
    return kernel, name


def config(kernel: str, *classes: str, filter: tuple[int, int] = (1, 1)) -> Config:
    """The entry of a kernel for a shape class, with the guard for filters larger than 1x1."""
    name, taps = " ".join(classes), filter[0] * filter[1]
    entry = f"{kernel} {name}"
    found = guarded(_preferred.blocks[-1].get(entry) or SHIPPED[kernel][name], taps)
    for each in _asked:
        each.append(Asked(entry, taps, found))
    return found

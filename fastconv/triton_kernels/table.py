"""Block sizes of every kernel, by shape class.

A shape class says what kind of filter (pointwise, spatial; thin: vectors of 8 bytes, as 3 or 20 channels have), how
many columns a tile has work for (narrow: up to 32 channels, medium: 64, wide), which operands ("16bit", "tf32", "ieee":
float32 as torch's switches have it), or in which direction the tensors lie (pixels, channels). The batch size is no
part of it: a new batch size never compiles or tunes anything. Too small a grid splits its depth, see `_split`.

`SHIPPED` is for every card: at most the 99 KiB of shared memory that the smaller ones of each generation have. `LARGE`
has what the data-centre cards from Hopper on have room for, and their wgmma and TMA ("BOXES").

The entries were chosen by reasoning and by what the compiler reports (tools/triton_code.py); they were not measured on
a GPU yet. `preferred` puts others in their places, for one call: variants of the backend, which `python -m fastconv
qualify --search` measures.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton

from . import launch
from .launch import listening
from .operands import VECTOR_BYTES

Config = dict[str, int]
Table = dict[str, dict[str, Config]]


def _gemm(m: int, n: int, k: int, warps: int, stages: int, **more: int) -> Config:
    """A tile of m x n sums that advances k terms a step."""
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, **more, "num_warps": warps, "num_stages": stages}


def _tile(m: int, n: int, warps: int) -> Config:
    """A tile of m pixels x n channels of a kernel without a matrix product."""
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": 2}


def _matrices(*rows: tuple[str, Config]) -> dict[str, Config]:
    """Entries by their names; "a|b" in a name is one entry for each of them."""
    return {
        " ".join(name): config
        for names, config in rows
        for name in itertools.product(*(word.split("|") for word in names.split()))
    }


# GROUP: tiles of rows that run through all columns before the next ones start, see device.grouped_tile. BOXES: whether
# the TMA brings operands of a dense 1x1 convolution.
_SPATIAL = {"GROUP": 8}
_POINTWISE = {"GROUP": 8, "BOXES": 0}
_BOXES = {"GROUP": 8, "BOXES": 1}

SHIPPED: Table = {
    # rows: output pixels; columns: output channels; terms: input channels of the taps
    "conv2d_fprop": _matrices(
        ("16bit pointwise narrow", _gemm(128, 32, 64, 4, 3, **_POINTWISE)),
        ("16bit pointwise medium", _gemm(128, 64, 64, 4, 3, **_POINTWISE)),
        ("16bit pointwise wide", _gemm(128, 128, 64, 8, 3, **_POINTWISE)),
        ("16bit spatial|thin narrow", _gemm(128, 32, 64, 4, 3, **_SPATIAL)),
        ("16bit spatial|thin medium|wide", _gemm(128, 64, 64, 4, 3, **_SPATIAL)),
        ("tf32 pointwise narrow", _gemm(128, 32, 32, 4, 3, **_POINTWISE)),
        ("tf32 pointwise medium", _gemm(128, 64, 32, 4, 3, **_POINTWISE)),
        ("tf32 pointwise wide", _gemm(128, 128, 32, 8, 3, **_POINTWISE)),
        ("tf32 spatial|thin narrow", _gemm(128, 32, 32, 4, 3, **_SPATIAL)),
        ("tf32 spatial|thin medium|wide", _gemm(128, 64, 32, 4, 3, **_SPATIAL)),
        # sums of true float32 products live in registers, one thread's worth at a time
        ("ieee pointwise narrow", _gemm(64, 32, 16, 4, 2, **_POINTWISE)),
        ("ieee pointwise medium|wide", _gemm(64, 64, 16, 4, 2, **_POINTWISE)),
        ("ieee spatial|thin narrow", _gemm(64, 32, 16, 4, 2, **_SPATIAL)),
        ("ieee spatial|thin medium|wide", _gemm(64, 64, 16, 4, 2, **_SPATIAL)),
    ),
    # rows: input pixels; columns: input channels; terms: output channels of the taps
    "conv2d_dgrad": _matrices(
        ("16bit pointwise narrow", _gemm(128, 32, 64, 4, 3, **_POINTWISE)),
        ("16bit pointwise medium", _gemm(128, 64, 64, 4, 3, **_POINTWISE)),
        ("16bit pointwise wide", _gemm(128, 128, 64, 8, 3, **_POINTWISE)),
        ("16bit spatial|thin narrow", _gemm(128, 32, 64, 4, 3, **_SPATIAL)),
        ("16bit spatial|thin medium|wide", _gemm(128, 64, 64, 4, 3, **_SPATIAL)),
        ("tf32 pointwise narrow", _gemm(128, 32, 32, 4, 3, **_POINTWISE)),
        ("tf32 pointwise medium|wide", _gemm(128, 64, 32, 4, 3, **_POINTWISE)),
        ("tf32 spatial|thin narrow", _gemm(128, 32, 32, 4, 3, **_SPATIAL)),
        ("tf32 spatial|thin medium|wide", _gemm(128, 64, 32, 4, 3, **_SPATIAL)),
        ("ieee pointwise narrow|medium|wide", _gemm(64, 32, 16, 4, 2, **_POINTWISE)),
        ("ieee spatial|thin narrow", _gemm(64, 32, 16, 4, 2, **_SPATIAL)),
        ("ieee spatial|thin medium|wide", _gemm(64, 64, 16, 4, 2, **_SPATIAL)),
    ),
    # rows: output channels; columns: input channels of the taps; terms: pixels. The width is K's.
    "conv2d_wgrad": _matrices(
        ("16bit pointwise narrow", _gemm(32, 64, 64, 4, 3, BOXES=0)),
        ("16bit pointwise medium", _gemm(64, 64, 64, 4, 3, BOXES=0)),
        ("16bit pointwise wide", _gemm(128, 128, 64, 8, 3, BOXES=0)),
        ("16bit spatial|thin narrow", _gemm(32, 64, 64, 4, 3)),
        ("16bit spatial|thin medium", _gemm(64, 64, 64, 4, 3)),
        ("16bit spatial wide", _gemm(128, 128, 64, 4, 3)),
        ("16bit thin wide", _gemm(128, 64, 64, 4, 3)),
        ("tf32 pointwise narrow", _gemm(32, 64, 32, 4, 3, BOXES=0)),
        ("tf32 pointwise medium|wide", _gemm(64, 64, 32, 4, 3, BOXES=0)),
        ("tf32 spatial|thin narrow", _gemm(32, 64, 32, 4, 3)),
        ("tf32 spatial|thin medium|wide", _gemm(64, 64, 32, 4, 3)),
        ("ieee pointwise narrow", _gemm(32, 32, 16, 4, 2, BOXES=0)),
        ("ieee pointwise medium|wide", _gemm(64, 64, 16, 4, 2, BOXES=0)),
        ("ieee spatial|thin narrow", _gemm(32, 32, 16, 4, 2)),
        ("ieee spatial|thin medium|wide", _gemm(64, 64, 16, 4, 2)),
    ),
    # as conv2d_fprop's pointwise; a tile never straddles two branches, so tiles are no wider than branches are
    "pointwise_group": _matrices(
        ("16bit narrow", _gemm(128, 32, 64, 4, 3)),
        ("16bit medium|wide", _gemm(64, 64, 64, 4, 3)),
        ("tf32 narrow", _gemm(128, 32, 32, 4, 3)),
        ("tf32 medium|wide", _gemm(64, 64, 32, 4, 3)),
        ("ieee narrow", _gemm(64, 32, 16, 4, 2)),
        ("ieee medium|wide", _gemm(64, 64, 16, 4, 2)),
    ),
    "finish_parts": {"pixels": _tile(64, 16, 4), "channels": _tile(16, 64, 4)},
    # columns: output channels, as many as registers allow: the depthwise part is computed once for each tile of them
    "depthwise_separable_fprop": _matrices(
        ("16bit narrow", _gemm(64, 32, 64, 4, 1)),
        ("16bit medium", _gemm(64, 64, 64, 4, 1)),
        ("16bit wide", _gemm(64, 128, 64, 4, 1)),
        ("tf32 narrow", _gemm(64, 32, 32, 4, 1)),
        ("tf32 medium", _gemm(64, 64, 32, 4, 1)),
        ("tf32 wide", _gemm(64, 128, 32, 4, 1)),
        ("ieee narrow", _gemm(64, 32, 32, 4, 1)),
        ("ieee medium|wide", _gemm(64, 64, 32, 4, 1)),
    ),
    # lanes, each with a patch of BLOCK_H x BLOCK_W pixels (in one channel, or in a vector of channels)
    "depthwise_fprop": {
        "pixels": {"BLOCK": 128, "BLOCK_H": 4, "BLOCK_W": 8, "num_warps": 4, "num_stages": 2},
        "channels": {"BLOCK": 128, "BLOCK_H": 2, "BLOCK_W": 4, "num_warps": 4, "num_stages": 2},
    },
    "depthwise_dgrad": {
        "pixels": {"BLOCK": 128, "BLOCK_H": 4, "BLOCK_W": 8, "num_warps": 4, "num_stages": 2},
        "channels": {"BLOCK": 128, "BLOCK_H": 2, "BLOCK_W": 4, "num_warps": 4, "num_stages": 2},
    },
    "depthwise_wgrad": {
        "pixels": {"BLOCK": 128, "BLOCK_H": 2, "BLOCK_W": 8, "num_warps": 4, "num_stages": 2},
        "channels": {"BLOCK": 128, "BLOCK_N": 64, "BLOCK_H": 1, "BLOCK_W": 4, "num_warps": 4, "num_stages": 2},
    },
    "mask_and_sum": {"pixels": _tile(256, 8, 4), "channels": _tile(32, 64, 4)},
    # rows: parts; columns: elements, one behind the other
    "sum_parts": {"any": _tile(64, 16, 4)},
    # rows: vectors of pixels, or groups of a pixel's channels; columns: channels of each, at most (of float32 that lie
    # side by side half as many)
    "local_response_norm": {"pixels": _tile(128, 16, 4), "channels": _tile(128, 8, 4)},
    "add_relu": {"any": {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}},
}

LARGE: Table = {
    "conv2d_fprop": _matrices(
        ("16bit pointwise narrow", _gemm(128, 32, 64, 4, 3, **_BOXES)),
        ("16bit pointwise medium", _gemm(128, 64, 64, 4, 3, **_BOXES)),
        ("16bit pointwise wide", _gemm(128, 128, 64, 8, 3, **_BOXES)),
        ("16bit spatial wide", _gemm(128, 128, 64, 4, 3, **_SPATIAL)),
    ),
    "conv2d_dgrad": _matrices(
        ("16bit pointwise narrow", _gemm(128, 32, 64, 4, 3, **_BOXES)),
        ("16bit pointwise medium", _gemm(128, 64, 64, 4, 3, **_BOXES)),
        ("16bit pointwise wide", _gemm(128, 128, 64, 8, 3, **_BOXES)),
        ("16bit spatial wide", _gemm(128, 128, 64, 4, 3, **_SPATIAL)),
    ),
    "conv2d_wgrad": _matrices(
        ("16bit pointwise narrow|medium", _gemm(64, 64, 64, 4, 3, BOXES=1)),
        ("16bit pointwise wide", _gemm(128, 128, 64, 4, 3, BOXES=1)),
    ),
}

# What `python -m fastconv qualify` tries besides, by `Asked.entry`.
CANDIDATES: dict[str, tuple[Config, ...]] = {
    f"{kernel} {name}": configs
    for kernel in ("conv2d_fprop", "conv2d_dgrad")
    for name, configs in {
        "16bit pointwise medium": (_gemm(128, 64, 64, 4, 4, **_BOXES), _gemm(256, 64, 64, 8, 3, **_BOXES)),
        "16bit pointwise wide": (_gemm(128, 256, 64, 8, 3, **_BOXES), _gemm(128, 128, 64, 4, 4, **_BOXES)),
        "16bit spatial medium": (_gemm(64, 64, 64, 4, 4, **_SPATIAL), _gemm(128, 64, 32, 4, 4, **_SPATIAL)),
        "16bit spatial wide": (_gemm(64, 256, 64, 4, 3, **_SPATIAL), _gemm(64, 128, 64, 4, 4, **_SPATIAL)),
        "tf32 pointwise wide": (_gemm(128, 128, 32, 8, 4, **_BOXES), _gemm(64, 128, 32, 4, 4, **_POINTWISE)),
        "tf32 spatial wide": (_gemm(128, 128, 32, 4, 3, **_SPATIAL), _gemm(64, 64, 32, 4, 4, **_SPATIAL)),
    }.items()
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
        elif key == "BOXES":
            fitting, needed = frozenset((0, 1)), "0 or 1"
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


class _Preference:
    """Entries that count within a block."""

    def __init__(self, configs: dict[str, Config]) -> None:
        self.configs = configs

    def __enter__(self) -> None:
        _preferred.blocks = (*_preferred.blocks, self)

    def __exit__(self, *exception: object) -> None:
        _preferred.blocks = _preferred.blocks[:-1]


class _Preferred(threading.local):
    """Of a thread: the blocks that are open, the innermost last."""

    blocks: tuple[_Preference, ...] = ()


_preferred = _Preferred()
_asked: list[list[Asked]] = []


def preferences() -> tuple[_Preference, ...]:
    """What decides, besides its arguments, what `ask` finds on this thread."""
    return _preferred.blocks


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


def shipped(kernel: str, name: str, device: torch.device | None = None) -> Config:
    """The entry of the table for the device; without one, that for every card."""
    large = LARGE.get(kernel, {}) if device is not None and launch.has_large_tiles(device) else {}
    return large.get(name) or SHIPPED[kernel][name]


def ask(kernel: str, *classes: str, device: torch.device | None = None, filter: tuple[int, int] = (1, 1)) -> Asked:
    """The entry of a kernel for a shape class, with the guard for filters larger than 1x1.

    Kernels that `LARGE` has entries of name their device. Whoever launches with it says so, see `note`.
    """
    name, taps = " ".join(classes), filter[0] * filter[1]
    entry = f"{kernel} {name}"
    found = next((b.configs[entry] for b in reversed(_preferred.blocks) if entry in b.configs), None)
    return Asked(entry, taps, launch.guarded(found or shipped(kernel, name, device), taps))


def note(asked: Asked) -> None:
    """Tells the blocks of `noted`."""
    for each in _asked:
        each.append(asked)


def config(kernel: str, *classes: str) -> Config:
    """`ask` and `note`, for kernels that every card has the same entries of."""
    asked = ask(kernel, *classes)
    note(asked)
    return asked.config


def ask_for_convolution(
    kernel: str, dtype_class: str, filter: tuple[int, int], width: int, vector: int, device: torch.device
) -> Asked:
    """The entry of a convolution's kernel for tiles of so many columns, and operands in vectors of so many bytes."""
    kind = "thin" if vector < VECTOR_BYTES else "pointwise" if filter == (1, 1) else "spatial"
    return ask(kernel, dtype_class, kind, launch.width_class(width), device=device, filter=filter)


def block(config: Config, depth: int) -> tuple[int, int, int]:
    """A tile's rows, columns and terms, the latter no more than the depth needs."""
    return config["BLOCK_M"], config["BLOCK_N"], min(config["BLOCK_K"], max(16, triton.next_power_of_2(depth)))

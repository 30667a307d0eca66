"""What the tests of kernels with planted bugs share, those of emulator/bugs*.cu."""

import ctypes
import re
from collections.abc import Callable

import numpy as np
import pytest

import emulator

SEEDS = [1, 2, 3, 4, 5]
# Compute capability 9.0, of which a block may have 227 KiB
HOPPER = [90, 4, 2048, 227 * 1024, 228 * 1024, 50 << 20]
BUILDS = ["clang", "gcc", pytest.param("ucontext", marks=pytest.mark.slow)]


def load(name: str, build: str, functions: list[str]) -> emulator.Library:
    """Every load and store is seen, or those that go through the headers; the latter also with portable fibers."""
    if build == "clang" and emulator.find_clang() is None:
        pytest.skip("no clang++ that instruments loads and stores is installed here")
    library = emulator.load(name, clang=build == "clang", ucontext=build == "ucontext")
    for function in functions:
        getattr(library.functions, function).restype = ctypes.c_char_p
    assert library.checks_plain_accesses == (build == "clang")
    return library


def enumerators(name: str) -> list[str]:
    """The bugs that a source has, in the order of their numbers."""
    source = (emulator.build.HERE / f"{name}.cu").read_text()
    enum = source[source.index("enum Bug {") : source.index("kBugs,")]
    return re.findall(r"^  (k\w+),", enum, re.MULTILINE)


def aligned(values: np.ndarray) -> np.ndarray:
    """As halves, from a multiple of 16 bytes on, as tensor maps have it."""
    memory = np.empty(values.size * 2 + 16, np.uint8)
    begin = -memory.ctypes.data % 16
    halves = memory[begin : begin + values.size * 2].view(np.float16).reshape(values.shape)
    halves[...] = values
    return halves


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def check_is_caught(library: emulator.Library, run: Callable[[], tuple[str, bool]], kinds: str) -> set[str]:
    """With every seed; what was said. "wrong" is for bugs that are legal programs: those the numbers must tell."""
    everything = set()
    for seed in SEEDS:
        library.seed(seed)
        said, right = run()
        named = any(kind in said for kind in kinds.split("|"))
        assert named or ("wrong" in kinds.split("|") and not said and not right), (seed, said, right)
        everything.add(said)
    return everything

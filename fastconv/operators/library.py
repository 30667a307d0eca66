"""Loads the compiled library, fastconv._C, which registers the torch.ops.fastconv ops.

A library that is missing or does not fit must not cost the user more than speed: it is one warning
with the remedy, and every op then runs its reference implementation.
"""

from __future__ import annotations

import json
import mmap
import platform
import re
import struct
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch  # libtorch has to be in the process before the library

from ..version import __version__

_FOLDER = Path(__file__).parents[1]


def build_info() -> dict[str, Any]:
    """What the library was built from and for; empty where there is none.

    It is read from the library's file, hence known for one that does not load, too.
    """
    return dict(_FACTS)


def has_cuda() -> bool:
    """Whether CUDA kernels were compiled into the library."""
    return "nvcc" in _FACTS.get("cuda", "")


def is_whole(path: Path) -> bool:
    """Whether the ELF file reaches to its section table, which ends it.

    Loading a file that was cut short is no ImportError: it kills the process (SIGBUS).
    """
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    return table + entry_size * entries <= path.stat().st_size


def _read_facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        match = re.search(rb"FASTCONV_BUILD_INFO(\{[^\0]*\})\0", data)
        return json.loads(match[1]) if match else {}


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _load() -> tuple[dict[str, Any], str | None]:
    """(facts, problem); the problem is None once the library is loaded."""
    candidates = [_FOLDER / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        others = sorted(_FOLDER.glob("_C.*.so"))
        if not others:
            return {}, "the library was not built"
        facts = _read_facts(others[0]) if is_whole(others[0]) else {}
        return facts, f"there is no library for this Python, only {others[0].name}"
    if not is_whole(path):
        return {}, f"{path.name} is damaged ({path.stat().st_size} bytes of it are there)"
    facts = _read_facts(path)
    if facts.get("fastconv") != __version__:
        return facts, f"{path.name} belongs to another version of fastconv"
    if _release(torch.__version__) < _release(facts["torch_target"]):
        return facts, f"{path.name} needs torch {facts['torch_target']} or later"
    try:
        from fastconv import _C  # noqa: F401
    except ImportError as error:
        return facts, f"{path.name} does not load ({error})"
    return facts, None


def _explain(problem: str, facts: dict[str, Any]) -> str:
    here = {
        "fastconv": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    running = ", ".join(f"{name} {version}" for name, version in here.items())
    built = ", ".join(f"{name} {facts[name]}" for name in here if name in facts) or "unknown"
    root = _FOLDER.parent
    in_checkout = (root / "setup.py").is_file()
    what = f"-e {root}" if in_checkout else "--force-reinstall --no-deps --no-cache-dir fastconv"
    return (
        f"fastconv: {problem}; built for: {built}; running: {running}. Every op runs its slower "
        f"reference implementation; to rebuild: {sys.executable} -m pip install {what}"
    )


_FACTS, _problem = _load()
PROBLEM: str | None = _problem and _explain(_problem, _FACTS)
LOADED: bool = PROBLEM is None
if PROBLEM:
    warnings.warn(PROBLEM, RuntimeWarning, stacklevel=2)

"""Dotted names, as texts have them: what they stand for."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import Any

import fastconv

MISSING = object()
# Modules that need what an install may lack
OPTIONAL = {"fastconv.triton_kernels": "triton", "fastconv.commands.demo_picture": "matplotlib"}


def cannot_be_imported(name: str) -> bool:
    """Whether the name is of a module that needs a package which is not here."""
    return any(
        importlib.util.find_spec(package) is None
        for module, package in OPTIONAL.items()
        if name == module or name.startswith(f"{module}.")
    )


def modules() -> list[str]:
    """All modules of fastconv that can be imported here."""
    found = [module.name for module in pkgutil.iter_modules(fastconv.__path__, "fastconv.")]
    for name in found:  # grows while it is walked
        spec = None if cannot_be_imported(name) else importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found += [one.name for one in pkgutil.iter_modules(spec.submodule_search_locations, f"{name}.")]
    return ["fastconv", *(name for name in found if not cannot_be_imported(name))]


def get(path: str, start: Any = None) -> Any:
    """What a dotted name stands for, from an object on, or from a module to be imported; else MISSING."""
    parts = path.split(".")
    if start is None:
        for count in range(len(parts), 0, -1):
            try:
                start, parts = importlib.import_module(".".join(parts[:count])), parts[count:]
                break
            except ImportError:
                continue
    for part in parts:
        start = getattr(start, part, MISSING)
    return start

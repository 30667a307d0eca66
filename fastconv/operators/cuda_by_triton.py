"""Triton as the CUDA implementation of ``torch.ops.fastconv``, where the library has no CUDA kernels or is missing.

So that exported programs, and callers of the operators, find kernels on a GPU in an install without nvcc. What the
public functions choose for CUDA tensors is another matter, and decided in `fastconv.operators.backends`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from . import library, registration
from .schemas import SCHEMAS

_kept: list[torch.library.Library] = []


def needed() -> bool:
    return not (library.LOADED and library.has_cuda()) and importlib.util.find_spec("triton") is not None


def register(namespace: str, *, define: bool) -> None:
    """Registers the kernels of `fastconv.triton_kernels`, which is imported at the first call of one.

    `define` also defines the operators and completes them, as no library did.
    """
    fragment = torch.library.Library(namespace, "FRAGMENT")
    _kept.append(fragment)  # its registrations end with it
    for name, schema in SCHEMAS.items():
        if define:
            fragment.define(name + schema)
        fragment.impl(name, _kernel(name), "CUDA")
    if define:
        registration.add_namespace(namespace)


def _kernel(name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        return importlib.import_module("fastconv.triton_kernels").OPERATORS[name](*args)

    return kernel

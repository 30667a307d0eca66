"""Variants of a backend: what of its own it can run for a call, as tables have it, put in force on one thread.

    cuda        {family of kernels: kernel}, as in `fastconv.operators.kernels.table`
    triton      {"<kernel> <shape class>": block sizes}, as in `fastconv.triton_kernels.table`

The others have none.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import Any

from . import kernels

_NOTHING = contextlib.nullcontext()


def applied(backend: str, variant: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Within the block, calls of the backend's operators that this thread makes run this variant.

    Names that the backend does not know, and kernels that cannot run the call, leave the choice to it. What is returned
    can be entered any number of times, by several threads at once. A backward on a GPU runs on a thread of autograd's:
    the block belongs around the call of its operator.

    Raises:
        ValueError: a variant, not empty, of a backend that has none.
    """
    if not variant:
        return _NOTHING
    if backend == "triton":
        found: contextlib.AbstractContextManager[None] = _triton_table().preferred(variant)
        return found
    return kernels.preferred(variant, backend)


def _triton_table() -> Any:
    return importlib.import_module("fastconv.triton_kernels.table")

"""Triton's interpreter without three things that it does over and over: they took two thirds of its tests' time.

It replaces the functions of triton.language as a launch begins, and again in every call of a device function, where
they have been replaced already; it makes its table of numpy's types anew for each operation; and it repeats each
operation on integers in 64 bits to see whether it overflows, which here only `overflow_is_an_error` asks for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


@functools.cache
def speed_up() -> None:
    """For the rest of the process; of a version that has these functions no longer, nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_LangPatchScope", "_patch_lang", "_get_np_dtype")):
        return
    replace = interpreter._patch_lang
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # a kernel's own, and that of triton's functions
    within_launch = False

    def replace_once(_function: Any) -> Any:
        nonlocal within_launch
        if within_launch:
            return None  # a device function's call, which ignores it
        scope = replace(both)
        restore, within_launch = scope.restore, True

        def restore_and_leave() -> None:
            nonlocal within_launch
            within_launch = False
            restore()

        scope.restore = restore_and_leave
        return scope

    of_any = interpreter._get_np_dtype
    of_number = functools.cache(of_any)
    interpreter._patch_lang = replace_once
    interpreter.interpreter_builder.options = _options(sanitize_overflow=False)
    interpreter._get_np_dtype = lambda dtype: of_any(dtype) if dtype.scalar.is_ptr() else of_number(dtype.scalar)


def _options(*, sanitize_overflow: bool) -> Any:
    from triton.runtime.interpreter import interpreter_builder

    return dataclasses.replace(interpreter_builder.options, sanitize_overflow=sanitize_overflow)


@contextmanager
def overflow_is_an_error() -> Iterator[None]:
    from triton.runtime.interpreter import interpreter_builder

    before, interpreter_builder.options = interpreter_builder.options, _options(sanitize_overflow=True)
    try:
        yield
    finally:
        interpreter_builder.options = before

"""Which implementation of an op runs: chosen by argument, by context, or by the input's device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from . import _library

NAMES = ("auto", "cpu", "cuda", "triton", "reference")
_current = "auto"


def available() -> dict[str, str | None]:
    """Every backend, with None if it can run here, else the reason why not."""
    planned = "this version of fastconv has no {} kernels yet; CUDA tensors run the reference"
    return {
        "cpu": None if _library.LOADED else _library.PROBLEM,
        "cuda": planned.format("CUDA C++"),
        "triton": planned.format("Triton"),
        "reference": None,
    }


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, ops without a ``backend=`` argument run on this backend.

    The choice holds for the whole process, all threads included.

    Args:
        name: ``"auto"`` (the fastest for the input's device), ``"cpu"`` (the C++ library), or
            ``"reference"`` (the plain aten meaning of the op).

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here; the message says why.
    """
    global _current
    _require(name)
    previous, _current = _current, name
    try:
        yield
    finally:
        _current = previous


def current() -> str:
    """The name that the enclosing `use_backend` was given; "auto" outside of any."""
    return _current


def choose(backend: str | None, input: torch.Tensor) -> str:
    """The backend that an op runs for `input`: ``"cpu"`` or ``"reference"``."""
    name = _current if backend is None else backend
    if name == "auto":
        if _library.LOADED and input.device.type in ("cpu", "meta"):
            return "cpu"
        return "reference"
    if name != "reference":
        _require(name)
        if input.device.type not in (name, "meta"):
            raise RuntimeError(
                f"fastconv: got a tensor on {input.device} for backend '{name}', needed one on "
                f"{name}; move it, or leave the backend to 'auto'"
            )
    return name


def _require(name: str) -> None:
    if name not in NAMES:
        raise ValueError(
            f"fastconv: got backend {name!r}, needed one of {', '.join(NAMES)}; see `python -m fastconv info`"
        )
    reason = available().get(name)
    if reason is not None:
        raise RuntimeError(
            f"fastconv: got backend '{name}', which cannot run here: {reason}; leave the backend to 'auto'"
        )

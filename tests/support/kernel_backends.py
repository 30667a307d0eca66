"""Where the tests of GPU kernels run: their CUDA source in the emulator, and the real thing where there is a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import emulator
from fastconv import use_backend
from fastconv.measure.timing import true_float32
from fastconv.operators import backends, kernels, registration

from . import interpreter

CUDA = ("cuda-emulated", "cuda")


@functools.cache
def add_emulated() -> str | None:
    """Makes the emulated kernels a backend; why that is impossible, if it is."""
    try:
        emulator.library()
    except (OSError, RuntimeError, SystemExit) as error:
        return f"the emulated library was not built: {error}"
    registration.add_namespace("fastconv_emulated")
    kernels.add("cuda-emulated", emulator.library())
    return None


backends.add("cuda-emulated", backends.Backend("fastconv_emulated", lambda: "cpu", lambda: add_emulated()))


def problem(backend: str) -> str | None:
    """Why this backend cannot run tests, on the device of `device_of`; None if it can. Asks no other one."""
    reason = backends.problem(backend)
    if reason is None and backend == "triton" and not backends.interpreted():
        return "on a GPU see test_triton.py; it takes CPU tensors in its interpreter alone (TRITON_INTERPRET=1)"
    return reason


def device_of(backend: str) -> torch.device:
    """The device of a backend's tensors; skips the test where the backend cannot run."""
    reason = None if backend == "auto" else problem(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    if backend == "triton":
        interpreter.speed_up()
    return torch.device("cuda" if backend in ("cuda", "cudnn") else "cpu")


@contextmanager
def on(backend: str) -> Iterator[torch.device]:
    """Inside, ops run on this backend, in true float32; its device. Skips the test where the backend cannot run."""
    device = device_of(backend)
    with use_backend(backend), true_float32():
        yield device


def forced(backend: str, op: str, name: str) -> AbstractContextManager[None]:
    """Inside, `op` (as the kernel table has it) runs this kernel on the backend."""
    device_of(backend)
    return kernels.forced(op, name, backend)


def kernel_table(backend: str) -> list[dict[str, Any]]:
    device_of(backend)
    return kernels.table(backend)


def emulated() -> emulator.Library:
    """The emulator, for what only it can do; skips the test where it was not built."""
    device_of("cuda-emulated")
    return emulator.library()


def as_tf32(tensor: Tensor) -> Tensor:
    """Rounded to the 10 bits of mantissa that the tensor cores read, ties away from zero."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@contextmanager
def on_triton() -> Iterator[torch.device]:
    """Inside, ops run on Triton's kernels, and tensors are made where those run: on the GPU, or in the interpreter."""
    reason = backends.problem("triton")
    if reason is not None:
        pytest.skip(reason)
    device = torch.device("cpu" if backends.interpreted() else "cuda")
    if device.type == "cpu":
        interpreter.speed_up()
    # The interpreter has no TF32.
    with use_backend("triton"), true_float32(), device:
        yield device

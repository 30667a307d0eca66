"""How much memory a call takes at its peak: of the system, in a process of its own, or of a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_PRINT_RISE = "import sys; from fastconv.measure import memory; memory.print_rise(*sys.argv[1:])"


def peak_bytes(function: Callable[..., Any], *arguments: str) -> int | None:
    """How much resident memory rises while a process runs the function, above that of the process before.

    It counts every byte that is written, in tensors and in the libraries' scratch memory; not what the allocator
    keeps. None where it cannot be told, with what went wrong on stderr. Linux only (VmHWM of /proc/self/status).

    Args:
        function: of a module, which the process imports first.
        arguments: for it.
    """
    command = [sys.executable, "-c", _PRINT_RISE, function.__module__, function.__name__, *arguments]
    # With a fixed threshold, glibc gives every larger block pages of its own, and gives them back.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run(command, env=environ, capture_output=True, text=True)
    if process.returncode != 0:
        print(f"no peak memory of {function.__name__}{arguments}: {process.stderr[-500:]}", file=sys.stderr)
    return int(process.stdout) if process.stdout.strip().isdigit() else None


def peak_device_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """How much the memory of tensors on a GPU rises during a call, above what they take before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def print_rise(module: str, function: str, *arguments: str) -> None:
    """What the process of `peak_bytes` does."""
    call = getattr(import_module(module), function)
    if not _STATUS.exists():
        return
    before = _kib("VmRSS")
    call(*arguments)
    print(1024 * (_kib("VmHWM") - before))


def _kib(name: str) -> int:
    return int(re.findall(rf"{name}:\s*(\d+) kB", _STATUS.read_text())[0])

"""``python -m fastconv info``: what a bug report needs, and the first answer to "why so slow"."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

import fastconv
from fastconv.measure import environment
from fastconv.operators import backends, library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    for name, value in facts().items():
        head, *rest = value.splitlines()
        print(f"{name:<12} {head}", *(f"{'':<12} {line}" for line in rest), sep="\n")
    return 0


def facts() -> dict[str, str]:
    """One entry per line of the report; several lines in a value continue it."""
    built = library.build_info()
    report = {
        "fastconv": f"{fastconv.__version__} in {Path(fastconv.__file__).parent}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": environment.version("triton") or "not installed",
        "CUDA": _cuda(),
        "CPU": _cpu(),
        "library": library.PROBLEM or "loaded",
    }
    if built:
        report |= {
            "built for": f"Python {built['python']}, torch with the LibTorch stable ABI "
            f"{built['torch_target']} or later",
            "built by": f"{built['compiler']}, headers of torch {built['torch']}",
            "built from": f"fastconv {built['fastconv']}, sources {built['source_hash']}",
            "CPU kernels": built["cpu"],
            "CUDA kernels": built["cuda"],
        }
    report["backends"] = "\n".join(f"{name}: {reason or 'available'}" for name, reason in backends.available().items())
    return report


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without it"
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    return f"{torch.version.cuda} of torch; {names or 'no GPU is visible'}"


def _cpu() -> str:
    if not library.LOADED:
        return f"{torch.get_num_threads()} threads"
    from fastconv import _C

    return f"{_C.cpu_capability()} kernels, {torch.get_num_threads()} threads"

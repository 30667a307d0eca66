"""``python -m fastconv info``: what a bug report needs, and the first answer to "why so slow"."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

import fastconv
from fastconv.operators import backends, library, table_files
from fastconv.operators.fingerprint import differences, fingerprint, installed
from fastconv.operators.tables import Table


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
        "triton": installed("triton") or "not installed",
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
    report["tables"] = "\n".join(line for device in _devices() for line in _tables(device))
    return report


def _devices() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def _tables(device: torch.device) -> list[str]:
    """Those that choose for the device, then those that were made with something else and choose nothing."""
    here = fingerprint(device)
    made = ", ".join(f"{name} {value}" for name, value in here.items())
    found = [f"{device}: {_table(path, table)}, made with {made}" for path, table in table_files.in_force(device)]
    lines = found or [f"{device}: none: run `python -m fastconv qualify`"]
    for folder in (table_files.user_folder(), table_files.shipped_folder()):
        for path, table in table_files.others(folder, here):
            lines.append(f"{device}: not {_table(path, table)}, made with {differences(table.fingerprint, here)}")
    return lines


def _table(path: Path, table: Table) -> str:
    count, interrupted = len(table.entries), sum(not entry.complete for entry in table.entries.values())
    entries = "1 entry" if count == 1 else f"{count} entries"
    incomplete = f", {interrupted} of them incomplete" if interrupted else ""
    disabled = f", {len(table.disabled)} kernels disabled" if table.disabled else ""
    return f"{path}, {entries}{incomplete}{disabled}"


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

"""What a measured time holds for: the device, and the versions of all that runs on it."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

from ..version import __version__
from . import backends, library
from .messages import one_line

_LONGEST = 100  # characters of a device's name
_PACKAGE = Path(__file__).parents[1]
# Whose Python is what runs on a device.
_ROOMS = ("aten_kernels", "triton_kernels")


def fingerprint(device: torch.device) -> dict[str, str]:
    """A line for each fact that a table of times depends on; "device" is the name of the device.

    It is taken once for a device, and for a CPU once for a number of threads.

    Raises:
        ValueError: the device is neither a CPU nor a GPU.
    """
    if device.type == "cuda":
        return dict(_of_gpu(torch.cuda.current_device() if device.index is None else device.index))
    if device.type == "cpu":
        return dict(_of_cpu(torch.get_num_threads()))
    raise ValueError(f"fastconv: got device {device}, needed a CPU or a GPU: others have no table")


def differences(made: dict[str, str], here: dict[str, str]) -> str:
    """What one fingerprint has otherwise than that of here, in words; "" where they are equal."""
    names = [name for name in {**here, **made} if made.get(name) != here.get(name)]
    return ", ".join(f"{name} {made.get(name, 'none')} (here {here.get(name, 'none')})" for name in names)


def cpu_name() -> str:
    """The model of this machine's CPU, as much of it as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    fields = dict(re.findall(r"^(.*?)\s*: (.*)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:  # a virtual machine may tell no more than "AMD EPYC"
        name += f" (family {fields['cpu family']} model {fields['model']})"
    return one_line(name, _LONGEST)


def installed(package: str) -> str | None:
    """The version of an installed package, which is not imported; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def digest(*folders: Path) -> str:
    """Of the Python sources in them, and of their names."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder.parent).as_posix()
            found.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


@functools.cache
def _of_cpu(threads: int) -> dict[str, str]:
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"device": cpu_name(), "instructions": instructions, "threads": str(threads), **_of_software()}


@functools.cache
def _of_gpu(index: int) -> dict[str, str]:
    return {
        "device": one_line(torch.cuda.get_device_name(index), _LONGEST),
        "driver": str(backends.driver_cuda() or "unknown"),
        "cudnn": str(torch.backends.cudnn.version() or "none"),
        **_of_software(),
    }


@functools.cache
def _of_software() -> dict[str, str]:
    return {
        "fastconv": __version__,
        "library": str(library.build_info().get("source_hash", "none")),
        "python": digest(*(_PACKAGE / room for room in _ROOMS)),
        "torch": str(torch.__version__),
        "triton": installed("triton") or "none",
    }

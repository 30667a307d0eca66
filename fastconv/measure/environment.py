"""What a figure depends on, apart from what is measured: the machine, the versions, the sources."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import fastconv
from fastconv.operators import library


def facts() -> dict[str, str]:
    """A line for each, to be reported with every figure."""
    digest = hashlib.sha256()
    for path in sorted(Path(fastconv.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    found = {
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": f"fastconv {fastconv.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "commit": _commit(),
        "sources": f"library {library.build_info().get('source_hash', 'none')}, Python {digest.hexdigest()[:12]}",
    }
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found["instructions"] += ", no bf16 convolutions"
    return found


def version(package: str) -> str | None:
    """Of an installed package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(.*?)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:  # a virtual machine may tell no more than "AMD EPYC"
        name += f" (family {fields['cpu family']} model {fields['model']})"
    return name


def _commit() -> str:
    """Of the checkout that the package is in, or "unknown"; FASTCONV_COMMIT says it where git cannot."""
    if named := os.environ.get("FASTCONV_COMMIT"):
        return named
    root = Path(fastconv.__file__).parent.parent
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return process.stdout.strip() or "unknown"

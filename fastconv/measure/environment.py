"""What a figure depends on, apart from what is measured: the machine, the versions, the sources."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import fastconv
from fastconv.operators import library, table_files
from fastconv.operators.fingerprint import cpu_name, digest


def facts() -> dict[str, str]:
    """A line for each, to be reported with every figure."""
    found = {
        "CPU": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": f"fastconv {fastconv.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "commit": _commit(),
        "sources": f"library {library.build_info().get('source_hash', 'none')}, "
        f"Python {digest(Path(fastconv.__file__).parent)}",
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found["tables"] = ", ".join(path.name for path, _ in table_files.in_force(device)) or "none"
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found["instructions"] += ", no bf16 convolutions"
    return found


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

"""``python -m fastconv bench``: whole networks, eager against swapped."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastconv
from fastconv import _library


def environment() -> dict[str, Any]:
    """What a figure depends on, apart from what is measured."""
    sources = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(sources.rglob("*.py")):
        digest.update(path.read_bytes())
    return {
        "cpu": _cpu_name(),
        "cores": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastconv": fastconv.__version__,
        "commit": _commit(),
        "source_hash": {
            "library": _library.build_info().get("source_hash"),
            "python": digest.hexdigest()[:12],
        },
    }
def _commit(): return None
def _cpu_name():
    return "AMD"

"""What a machine has and can do, as JSON: to know what was measured where, and against which ceilings."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib import metadata

import torch

from fastconv.commands.verify import DTYPES
from fastconv.measure.report import environment
from harness import copy_seconds, peak

TOOLS = ("nvcc", "ncu", "compute-sanitizer", "cuobjdump", "g++", "clang++", "git")
PACKAGES = ("numpy", "triton", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "torchvision", "ninja")


def main() -> None:
    facts = {
        **environment(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "tools": {name: shutil.which(name) for name in TOOLS},
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(device)
        nbytes = 2**31  # read and written together
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": properties.L2_cache_size / 2**20,
            "copy_gb_per_s": round(nbytes / copy_seconds(nbytes, device) / 1e9),
            "matmul_tflop_per_s": {name: round(peak(device, name) / 1e12, 1) for name in DTYPES},
        }
    json.dump(facts, sys.stdout, indent=1)
    print()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

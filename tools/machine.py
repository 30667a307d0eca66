"""What a machine has and can do, as JSON: to know what was measured where, and against which ceilings."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys

import torch

from fastconv.measure import environment
from fastconv.measure.calls import DTYPES
from fastconv.measure.ceilings import copy_seconds, flop_per_second
from fastconv.operators.fingerprint import installed

TOOLS = ("nvcc", "ncu", "compute-sanitizer", "cuobjdump", "g++", "clang++", "git")
PACKAGES = ("numpy", "triton", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "torchvision", "ninja")


def main() -> None:
    facts = {
        **environment.facts(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "tools": {name: shutil.which(name) for name in TOOLS},
        "packages": {name: installed(name) for name in PACKAGES},
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
            "matmul_tflop_per_s": {
                name: round(flop_per_second(device, dtype) / 1e12, 1) for name, dtype in DTYPES.items()
            },
        }
    json.dump(facts, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()

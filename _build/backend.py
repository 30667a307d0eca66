"""PEP 517 backend: setuptools, plus a build requirement only where the machine lacks something.

An isolated build normally downloads torch again to compile against its headers. fastconv finds the
torch that is already installed and asks for one only where there is none.
"""

from __future__ import annotations

import os
import shutil

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

from .sources import ROOT, cuda_sources
from .toolchain import MINIMUM_TORCH, find_cuda, find_torch

# All of one minor: nvcc 13.0 with a newer nvvm writes PTX that its own ptxas refuses.
NVCC_WHEELS = [
    f"nvidia-{part}==13.0.*"
    for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
]


def missing_here() -> list[str]:
    """What a build needs and this machine lacks, as requirements for pip."""
    missing = []
    if find_torch() is None:
        missing.append("torch>=" + ".".join(map(str, MINIMUM_TORCH)))
    if os.environ.get("FASTCONV_CUDA") == "1" and cuda_sources() and find_cuda() is None:
        missing += NVCC_WHEELS
    return missing


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + missing_here()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + missing_here()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools packs what is in there, modules included that the sources no longer have.
    for leftover in ROOT.glob("build/lib.*"):
        shutil.rmtree(leftover)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)

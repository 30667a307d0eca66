"""What this machine offers to build with: compiler, torch, Python headers, pybind11, nvcc, memory.

Nothing here imports torch: an isolated build could not, and should not have to.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 11)


def fail(problem: str) -> SystemExit:
    """The exception that ends a build with one sentence instead of a traceback."""
    return SystemExit(f"fastconv: {problem}")


@dataclass(frozen=True)
class Compiler:
    command: list[str]
    version: str


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


@dataclass(frozen=True)
class Toolchain:
    compiler: Compiler
    torch: Torch


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    include: Path
    lib: Path


def find_compiler() -> Compiler:
    """$CXX, else the first C++ compiler on PATH, after it has shown that it knows C++20."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
    else:
        names = ("c++", "g++", "clang++")
        command = [path for name in names if (path := shutil.which(name))][:1]
    if not command or shutil.which(command[-1]) is None:
        sought = shlex.join(command) or "c++, g++ and clang++ on PATH"
        raise fail(
            f"no C++ compiler was found ({sought} was looked for); "
            "install one (Debian, Ubuntu: apt install g++) or name it in CXX"
        )
    probe = [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run(probe, input="#include <span>\n", capture_output=True, text=True)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    version = version.partition("\n")[0]
    if result.returncode != 0:
        raise fail(
            f"{shlex.join(command)} ({version}) does not compile C++20; "
            f"g++ 11, clang++ 14 or later is needed (name it in CXX). It said:\n{result.stderr}"
        )
    return Compiler(command, version)


def find_torch() -> Torch | None:
    """The torch whose headers to build against, or None where there is no torch at all.

    In this order: $FASTCONV_TORCH (a `torch` folder); the torch importable here; the torch of the
    interpreter that pip's build isolation hides (it is hidden by PYTHON* variables only).
    """
    named = os.environ.get("FASTCONV_TORCH")
    if named:
        return _check_torch(Path(named).resolve())
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        return _check_torch(Path(spec.origin).parent)
    ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    outer = subprocess.run([sys.executable, "-E", "-c", ask], capture_output=True, text=True)
    return _check_torch(Path(outer.stdout.strip()).parent) if outer.stdout.strip() else None


def _check_torch(root: Path) -> Torch:
    version_file = root / "version.py"
    text = version_file.read_text() if version_file.is_file() else ""
    match = re.search(r"^__version__ = '((\d+)\.(\d+)[^']*)'", text, re.MULTILINE)
    if match is None:
        raise fail(f"{root} is not an installed torch (no version.py); correct FASTCONV_TORCH")
    version, major, minor = match.groups()
    if (int(major), int(minor)) < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        raise fail(
            f"torch {version} ({root}) is too old; torch >= {wanted} is needed: "
            f'pip install "torch>={wanted}", then install fastconv again'
        )
    torch = Torch(root, version)
    if not (torch.include / "torch/csrc/stable/library.h").is_file():
        raise fail(
            f"torch {version} ({root}) came without its C++ headers (include/torch/csrc/stable); "
            "install torch from PyPI, or name another torch folder in FASTCONV_TORCH"
        )
    return torch


def find_python_headers() -> Path:
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        raise fail(
            f"Python.h is not in {include}; install Python's headers "
            "(Debian, Ubuntu: apt install python3-dev)"
        )
    return include


def find_pybind11() -> Path:
    import pybind11

    return Path(pybind11.get_include())


def find_cuda() -> Cuda | None:
    """nvcc and its toolkit: $CUDA_HOME, PATH, /usr/local/cuda, else the nvidia-cuda-nvcc wheel."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [Path(home, "bin/nvcc") for home in homes if home]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels and wheels.submodule_search_locations) or ():
        candidates += sorted(Path(folder).glob("cu[0-9]*/bin/nvcc"), reverse=True)
    nvcc = next((path for path in candidates if path.is_file()), None)
    return _ask_nvcc(str(nvcc)) if nvcc else None


def _ask_nvcc(nvcc: str) -> Cuda:
    # `nvcc` may be a link or a wrapper script, so its own path does not tell where its toolkit is.
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    plan = subprocess.run(dry_run, capture_output=True, text=True).stderr
    version = re.search(r"release (\d+\.\d+)", said)
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    if version is None or top is None:
        raise fail(f"{nvcc} does not run; repair it, or set FASTCONV_CUDA=0 to build without CUDA")
    # The wheel has lib/ and no lib64/, although its nvcc.profile says lib64.
    roots = re.findall(r'"-I([^"]*)"', plan), re.findall(r'"-L([^"]*)"', plan)
    includes = [Path(folder) for folder in (*roots[0], f"{top[1].strip()}/include")]
    libs = [
        Path(folder) for folder in (*roots[1], *(f"{top[1].strip()}/{n}" for n in ("lib", "lib64")))
    ]
    include = next((path for path in includes if (path / "cuda_runtime.h").is_file()), None)
    lib = next((path for path in libs if (path / "libcudart_static.a").is_file()), None)
    if include is None or lib is None:
        raise fail(
            f"the CUDA toolkit of {nvcc} lacks cuda_runtime.h or libcudart_static.a; "
            "install the whole toolkit, or set FASTCONV_CUDA=0 to build without CUDA"
        )
    return Cuda(nvcc, version[1], include.resolve(), lib.resolve())


def available_memory() -> int:
    """Bytes this build may use: what the machine has free, or what the container allows."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        limits += [int(match[1]) * 1024] if match else []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, v2 and v1
        limit = Path("/sys/fs/cgroup", name)
        if limit.is_file() and limit.read_text().strip().isdigit():
            limits.append(int(limit.read_text()))
    return min(limits, default=sys.maxsize)


def parallel_jobs(bytes_per_job: int) -> int:
    """How many compilers to run at once: $MAX_JOBS, else as many as cores and memory bear."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, available_memory() // bytes_per_job))

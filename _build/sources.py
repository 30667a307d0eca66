"""What of csrc/cuda is compiled how often, and for which GPUs: for the library and for the emulator alike.

A folder named sm<number> holds code for GPUs from that compute capability on, and is built for each of those that the
build is for. One named sm<number>a (or f) holds code for that architecture alone, and is never built for another.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# The GPUs that a library is built for, unless FASTCONV_CUDA_ARCHS names others
CUDA_ARCHS = "80+PTX 90a"

# Sources of many kernels, built once for each combination of these macros' values.
INSTANCES: dict[str, dict[str, Sequence[str]]] = {
    "cuda/conv2d/sm80/instances.cu": {
        "FASTCONV_PASS": ("kFprop", "kDgrad", "kWgrad"),
        "FASTCONV_DTYPE": ("kFloat16", "kBFloat16", "kFloat32"),
    },
    "cuda/conv2d/sm90a/instances.cu": {
        "FASTCONV_PASS": ("kFprop", "kDgrad", "kWgrad"),
        "FASTCONV_DTYPE": ("kFloat16", "kBFloat16"),
    },
}


@dataclass(frozen=True)
class CudaUnit:
    """One object of a CUDA source."""

    source: Path
    output: str  # relative to the folder of the build
    defines: tuple[str, ...]
    archs: tuple[str, ...]  # of those that the build is for, as FASTCONV_CUDA_ARCHS has them


def default_archs() -> list[str]:
    """Like ["80", "90a"]"""
    return [arch.partition("+")[0] for arch in CUDA_ARCHS.split()]


def cuda_sources() -> list[Path]:
    return sorted((CSRC / "cuda").rglob("*.cu"))


def cuda_families() -> list[str]:
    """The folders below csrc/cuda that have kernels."""
    return sorted({path.relative_to(CSRC / "cuda").parts[0] for path in cuda_sources()})


def cuda_units(archs: Sequence[str]) -> Iterator[CudaUnit]:
    """Everything to compile for these GPUs."""
    for source in cuda_sources():
        path = source.relative_to(CSRC)
        macros = INSTANCES.get(path.as_posix(), {})
        for values in itertools.product(*macros.values()):
            number, suffix = _architecture(source)
            defines = [f"-DFASTCONV_ARCH={number}", f"-DFASTCONV_ARCH_ONLY={int(bool(suffix))}"]
            defines += [f"-D{name}={value}" for name, value in zip(macros, values, strict=True)]
            output = "-".join([path.with_suffix("").as_posix(), *values]) + ".cu.o"
            chosen = archs_for(source, archs)
            if chosen:
                yield CudaUnit(source, output, tuple(defines), chosen)


def archs_for(source: Path, archs: Sequence[str]) -> tuple[str, ...]:
    """Those of the architectures (80+PTX, 90a) that this source may be compiled for."""
    number, suffix = _architecture(source)
    names = {arch: arch.partition("+")[0] for arch in archs}
    if suffix:
        return tuple(arch for arch, name in names.items() if name == f"{number}{suffix}")
    return tuple(arch for arch, name in names.items() if int(name.rstrip("af")) >= number)


def _architecture(source: Path) -> tuple[int, str]:
    """(80, "") for csrc/cuda/<op>/sm80/<name>.cu"""
    match = re.fullmatch(r"sm(\d+)([af]?)", source.parent.name)
    if match is None:
        raise ValueError(f"{source} is not in a folder that names an architecture, such as sm80 or sm90a")
    return int(match[1]), match[2]

"""From the sources and the toolchain to a build.ninja: every flag of the build is in this file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ninja.ninja_syntax import Writer

from .sources import CSRC, CUDA_ARCHS, ROOT, cuda_families, cuda_sources, cuda_units
from .toolchain import (
    MINIMUM_TORCH,
    Cuda,
    Toolchain,
    fail,
    find_cuda,
    find_pybind11,
    find_python_headers,
    parallel_jobs,
)

TORCH_TARGET = "2.10"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"

# __FILE__ is in torch's error messages: there it should read csrc/..., wherever this was built.
COMMON = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMMON += [f"-fmacro-prefix-map={ROOT}/=", f"-I{CSRC}"]
# Never -ffast-math: NaN and Inf have to survive.
KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
CPU_CAPABILITIES = {
    "default": [],
    "avx2": AVX2,
    "avx512": [*AVX512, "-mprefer-vector-width=512"],
}
CUDA = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-warn-spills", f"-I{CSRC}"]

CPP_JOB_BYTES = 1_000_000_000
CUDA_JOB_BYTES = 1_500_000_000

# fastconv/operators/library.py looks for it in a library that does not load.
MARK = "FASTCONV_BUILD_INFO"


def cpu_capabilities() -> dict[str, list[str]]:
    """Name and flags of each build of csrc/cpu/kernels, the least demanding first."""
    if platform.machine() == "x86_64":
        return CPU_CAPABILITIES
    return {"default": CPU_CAPABILITIES["default"]}


def wanted_cuda() -> Cuda | None:
    """The toolkit to build csrc/cuda with, or None; FASTCONV_CUDA is 0, 1 or auto (the default)."""
    wish = os.environ.get("FASTCONV_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise fail(f"FASTCONV_CUDA={wish} is not one of 0, 1, auto")
    if wish == "0" or not cuda_sources():
        return None
    cuda = find_cuda()
    if cuda is None and wish == "1":
        raise fail(
            "FASTCONV_CUDA=1, but no nvcc was found in CUDA_HOME, PATH, /usr/local/cuda or among "
            "the installed wheels; install the CUDA toolkit, or leave out --no-build-isolation, "
            "and nvcc comes as wheels"
        )
    return cuda


def cuda_archs() -> list[str]:
    """Like ["80+PTX", "90a"]; +PTX lets later GPUs compile the kernels when they load."""
    archs = re.split(r"[\s,;]+", os.environ.get("FASTCONV_CUDA_ARCHS", CUDA_ARCHS).strip())
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            raise fail(f"FASTCONV_CUDA_ARCHS has {arch!r}, which is not like 80, 90a or 80+PTX")
    return archs


def gencode(arch: str) -> str:
    """nvcc's flag for an architecture: "90a", say, or "80+PTX" for later GPUs, too."""
    number, plus, _ = arch.partition("+")
    code = f"[sm_{number},compute_{number}]" if plus else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def _check_served(archs: Sequence[str]) -> None:
    served = {arch for unit in cuda_units(archs) for arch in unit.archs}
    for arch in archs:
        if arch not in served:
            raise fail(
                f"FASTCONV_CUDA_ARCHS has {arch}, for which there are no kernels; name 80 or later, as {CUDA_ARCHS!r} does"
            )


def source_hash() -> str:
    """Of all that may be compiled; csrc/README.md is not, and shows what was found in the library that was."""
    digest = hashlib.sha256()
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(f"{path.relative_to(CSRC)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Build:
    """One library to build: `facts` says what it will be, `write()` writes its build.ninja."""

    def __init__(self, version: str, toolchain: Toolchain) -> None:
        self.toolchain = toolchain
        self.cuda = wanted_cuda()
        self.archs = cuda_archs() if self.cuda else []
        _check_served(self.archs)
        self.kernels = sorted((CSRC / "cpu/kernels").glob("*.cpp"))
        soabi = sysconfig.get_config_var("SOABI")
        self.folder = ROOT / "build" / f"{soabi}-torch{toolchain.torch.version}"
        self.library = self.folder / "_C.so"
        self.facts = {
            "fastconv": version,
            "source_hash": source_hash(),
            "python": sysconfig.get_python_version(),
            "torch": toolchain.torch.version,
            "torch_target": TORCH_TARGET,
            "compiler": toolchain.compiler.version,
            "cpu": _targets([path.stem for path in self.kernels], cpu_capabilities()),
            "cuda": self._cuda_fact(),
        }

    def _cuda_fact(self) -> str:
        if self.cuda:
            archs = [f"sm_{arch}" for arch in self.archs]
            return f"{_targets(cuda_families(), archs)}, by nvcc {self.cuda.version}"
        if not cuda_sources():
            return "this version has no CUDA kernels"
        if os.environ.get("FASTCONV_CUDA") == "0":
            return "not built, because of FASTCONV_CUDA=0"
        return "not built, because no nvcc was found (FASTCONV_CUDA=1 fetches it as wheels)"

    def write(self) -> None:
        info = self.folder / "build_info.cpp"
        _write_if_changed(info, _info_source(self.facts))
        with open(self.folder / "build.ninja", "w") as file:
            ninja = Writer(file)
            self._write_rules(ninja)
            objects = [
                ninja.build(output, rule, str(source), variables={"flags": _shell(flags)})[0]
                for source, output, rule, flags in self._objects(info)
            ]
            ninja.build(str(self.library), "link", objects)

    def summary(self, seconds: float) -> str:
        """What was built for what, as the last words of the build."""
        facts = self.facts
        return f"""\
fastconv {facts["fastconv"]} was built in {seconds:.0f} s
  for       Python {facts["python"]}, torch {".".join(map(str, MINIMUM_TORCH))} or later \
(LibTorch stable ABI {TORCH_TARGET}; headers of torch {facts["torch"]})
  compiler  {facts["compiler"]}
  CPU       {facts["cpu"]}
  CUDA      {facts["cuda"]}"""

    def _write_rules(self, ninja: Writer) -> None:
        cxx = _shell(self.toolchain.compiler.command)
        compile_cpp = f"{cxx} -MMD -MF $out.d $flags -c $in -o $out"
        ninja.rule("cpp", compile_cpp, "$out", depfile="$out.d", deps="gcc")
        link = ["-shared", *shlex.split(os.environ.get("LDFLAGS", ""))]
        # libtorch.so stays NEEDED although nothing here names a symbol of it: under a CUDA torch it
        # brings in the CUDA half, where the weak symbols are.
        torch = [
            f"-L{self.toolchain.torch.lib}",
            "-Wl,--no-as-needed",
            "-ltorch",
            "-Wl,--as-needed",
        ]
        cudart = []
        if self.cuda:
            ninja.pool("cuda", parallel_jobs(CUDA_JOB_BYTES))
            nvcc = _shell([self.cuda.nvcc, "-ccbin", self.toolchain.compiler.command[-1]])
            compile_cuda = f"{nvcc} -MMD -MF $out.d $flags -c $in -o $out"
            ninja.rule("cuda", compile_cuda, "$out", depfile="$out.d", deps="gcc", pool="cuda")
            # Static, hence no libcudart.so to find: the library loads on machines without CUDA.
            cudart = [f"-L{self.cuda.lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            cudart.append("-Wl,--exclude-libs,ALL")
        ninja.rule("link", f"{cxx} {_shell(link)} $in -o $out {_shell(torch + cudart)}", "$out")

    def _objects(self, info: Path) -> Iterator[tuple[Path, str, str, list[str]]]:
        """(source, object, rule, flags) of everything to compile.

        Objects for the baseline CPU come first: of an inline function that several objects hold the
        linker keeps the first copy, and that one must run everywhere.
        """
        flags = COMMON + shlex.split(os.environ.get("CXXFLAGS", ""))
        capabilities = cpu_capabilities()
        torch = [STABLE_ABI, "-isystem", str(self.toolchain.torch.include)]
        torch += [f"-DFASTCONV_HAVE_{name.upper()}" for name in capabilities]
        # torch/include has a pybind11 of its own, which does not go together with STABLE_ABI.
        python = [f"-isystem{path}" for path in (find_pybind11(), find_python_headers())]

        yield info, "build_info.o", "cpp", flags
        for source in sorted(CSRC.rglob("*.cpp")):
            stem = str(source.relative_to(CSRC).with_suffix(""))
            if stem == "module":
                have = ["-DFASTCONV_HAVE_CUDA"] if self.cuda else []
                yield source, f"{stem}.o", "cpp", flags + have + python
            elif stem.startswith("cuda/"):
                if self.cuda:
                    cuda = ["-isystem", str(self.cuda.include)]
                    yield source, f"{stem}.o", "cpp", flags + torch + cuda
            elif source not in self.kernels:
                yield source, f"{stem}.o", "cpp", flags + torch
        for capability, machine in capabilities.items():
            define = f"-DFASTCONV_CPU_CAPABILITY={capability}"
            for source in self.kernels:
                output = f"cpu/kernels/{source.stem}.{capability}.o"
                yield source, output, "cpp", [*flags, *KERNEL, *machine, define]
        for unit in cuda_units(self.archs) if self.cuda else ():
            generate = [gencode(arch) for arch in unit.archs]
            yield unit.source, unit.output, "cuda", [*CUDA, *unit.defines, *generate]


def _targets(kernels: Iterable[str], targets: Iterable[str]) -> str:
    return f"{', '.join(kernels) or 'no kernels'} for {', '.join(targets)}"


def _info_source(facts: dict) -> str:
    text = f'R"info({MARK}{json.dumps(facts)})info"'
    return f'#include "build_info.h"\nconst char fastconv::kBuildInfo[] = {text};\n'


def _shell(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)

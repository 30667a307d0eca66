"""Builds the CUDA kernels for the CPU: the same sources, with the emulator in place of the GPU.

    python emulator/build.py           prints the library's path
    python emulator/build.py --gcc     without clang, hence blind to plain loads and stores

The libraries lie in build/emulator. Only what changed is compiled, by ninja.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# .ci/run also runs the tests from a copy, beside an installed package: what was built for the checkout serves again.
ROOT = Path(os.environ.get("FASTCONV_SOURCE", Path(__file__).resolve().parents[1])).resolve()
HERE = ROOT / "emulator"
CSRC = ROOT / "csrc"

# The runtime alone, for kernels that do not come from csrc.
RUNTIME = ["block", "block_sync", "block_shared", "block_global", "control", "fiber", "hooks", "memory", "runtime"]
RUNTIME += ["block_clocks", "block_cluster", "block_mbarrier", "block_tma", "block_wgmma", "launches", "tensor_map"]
# These have twins.
TWINNED = [CSRC / "cuda/runtime/device.cpp", CSRC / "cuda/runtime/tensor_map.cpp"]
CLANGS = ["clang++-19", "clang++-20", "clang++-21", "clang++-18", "clang++"]


def import_build() -> Any:
    """The _build package with its modules, without putting the checkout (and its fastconv) on sys.path."""
    if "_build" not in sys.modules:
        folder = ROOT / "_build"
        spec = importlib.util.spec_from_file_location(
            "_build", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["_build"] = importlib.util.module_from_spec(spec)
    import _build.ninjafile

    return _build


def find_clang() -> str | None:
    """A clang++ that instruments plain loads and stores; FASTCONV_EMULATOR_CLANG names one, or is empty for none."""
    named = os.environ.get("FASTCONV_EMULATOR_CLANG")
    candidates = CLANGS if named is None else [named] if named else []
    for name in candidates:
        path = shutil.which(name)
        if path and "-fsanitize=thread" in subprocess.run(
            [path, "-###", "-fsanitize=thread", "-x", "c++", "-c", os.devnull], capture_output=True, text=True
        ).stderr.replace("-fsanitize=thread,", "-fsanitize=thread"):
            return path
    return None


class Emulator:
    """The flags and the objects of one way to build: with clang or without."""

    def __init__(self, clang: str | None, ucontext: bool = False) -> None:
        tools = import_build()
        torch = tools.toolchain.find_torch()
        self._units = list(tools.sources.cuda_units(tools.sources.default_archs()))
        self.clang = clang
        self.compiler = shlex.join(tools.toolchain.find_compiler().command)
        self.folder = ROOT / "build" / "emulator" / (("clang" if clang else "gcc") + ("-ucontext" if ucontext else ""))
        # Kernels know nothing of torch and are shared by all versions of it.
        self.torch_folder = f"torch{torch.version}"
        self.torch_lib = torch.lib
        self.torch_flags = [tools.ninjafile.STABLE_ABI, "-isystem", str(torch.include)]
        native = ["-march=native"] if platform.machine() == "x86_64" else []
        # As nvcc does, a * b + c may become one operation.
        self.flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=fast", *native]
        self.flags += [f"-fmacro-prefix-map={ROOT}/=", f"-I{HERE}/include", f"-I{HERE}", f"-I{CSRC}"]
        if ucontext:
            self.flags.append("-DFASTCONV_EMULATOR_UCONTEXT")
        self.kernel_flags = [*self.flags, "-x", "c++", "-O2", "-gline-tables-only" if clang else "-g1"]
        self.kernel_flags += ["-Wno-unknown-pragmas", "-Wno-pass-failed" if clang else "-Wno-attributes"]
        if clang:
            # Only the loads and stores, each of them: of a load and a store to one place clang would keep the store.
            options = ["func-entry-exit=0", "atomics=0", "read-before-write=1"]
            self.kernel_flags.append("-fsanitize=thread")
            self.kernel_flags += [word for option in options for word in ("-mllvm", f"-tsan-instrument-{option}")]
            self.flags = [*self.flags, "-DFASTCONV_EMULATOR_HOOKS"]

    def write(self) -> None:
        from ninja.ninja_syntax import Writer

        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "build.ninja", "w") as file:
            ninja = Writer(file)
            for rule, compiler in (("cpp", self.compiler), ("kernel", self.clang or self.compiler)):
                command = f"{compiler} -MMD -MF $out.d $flags -c $in -o $out"
                ninja.rule(rule, command, "$out", depfile="$out.d", deps="gcc")
            link = f"{self.compiler} -shared $in -o $out $libraries"
            ninja.rule("link", link, "$out")
            for source, output, rule, flags in self._objects():
                ninja.build(output, rule, str(source), variables={"flags": shlex.join(flags).replace("$", "$$")})
            runtime = [f"emulator/{name}.o" for name in RUNTIME]
            torch = ["-L" + str(self.torch_lib), "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ldl"]
            ninja.build(
                f"{self.torch_folder}/libfastconv_emulated.so",
                "link",
                [output for _, output, _, _ in self._objects() if not output.startswith("tests/")],
                variables={"libraries": shlex.join(torch)},
            )
            for source in sorted(HERE.glob("*.cu")):
                # The runtime first: of inline functions that both have it must not get the instrumented ones.
                objects = [*runtime, f"tests/{source.stem}.cu.o"]
                ninja.build(f"lib{source.stem}.so", "link", objects, variables={"libraries": "-ldl"})

    def _objects(self) -> Iterator[tuple[Path, str, str, list[str]]]:
        """(source, object, rule, flags) of everything to compile."""
        glue = [*self.flags, "-O1", *self.torch_flags, "-DFASTCONV_LIBRARY=fastconv_emulated"]
        for source in [CSRC / "schemas.cpp", *sorted(CSRC.glob("common/*.cpp")), *sorted(CSRC.rglob("cuda/**/*.cpp"))]:
            if source not in TWINNED:
                yield source, f"{self.torch_folder}/{source.relative_to(CSRC).with_suffix('')}.o", "cpp", glue
        yield HERE / "device.cpp", f"{self.torch_folder}/emulator/device.o", "cpp", glue
        for name in RUNTIME:
            flags = [*self.flags, "-O3", "-g1", f'-DFASTCONV_EMULATOR_ROOT="{ROOT}/"']
            yield HERE / f"{name}.cpp", f"emulator/{name}.o", "cpp", flags
        for unit in self._units:
            yield unit.source, unit.output, "kernel", [*self.kernel_flags, *unit.defines]
        for source in sorted(HERE.glob("*.cu")):
            yield source, f"tests/{source.name}.o", "kernel", self.kernel_flags

    def build(self, name: str = "fastconv_emulated", quiet: bool = False) -> Path:
        """The path of a library, up to date. Waits for another process that builds."""
        target = f"{self.torch_folder}/lib{name}.so" if name == "fastconv_emulated" else f"lib{name}.so"
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.write()
            jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
            command = [sys.executable, "-m", "ninja", "-C", str(self.folder), "-k", "0", "-j", jobs, target]
            result = subprocess.run(command, stdout=subprocess.PIPE if quiet else None, text=True)
            if result.returncode:
                raise RuntimeError(f"the emulator was not built\n{result.stdout or ''}")
        return self.folder / target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gcc", action="store_true", help="without clang, hence blind to plain loads and stores")
    print(Emulator(None if parser.parse_args().gcc else find_clang()).build())

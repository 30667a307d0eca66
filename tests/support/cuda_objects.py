"""What nvcc made of the CUDA kernels: registers, local memory and instructions, read from the built library.

python tests/support/cuda_objects.py            compares the built library with cuda_resources.json
python tests/support/cuda_objects.py --write    records it there
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from emulator.build import import_build

RECORD = Path(__file__).with_name("cuda_resources.json")


@dataclass(frozen=True)
class Kernel:
    """One kernel's code for one architecture."""

    registers: int
    stack: int  # bytes of local memory to a thread: spilled registers, arrays with an index that is not constant
    shared: int  # static


def find_cuobjdump() -> str | None:
    """Of the toolkit, or the one that comes with Triton."""
    toolchain = import_build().toolchain
    cuda = toolchain.find_cuda()
    near = [Path(cuda.include).parent / "bin", Path(cuda.nvcc).parent] if cuda else []
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or ()) if triton else ():
        near.append(Path(folder) / "backends/nvidia/bin")
    candidates = [shutil.which("cuobjdump"), *(str(folder / "cuobjdump") for folder in near)]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def library() -> Path:
    """The installed library, or the one that FASTCONV_CUDA_OBJECTS names."""
    from fastconv import _C

    return Path(os.environ.get("FASTCONV_CUDA_OBJECTS") or _C.__file__)


def _dump(*options: str, file: Path | None = None) -> str:
    command = [str(find_cuobjdump()), *options, str(file or library())]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def _readable(names: list[str]) -> dict[str, str]:
    """Of kernels, without fastconv's namespace and the parameters."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True).stdout
    result = {}
    for name, text in zip(names, plain.splitlines(), strict=True):
        text = re.sub(r"\(anonymous namespace\)::|fastconv::cuda::(sm80::)?|^void ", "", text)
        # The parameters are the last parenthesis that is opened outside of <>.
        depth, end = 0, len(text)
        for i, letter in enumerate(text):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = i
                break
        result[name] = text[:end]
    assert len(set(result.values())) == len(names), "two kernels of one name"
    return result


@functools.cache
def kernels() -> dict[str, dict[str, Kernel]]:
    """By architecture and name."""
    found: dict[str, dict[str, Kernel]] = {}
    arch = name = ""
    for line in _dump("-res-usage").splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function\s*:?\s*(\w+):?\s*$", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.setdefault(arch, {})[name] = Kernel(registers, stack + local, shared)
    readable = _readable(sorted({name for each in found.values() for name in each}))
    return {arch: {readable[name]: kernel for name, kernel in sorted(each.items())} for arch, each in found.items()}


@functools.cache
def instructions(arch: str) -> dict[str, set[str]]:
    """The instructions (with all their suffixes) of each kernel."""
    found: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in _dump("-sass", "-arch", arch).splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            current = found.setdefault(match[1], set())
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", line):
            current.add(match[1])
    readable = _readable(sorted(found))
    return {readable[name]: words for name, words in found.items()}


def ptx(folder: Path) -> list[Path]:
    """The PTX in the library, a file for each source."""
    subprocess.run(
        [str(find_cuobjdump()), "-xptx", "all", str(library().resolve())],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return sorted(folder.glob("*.ptx"))


def measured() -> dict[str, Any]:
    """What cuda_resources.json holds."""
    from fastconv import _C

    table = {entry["name"]: [entry["threads"], entry["shared_bytes"]] for entry in _C.kernel_table()}
    return {
        "nvcc": nvcc_version(),
        "table": {"fields": ["threads at most", "dynamic shared bytes"], **table},
        "code": {
            arch: {name: kernel.registers for name, kernel in each.items()} for arch, each in sorted(kernels().items())
        },
    }


def nvcc_version() -> str:
    from fastconv import _C

    match = re.search(r"nvcc ([\d.]+)", _C.build_info()["cuda"])
    return match[1] if match else "none"


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each kernel that is new, gone or changed."""
    lines = []
    pairs = [("table", recorded["table"], now["table"])]
    pairs += [(arch, recorded["code"].get(arch, {}), each) for arch, each in now["code"].items()]
    for what, before, after in pairs:
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                lines.append(f"{what}: {name}: {before.get(name, 'not there')} -> {after.get(name, 'not there')}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"record it in {RECORD.name} instead of comparing")
    if parser.parse_args().write:
        # A line for each kernel
        text = json.dumps(measured(), indent=1)
        text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
        RECORD.write_text(text + "\n")
        print(f"recorded in {RECORD}")
    else:
        changed = differences(json.loads(RECORD.read_text()), measured())
        print("\n".join(changed) or "as recorded")
        sys.exit(bool(changed))

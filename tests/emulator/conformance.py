"""Compares the emulator with a GPU, one function of ptx.cuh and types.cuh at a time.

    python tests/emulator/conformance.py                  what can be done here: compile, emulate, compare
    python tests/emulator/conformance.py --require-gpu    fails where there is no GPU
    python tests/emulator/conformance.py --record         ... and writes the GPU's words to goldens/

Without a GPU the emulator is compared with the recorded words of GPUs, once there are any.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import emulator
from emulator.build import CSRC, HERE, ROOT, _import_build

GOLDENS = HERE / "goldens"
ARCHS = ["80", "90a"]
# A kernel that leaves a word alone shows.
UNWRITTEN = 0xA5A5A5A5
# Of rounded results: float32 sums of at most 17 terms, powf and rsqrtf
TOLERANCE = 1e-5


def words(kind: str, count: int) -> np.ndarray:
    """The input of a case, the same everywhere."""
    random = np.random.default_rng(len(kind))
    if kind == "bits":
        return random.integers(0, 2**32, count, np.uint32)
    if kind == "positive floats":
        return np.exp(random.uniform(-20, 20, count)).astype(np.float32).view(np.uint32)
    if kind == "floats":
        special = [
            0.0,
            -0.0,
            np.inf,
            -np.inf,
            np.nan,
            6.0,
            -6.0,
            65504.0,
            65520.0,
            65519.996,
            6e-8,
            3e-8,
            6.1e-5,
            1e-40,
        ]
        special += [1.0009765625, 1.00048828125, 1.00390625, 1.001953125, 1.0004883, 3.4e38, 2.0**-133]
        values = np.float32(special)
        ordinary = random.standard_normal(count) * 10.0 ** random.integers(-8, 8, count)
        return np.concatenate([values, ordinary.astype(np.float32)])[:count].view(np.uint32)
    _, dtype, values = kind.split(" ", 2)
    sizes = (256, 128, 128) if dtype != "tf32" else (128, 64, 128)
    parts = [random.integers(-8, 9, size).astype(np.float32) for size in sizes]
    if values == "fractions":
        parts = [random.standard_normal(size).astype(np.float32) for size in sizes]
    a, b = (_as_words(part, dtype) for part in parts[:2])
    if values == "low bits":
        # Were these 13 bits not ignored, the sums would be other ones.
        a, b = (part | random.integers(0, 2**13, part.size, np.uint32) for part in (a, b))
    elif dtype == "tf32":
        a, b = (part & np.uint32(0xFFFFE000) for part in (a, b))
    return np.concatenate([a, b, parts[2].view(np.uint32)])


def _as_words(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "half":
        return values.astype(np.float16).view(np.uint32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)
    return values.view(np.uint32).copy()


class Program:
    """The conformance program in one of its two builds."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions
        functions.conformance_cases.restype = ctypes.c_char_p
        functions.conformance_run.restype = ctypes.c_char_p
        self.cases: list[dict[str, Any]] = json.loads(functions.conformance_cases())

    def run_words(self, name: str, given: np.ndarray) -> np.ndarray:
        """A case on an input of one's own."""
        index = [case["name"] for case in self.cases].index(name)
        out = np.full(self.cases[index]["out_words"], UNWRITTEN, np.uint32)
        given = np.ascontiguousarray(given)
        assert given.dtype == np.uint32
        assert given.size == self.cases[index]["in_words"]
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (given, out))
        said = self._functions.conformance_run(ctypes.c_int(index), *pointers).decode()
        if said:
            raise RuntimeError(said)
        return out

    def run(self) -> dict[str, list[int]]:
        """The output words of every case."""
        return {
            case["name"]: self.run_words(case["name"], words(case["input"], case["in_words"])).tolist()
            for case in self.cases
        }


def emulated() -> Program:
    return Program(emulator.load("conformance").functions)


def compile_for_gpu() -> Path | None:
    """The library that nvcc makes of the program; None where there is no nvcc."""
    _, toolchain = _import_build()
    cuda = toolchain.find_cuda()
    if cuda is None:
        return None
    library = ROOT / "build" / "emulator" / "gpu" / "libconformance.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    # PTX of the first one: for later GPUs
    archs.append(f"-gencode=arch=compute_{ARCHS[0]},code=compute_{ARCHS[0]}")
    flags = ["-std=c++20", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static", f"-I{CSRC}", f"-I{HERE}"]
    sources = [HERE / "conformance.cu", HERE / "gpu" / "conformance_memory.cu"]
    subprocess.run([cuda.nvcc, *flags, *archs, *map(str, sources), "-o", str(library)], check=True)
    return library


def compare(cases: list[dict[str, Any]], mine: dict[str, list[int]], theirs: dict[str, list[int]]) -> list[str]:
    """One line for every case in which the two differ."""
    problems = []
    for case in cases:
        name = case["name"]
        if name not in theirs:
            problems.append(f"{name}: not among the recorded cases; record again")
            continue
        left, right = (np.array(output[name], np.uint32) for output in (mine, theirs))
        equal = left == right
        if case["exact"]:
            # A float's NaN may have other bits; of integers, none of these words is one by chance.
            both_nan = np.isnan(left.view(np.float32)) & np.isnan(right.view(np.float32))
            equal |= both_nan & (case["input"] != "bits")
        else:
            equal |= np.isclose(left.view(np.float32), right.view(np.float32), rtol=TOLERANCE, atol=TOLERANCE)
        if not equal.all():
            at = int(np.argmin(equal))
            count = int((~equal).sum())
            problems.append(f"{name}: {count} of {equal.size} words, word {at}: {left[at]:08x} and {right[at]:08x}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--require-gpu", action="store_true", help="fail where there is no GPU")
    parser.add_argument("--record", action="store_true", help="write the GPU's words to tests/emulator/goldens")
    options = parser.parse_args()

    program = emulated()
    mine = program.run()
    print(f"emulated: {len(mine)} cases ran")
    library = compile_for_gpu()
    print(f"compiled for sm_{', sm_'.join(ARCHS)}" if library else "not compiled: there is no nvcc")

    import torch

    problems = []
    if library and torch.cuda.is_available():
        theirs = Program(ctypes.CDLL(str(library))).run()
        gpu = torch.cuda.get_device_name()
        problems += [f"{gpu}: {line}" for line in compare(program.cases, mine, theirs)]
        print(f"compared with {gpu}")
        if options.record:
            GOLDENS.mkdir(exist_ok=True)
            file = GOLDENS / f"{gpu.lower().replace(' ', '-')}.json"
            file.write_text(json.dumps({"gpu": gpu, "cuda": torch.version.cuda, "cases": theirs}) + "\n")
            print(f"recorded in {file}")
    elif options.require_gpu or options.record:
        problems.append("there is no GPU here" if library else "there is no nvcc here")
    else:
        print("not compared with a GPU: there is none here")
    for file in sorted(GOLDENS.glob("*.json")):
        problems += [
            f"{file.name}: {line}" for line in compare(program.cases, mine, json.loads(file.read_text())["cases"])
        ]
        print(f"compared with {file.name}")
    print("\n".join(["DIFFERENT", *problems]) if problems else "no difference")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

"""Compares the emulator with a GPU, one function of ptx/sm80.cuh and runtime/types.cuh at a time.

    python emulator/conformance.py                  what can be done here: compile, emulate, compare
    python emulator/conformance.py --require-gpu    fails where there is no GPU
    python emulator/conformance.py --record         ... and writes the GPU's words to goldens/

The GPU is asked first, each case in a process of its own: what one of them breaks costs the others nothing. Without a
GPU the emulator is compared with the recorded words of GPUs, once there are any. Without clang it does not see plain
stores, and the cases that need them are left out.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import emulator
from emulator.build import CSRC, HERE, ROOT, find_clang, import_build

GOLDENS = HERE / "goldens"
ARCHS = import_build().sources.default_archs()
# A kernel that leaves a word alone shows.
UNWRITTEN = 0xA5A5A5A5
# Of rounded results: float32 sums of at most 17 terms, powf and rsqrtf
TOLERANCE = 1e-5
CASE_SECONDS = 30

Outputs = dict[str, list[int]]


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

    def run_case(self, name: str) -> list[int]:
        """The output words of a case."""
        case = next(case for case in self.cases if case["name"] == name)
        return self.run_words(name, words(case["input"], case["in_words"])).tolist()

    def run(self) -> tuple[Outputs, list[str]]:
        """The output words of every case; a line for each that failed."""
        outputs, problems = {}, []
        for case in self.cases:
            try:
                outputs[case["name"]] = self.run_case(case["name"])
            except RuntimeError as error:
                problems.append(f"{case['name']}: {error}")
        return outputs, problems


def emulated() -> Program:
    return Program(emulator.load("conformance").functions)


def compile_for_gpu() -> Path | None:
    """The library that nvcc makes of the program, unless it did before; None where there is neither."""
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    # PTX of the first one: for later GPUs
    archs.append(f"-gencode=arch=compute_{ARCHS[0]},code=compute_{ARCHS[0]}")
    flags = ["-std=c++20", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static", *archs]
    sources = [HERE / "conformance.cu", HERE / "gpu" / "conformance_memory.cu"]
    headers = sorted(path for folder in ("common", "cuda") for path in (CSRC / folder).rglob("*.*h"))
    digest = hashlib.sha256(repr(flags).encode())
    for path in [*sources, HERE / "conformance_memory.h", *headers]:
        digest.update(path.read_bytes())
    library = ROOT / "build" / "emulator" / "gpu" / f"libconformance-{digest.hexdigest()[:12]}.so"
    if library.exists():
        return library
    toolchain = import_build().toolchain
    cuda = toolchain.find_cuda()
    if cuda is None:
        return None
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_suffix(f".{os.getpid()}")
    command = [cuda.nvcc, *flags, f"-I{CSRC}", f"-I{HERE}", *map(str, sources), "-o", str(fresh)]
    subprocess.run(command, check=True)
    return fresh.rename(library)


def ask_gpu(library: Path) -> tuple[Outputs, list[str]]:
    """The GPU's output words of every case; a line for each that failed."""

    def ask(name: str) -> tuple[Outputs, list[str]]:
        command = [sys.executable, __file__, "--case", name, "--library", str(library)]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=CASE_SECONDS)
        except subprocess.TimeoutExpired:
            return {}, [f"{name}: it took more than {CASE_SECONDS} s"]
        if process.returncode == 0:
            return {name: json.loads(process.stdout)}, []
        said = process.stderr.strip().splitlines() or [f"it ended with status {process.returncode}"]
        return {}, [f"{name}: {said[-1]}"]

    outputs, problems = {}, []
    with ThreadPoolExecutor(8) as pool:
        for found, failed in pool.map(ask, [case["name"] for case in Program(ctypes.CDLL(str(library))).cases]):
            outputs |= found
            problems += failed
    return outputs, problems


def compare(cases: list[dict[str, Any]], mine: Outputs, theirs: Outputs) -> list[str]:
    """One line for every case in which the two differ, among those that mine has."""
    problems = []
    for case in cases:
        name = case["name"]
        if name not in mine:
            continue
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
    parser.add_argument("--record", action="store_true", help="write the GPU's words to emulator/goldens")
    parser.add_argument("--case", metavar="NAME", help="only print the words of this case ...")
    parser.add_argument("--library", help="... as this build of the program has them")
    options = parser.parse_args()
    if options.case:
        print(Program(ctypes.CDLL(options.library)).run_case(options.case))
        return 0

    library = compile_for_gpu()
    print(f"compiled for sm_{', sm_'.join(ARCHS)}" if library else "not compiled: there is no nvcc", flush=True)

    import torch

    problems, compared, gpu, recorded = [], {}, None, None
    if library and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        compared[gpu], failed = ask_gpu(library)
        problems += [f"{gpu}: {line}" for line in failed]
        print(f"{gpu}: {len(compared[gpu])} cases ran", *problems, sep="\n", flush=True)
        if options.record:
            GOLDENS.mkdir(exist_ok=True)
            recorded = GOLDENS / f"{gpu.lower().replace(' ', '-')}.json"
            document = {"gpu": gpu, "cuda": torch.version.cuda, "cases": compared[gpu]}
            recorded.write_text(json.dumps(document) + "\n")
            print(f"recorded in {recorded}", flush=True)
    elif options.require_gpu or options.record:
        problems.append("there is no GPU here" if library else "there is no nvcc here")
    else:
        print("not compared with a GPU: there is none here")
    for file in sorted(set(GOLDENS.glob("*.json")) - {recorded}):
        compared[file.name] = json.loads(file.read_text())["cases"]

    program = emulated()
    mine, failed = program.run()
    print(f"emulated: {len(mine)} cases ran")
    if find_clang() is None:
        print(*(f"left out, there is no clang: {line}" for line in failed), sep="\n")
    else:
        problems += [f"emulated: {line}" for line in failed]
    for name, theirs in compared.items():
        # What failed on the GPU that is here was said above.
        cases = [case for case in program.cases if name != gpu or case["name"] in theirs]
        problems += [f"{name}: {line}" for line in compare(cases, mine, theirs)]
        print(f"compared with {name}")
    print("\n".join(["DIFFERENT", *problems]) if problems else "no difference")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

"""Compares the emulator with a GPU, one function of csrc/cuda/ptx and runtime/types.cuh at a time.

    python emulator/conformance.py                  what can be done here: emulate, compare
    python emulator/conformance.py --require-gpu    fails where there is no GPU, or no library for it
    python emulator/conformance.py --record         ... and writes the GPU's words to goldens/, or to the folder named
    python emulator/conformance.py --expected       writes what `fastconv.qualify` compares a user's GPU with

The cases are those of csrc/cuda/conformance: fastconv._C has them for the GPU, the emulator's library for this.

The GPU is asked first, each case that is for it in a process of its own: what one of them breaks costs the others
nothing. Without a GPU the emulator is compared with the recorded words of GPUs, once there are any. Without clang it
does not see plain stores, and the cases that need them are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import emulator
from emulator.build import HERE, find_clang
from fastconv.operators import backends, kernels
from fastconv.qualification import conformance_cases
from fastconv.qualification.conformance_cases import Case, arch_of, compared, expectation, possible, run_case

GOLDENS = HERE / "goldens"
EMULATED = "cuda-emulated"
CASE_SECONDS = 60  # with torch to import, and code to compile for later GPUs

Outputs = dict[str, list[int]]


def cases(backend: str) -> dict[str, Case]:
    """Those of fastconv._C ("cuda") or of the emulator's library, which is built at first use."""
    if backend == EMULATED and kernels.library_of(EMULATED) is None:
        kernels.add(EMULATED, emulator.library())
    return conformance_cases.cases(backend)


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "cuda" else "cpu")


def run(backend: str, name: str) -> list[int]:
    """The output words of a case."""
    return run_case(backend, cases(backend)[name], device_of(backend))


def emulate() -> tuple[Outputs, list[str]]:
    """The emulator's output words of every case; a line for each that failed."""
    outputs, problems = {}, []
    for name in cases(EMULATED):
        try:
            outputs[name] = run(EMULATED, name)
        except RuntimeError as error:
            problems.append(f"{name}: {error}")
    return outputs, problems


def ask_gpu(backend: str = "cuda") -> tuple[Outputs, list[str]]:
    """The GPU's output words of every case that is for it; a line for each that failed."""

    def ask(name: str) -> tuple[Outputs, list[str]]:
        command = [sys.executable, __file__, "--case", name, "--backend", backend]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=CASE_SECONDS)
        except subprocess.TimeoutExpired:
            return {}, [f"{name}: it took more than {CASE_SECONDS} s"]
        if process.returncode == 0:
            return {name: json.loads(process.stdout)}, []
        said = process.stderr.strip().splitlines() or [f"it ended with status {process.returncode}"]
        return {}, [f"{name}: {said[-1]}"]

    outputs, problems = {}, []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found, failed in pool.map(ask, possible(cases(backend), device_of(backend))):
            outputs |= found
            problems += failed
    return outputs, problems


def compare(mine: Outputs, theirs: Outputs, arch: int) -> list[str]:
    """One line for every case in which the two differ, among those that mine has and that are for such a GPU."""
    problems = []
    for name, case in cases(EMULATED).items():
        if name not in mine or not case.runs_on(arch):
            continue
        if name not in theirs:
            problems.append(f"{name}: not among the recorded cases; record again")
        elif difference := compared(case, mine[name], theirs[name]):
            problems.append(difference)
    return problems


def write_expected(mine: Outputs) -> None:
    """One line for each case."""
    lines = [f"{json.dumps(name)}: {json.dumps(expectation(cases(EMULATED)[name], mine[name]))}" for name in mine]
    conformance_cases.EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--require-gpu", action="store_true", help="fail where there is no GPU")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=GOLDENS,
        metavar="FOLDER",
        help="write the GPU's words to this folder; default: emulator/goldens",
    )
    parser.add_argument("--expected", action="store_true", help="write the emulator's words for `fastconv.qualify`")
    parser.add_argument("--case", metavar="NAME", help="only print the words of this case ...")
    parser.add_argument("--backend", default="cuda", choices=("cuda", EMULATED), help="... by this library")
    options = parser.parse_args()
    if options.case:
        print(run(options.backend, options.case))
        return 0

    problems, theirs, archs, gpu, recorded = [], {}, {}, None, None
    no_gpu = backends.problem("cuda")
    if no_gpu is None:
        gpu = torch.cuda.get_device_name()
        archs[gpu] = arch_of(device_of("cuda"))
        theirs[gpu], failed = ask_gpu()
        problems += [f"{gpu}: {line}" for line in failed]
        print(f"{gpu}: {len(theirs[gpu])} cases ran", *problems, sep="\n", flush=True)
        if options.record:
            options.record.mkdir(parents=True, exist_ok=True)
            recorded = options.record / f"{gpu.lower().replace(' ', '-')}.json"
            document = {"gpu": gpu, "arch": archs[gpu], "cuda": torch.version.cuda, "cases": theirs[gpu]}
            recorded.write_text(json.dumps(document) + "\n")
            print(f"recorded in {recorded}", flush=True)
    elif options.require_gpu or options.record:
        problems.append(no_gpu)
    else:
        print(f"not compared with a GPU: {no_gpu}")
    for file in sorted(set(GOLDENS.glob("*.json")) - {recorded}):
        document = json.loads(file.read_text())
        theirs[file.name], archs[file.name] = document["cases"], document["arch"]

    mine, failed = emulate()
    print(f"emulated: {len(mine)} cases ran")
    if find_clang() is None:
        print(*(f"left out, there is no clang: {line}" for line in failed), sep="\n")
    else:
        problems += [f"emulated: {line}" for line in failed]
    for name, words in theirs.items():
        # What failed on the GPU that is here was said above.
        some = {case: mine[case] for case in mine if name != gpu or case in words}
        problems += [f"{name}: {line}" for line in compare(some, words, archs[name])]
        print(f"compared with {name}")
    if options.expected and failed:
        problems.append(f"{conformance_cases.EXPECTED.name} was not written: it needs every case, hence clang")
    elif options.expected:
        write_expected(mine)
        print(f"written to {conformance_cases.EXPECTED}")
    print("\n".join(["DIFFERENT", *problems]) if problems else "no difference")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

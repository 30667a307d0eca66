"""Builds, proves and times the GPU kernels, in one go: `make gpu-check OUT=folder`.

Each step runs in a process of its own, with a limit; what it prints goes to a file in the folder, and a step that
fails does not stop the ones that do not need it. `summary.json` says how each ended. Where there is no GPU this is a
dry run: the steps that need none are run, of the others the command is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]


@dataclass
class Step:
    """One command.

    Attributes:
        limit: seconds.
        dry: what to run instead where there is no GPU; None if there is nothing to try.
        environ: added to the environment.
    """

    name: str
    command: list[str]
    limit: int
    dry: list[str] | None = None
    environ: dict[str, str] = field(default_factory=dict)


def steps(out: Path, workers: int) -> list[Step]:
    """In the order of their worth: the time may run out."""
    collect = [*PYTEST, "--collect-only", "-m", ""]
    cuda = ["tests", "-m", "", "--only-backend", "cuda"]
    triton = ["tests/test_triton.py", "tests/test_triton_dispatch.py"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all"]
    every_kernel = ["tests/test_cuda_conv2d.py", "--only-backend", "cuda", "-k", "every_kernel and (fp16 or fp32)"]
    light = ["tests/test_cuda_device.py", "--only-backend", "cuda", "-k", "same_bits"]
    timed = [*PYTEST, *shlex.split("benchmarks --device cuda --dtype fp16 --batch 32 --quick")]
    networks = [PYTHON, "-m", "fastconv", "bench", "--device", "cuda", "--train", "--minutes", "1.2"]
    networks += shlex.split("--dtypes fp16 --batches 1 64")
    networks += ["--networks", "resnet50", "googlenet", "alexnet2012", "torchvision:mobilenet_v2"]
    build = [PYTHON, "setup.py", "build_ext", "--inplace"]
    conformance = [PYTHON, "tests/emulator/conformance.py"]
    found = [
        Step("build", build, 240, build, {"FASTCONV_CUDA": "1", **_archs()}),
        Step("info", [PYTHON, "-m", "fastconv", "info"], 60, [PYTHON, "-m", "fastconv", "info"]),
        Step("conformance", [*conformance, "--require-gpu", "--record"], 120, conformance),
        Step("numerics-cuda", [*PYTEST, *cuda, "-n", str(workers)], 180, [*collect, *cuda]),
        Step("numerics-triton", [*PYTEST, *triton, "-n", str(workers)], 120, [*collect, *triton]),
        Step("memcheck", [*sanitizer, "--tool", "memcheck", *PYTEST, *every_kernel], 90, [*collect, *every_kernel]),
        Step("racecheck", [*sanitizer, "--tool", "racecheck", *PYTEST, *light], 60, [*collect, *light]),
    ]
    for backend in ("cuda", "triton"):
        name = f"time-ops-{backend}"
        command = [*timed, "--backend", backend, "--benchmark-json", str(out / f"{name}.json")]
        found.append(Step(name, command, 120))
        name = f"time-networks-{backend}"
        found.append(Step(name, [*networks, "--backend", backend, "--json", str(out / f"{name}.json")], 120))
    return found


def _archs() -> dict[str, str]:
    """To build for the GPU that is here, and no other."""
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"FASTCONV_CUDA_ARCHS": f"{major}{minor}{'a' if major == 9 else ''}"}


def run(step: Step, command: list[str], out: Path, limit: float) -> dict[str, object]:
    started = time.monotonic()
    log = out / f"{step.name}.txt"
    with open(log, "w") as file:
        try:
            process = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **step.environ},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
            )
            outcome = "passed" if process.returncode == 0 else f"FAILED ({process.returncode})"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED (more than {limit:.0f} s)"
        except FileNotFoundError:
            outcome = f"FAILED ({command[0]} is not installed)"
    seconds = time.monotonic() - started
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {"outcome": outcome, "seconds": round(seconds, 1), "last line": lines[-1][:200] if lines else ""}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for what is found; made if there is none")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no step is started; default: 9.5")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    has_gpu = torch.cuda.is_available()
    print(torch.cuda.get_device_name() if has_gpu else "no GPU: a dry run", f"-> {out}", flush=True)
    deadline = time.monotonic() + 60 * args.minutes
    summary = {}
    for step in steps(out, workers=min(8, os.cpu_count() or 1)):
        if args.only and step.name not in args.only:
            continue
        command = step.command if has_gpu else step.dry
        left = deadline - time.monotonic()
        if command is None:
            result = {"outcome": "needs a GPU"}
        elif left < 10:
            result = {"outcome": "left out: no time"}
        else:
            result = run(step, command, out, min(step.limit, left))
        summary[step.name] = {**asdict(step), **result}
        print(
            f"{step.name:<22}{result['outcome']:<28}{result.get('seconds', ''):>6}  {result.get('last line', '')}",
            flush=True,
        )
        if not has_gpu:
            print(f"{'':<22}with a GPU: {shlex.join(step.command)}", flush=True)
    for golden in sorted((ROOT / "tests/emulator/goldens").glob("*.json")):
        shutil.copy(golden, out)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return any(str(step["outcome"]).startswith("FAILED") for step in summary.values())


if __name__ == "__main__":
    sys.exit(main())

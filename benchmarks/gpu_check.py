"""Builds, proves and times the GPU kernels, in one go: `make gpu-check OUT=folder`.

Each step runs in a process of its own, with a limit; what it prints goes to a file in the folder, and a step that
fails does not stop the others. Steps that prove run side by side, those that time alone. `summary.json` says how each
ended. Where there is no GPU this is a dry run: the steps that need none are run, of the others the command is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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
        limit: seconds, after which it is interrupted.
        dry: what to run instead where there is no GPU; None if there is nothing to try.
        environ: added to the environment.
    """

    name: str
    command: list[str]
    limit: int
    dry: list[str] | None = None
    environ: dict[str, str] = field(default_factory=dict)


def stages(out: Path, workers: int) -> list[list[Step]]:
    """One after the other, in the order of their worth: the time may run out. The steps of a stage run side by side."""
    collect = [*PYTEST, "--collect-only", "-m", ""]
    cuda = ["tests", "-m", "", "--only-backend", "cuda"]
    triton = ["tests/test_triton.py", "tests/test_triton_dispatch.py"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all", "--tool"]
    every_kernel = ["tests/test_cuda_conv2d.py", "--only-backend", "cuda", "-k", "every_kernel and (fp16 or fp32)"]
    light = ["tests/test_cuda_device.py", "--only-backend", "cuda", "-k", "same_bits"]
    timed = [*PYTEST, *shlex.split("benchmarks --device cuda --dtype fp16 --batch 32 --quick")]
    networks = [PYTHON, "-m", "fastconv", "bench", "--device", "cuda", "--train", "--minutes", "1.2"]
    networks += shlex.split("--dtypes fp16 --batches 1 64")
    networks += ["--networks", "resnet50", "googlenet", "alexnet2012", "torchvision:mobilenet_v2"]
    build = [PYTHON, "setup.py", "build_ext", "--inplace"]
    conformance = [PYTHON, "tests/emulator/conformance.py"]
    found = [
        [Step("build", build, 240, build, {"FASTCONV_CUDA": "1", **_archs()})],
        [
            Step("info", [PYTHON, "-m", "fastconv", "info"], 60, [PYTHON, "-m", "fastconv", "info"]),
            Step("conformance", [*conformance, "--require-gpu", "--record"], 120, conformance),
            Step("numerics-cuda", [*PYTEST, *cuda, "-n", str(workers)], 180, [*collect, *cuda]),
            Step("numerics-triton", [*PYTEST, *triton, "-n", str(workers)], 180, [*collect, *triton]),
            Step("memcheck", [*sanitizer, "memcheck", *PYTEST, *every_kernel], 180, [*collect, *every_kernel]),
            Step("racecheck", [*sanitizer, "racecheck", *PYTEST, *light], 180, [*collect, *light]),
        ],
    ]
    for backend in ("cuda", "triton"):
        name = f"time-ops-{backend}"
        # torch.compile's times are in the first of the two.
        others = [] if backend == "cuda" else ["-k", "not compile"]
        command = [*timed, *others, "--backend", backend, "--benchmark-json", str(out / f"{name}.json")]
        found.append([Step(name, command, 150)])
        name = f"time-networks-{backend}"
        found.append([Step(name, [*networks, "--backend", backend, "--json", str(out / f"{name}.json")], 150)])
    return found


def _archs() -> dict[str, str]:
    """To build for the GPU that is here, and no other."""
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"FASTCONV_CUDA_ARCHS": f"{major}{minor}{'a' if major == 9 else ''}"}


class Run:
    """A command under way, alone in its process group: what it leaves behind must not disturb the times of others."""

    GRACE = 20  # seconds after the interruption, for pytest and `fastconv bench` to write what they have

    def __init__(self, step: Step, command: list[str], out: Path, limit: float) -> None:
        self._log = out / f"{step.name}.txt"
        self._limit = limit
        self._started = time.monotonic()
        self._interrupted = False
        with open(self._log, "w") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **step.environ},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell's background jobs ignore interruptions, and so would what they start.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )

    def result(self) -> dict[str, object] | None:
        """How it ended; None while it runs. Ends it when it is over its limit."""
        code = self._process.poll()
        seconds = time.monotonic() - self._started
        if code is None:
            if seconds > self._limit + self.GRACE:
                self.signal(signal.SIGKILL)
            elif seconds > self._limit and not self._interrupted:
                self._interrupted = True
                self.signal(signal.SIGINT)
            return None
        self.signal(signal.SIGKILL)
        outcome = "passed" if code == 0 else f"FAILED ({code})"
        if self._interrupted:
            outcome = f"FAILED (more than {self._limit:.0f} s)"
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return {"outcome": outcome, "seconds": round(seconds, 1), "last line": lines[-1][:200] if lines else ""}

    def signal(self, number: signal.Signals) -> None:
        """To the command and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def run(stage: list[Step], out: Path, has_gpu: bool, deadline: float) -> Iterator[tuple[Step, dict[str, object]]]:
    """The steps of a stage with their results, in the order in which they end."""
    running: dict[str, tuple[Step, Run]] = {}
    try:
        for step in stage:
            command = step.command if has_gpu else step.dry
            left = deadline - time.monotonic()
            if command is None:
                yield step, {"outcome": "needs a GPU"}
            elif left < 10:
                yield step, {"outcome": "left out: no time"}
            elif shutil.which(command[0]) is None:
                yield step, {"outcome": f"FAILED ({command[0]} is not installed)"}
            else:
                running[step.name] = step, Run(step, command, out, min(step.limit, left))
        while running:
            for name, (step, process) in list(running.items()):
                result = process.result()
                if result is not None:
                    del running[name]
                    yield step, result
            time.sleep(0.1)
    finally:
        for _, process in running.values():
            process.signal(signal.SIGKILL)


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
    for stage in stages(out, workers=min(8, os.cpu_count() or 1)):
        wanted = [step for step in stage if not args.only or step.name in args.only]
        for step, result in run(wanted, out, has_gpu, deadline):
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

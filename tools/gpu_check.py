"""Builds, proves and times the GPU kernels: `make gpu-check OUT=folder`, or PART=proofs and PART=timings alone.

Each step runs in a process of its own, with a limit, and a step that fails does not stop the others. Steps that prove
run side by side, those that time alone. What they print and measure is in one archive, `files.tar.gz`; `summary.json`
says how each ended, `rows.jsonl` has the times of single layers. All three are written anew after each step.

Where there is no GPU this is a dry run: the steps that need none are run, of the others enough to see that they start.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "emulator" / "goldens"
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
# Of all of it, and of a part: with room below ten minutes, as a command on a borrowed GPU may be limited to.
MINUTES = {"all": 8.5, "proofs": 5.5, "timings": 5.5}

NO_TIME = "left out: no time"

# Succeeds where the library was built from these sources, for the architecture that is named: here or elsewhere.
IS_BUILT = """
import sys
from _build.ninjafile import source_hash
from fastconv.operators import library
facts = library.build_info()
sys.exit(not (library.LOADED and facts["source_hash"] == source_hash() and sys.argv[1] in facts["cuda"]))
"""

FIND_GPU = """
import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), sep="\\n")
"""


@dataclass
class Step:
    """One command.

    Attributes:
        limit: seconds, after which it is interrupted.
        dry: what to run instead where there is no GPU; None if there is nothing to try.
        environ: added to the environment.
        unless: a command; where it succeeds there is nothing to do.
    """

    name: str
    command: list[str]
    limit: int
    dry: list[str] | None = None
    environ: dict[str, str] = field(default_factory=dict)
    unless: list[str] | None = None


def find_gpu() -> tuple[str, str] | None:
    """Its name, and its architecture as nvcc has it."""
    process = subprocess.run([PYTHON, "-c", FIND_GPU], stdout=subprocess.PIPE, text=True, check=True)
    if not process.stdout:
        return None
    name, major, minor = process.stdout.splitlines()
    return name, f"{major}{minor}{'a' if major == '9' else ''}"


def stages(part: str, arch: str | None, files: Path) -> list[list[Step]]:
    """One after the other, in the order of their worth: the time may run out. The steps of a stage run side by side."""
    build = [PYTHON, "setup.py", "build_ext", "--inplace"]
    # Memory that is free for compilers looks scarce on a machine that has just started.
    environ = {"FASTCONV_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1)}
    if arch:
        environ["FASTCONV_CUDA_ARCHS"] = arch
    is_built = [PYTHON, "-c", IS_BUILT, f"sm_{arch or ''}"]
    found = [[Step("build", build, 240, build, environ, is_built)]]
    found += _proofs(files) if part != "timings" else []
    found += _timings(files) if part != "proofs" else []
    return found


def _proofs(files: Path) -> list[list[Step]]:
    conformance = [PYTHON, "emulator/conformance.py"]
    info, machine = [PYTHON, "-m", "fastconv", "info"], [PYTHON, "tools/machine.py"]
    kernels = [f"tests/kernels/cuda/test_cuda_{name}.py" for name in ("conv2d", "depthwise", "elementwise")]
    rooms = ("kernels/cuda/test_cuda_device", "kernels/cuda/test_choices")
    rooms += ("ops/test_op_numerics", "kernels/test_kernel_networks")
    networks = [f"tests/{name}.py" for name in rooms]
    triton = ["tests/kernels/triton"]
    on_cuda = ["--only-backend", "cuda", "-m", ""]
    return [
        [
            Step("info", info, 60, info),
            Step("conformance", [*conformance, "--require-gpu", "--record"], 90, conformance),
        ],
        [Step("machine", machine, 40, machine)],
        [_pytest("every-kernel", [*kernels, *on_cuda, "-k", "test_every", "-rA"], 80)],
        [_timed("first-numbers", files, "--backend cuda --quick", "forward and channels_last and not compile", 50)],
        [
            _pytest("numerics-cuda", [*kernels, *networks, *on_cuda, "-k", "not test_every"], 150),
            _pytest("numerics-triton", [*triton, "-m", "", "-k", "not compiles"], 150),
            _sanitized("memcheck-conv2d", kernels[:1], "test_every and (fp16 or fp32)"),
            _sanitized("memcheck-others", kernels[1:], "test_every and float16"),
            # Of the pipelines: kernels without asynchronous copies have little to race with.
            _sanitized("racecheck", kernels[:2], "(test_every_kernel and fp16) or separable_kernel"),
        ],
    ]


def _pytest(name: str, arguments: list[str], limit: int) -> Step:
    workers = []
    if importlib.util.find_spec("xdist"):
        workers = ["-n", str(min(8, os.cpu_count() or 1)), "--max-worker-restart", "100"]
    command = [*PYTEST, *arguments, "--test-seconds", "60"]
    return Step(name, [*command, *workers], limit, [*command, "--collect-only"])


def _sanitized(name: str, tests: list[str], chosen: str) -> Step:
    command = [*PYTEST, *tests, "--only-backend", "cuda", "-m", "", "-k", chosen, "--test-seconds", "120"]
    sanitizer = ["compute-sanitizer", "--tool", name.partition("-")[0]]
    sanitizer += ["--target-processes", "all", "--error-exitcode", "9"]
    # torch's kernels, and its questions to the driver, are none of ours.
    sanitizer += ["--kernel-regex", "kns=fastconv", "--report-api-errors", "no"]
    # Without torch's cache each tensor is an allocation of its own, and what reaches beyond it is seen.
    environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(name, [*sanitizer, *command], 150, [*command, "--collect-only"], environ)


def _timings(files: Path) -> list[list[Step]]:
    return [
        [step]
        for step in (
            _timed("ops-cuda", files, "--backend cuda", "forward and channels_last and not compile", 90),
            _networks("networks-cuda", files, "--backend cuda --batches 1 64 --no-compile", 70),
            _timed("ops-triton", files, "--backend triton", "forward and fastconv and channels_last", 90),
            _timed("ops-cuda-backward", files, "--backend cuda", "backward and channels_last and not compile", 90),
            _networks("networks-triton", files, "--backend triton --batches 1 64 --no-compile", 70),
            _timed("ops-cuda-1", files, "--backend cuda --batch 1", "forward and channels_last and not compile", 70),
            _networks("networks-compile", files, "--backend cuda --batches 64", 90),
            _timed("ops-compile", files, "--backend cuda", "forward and compile", 160),
        )
    ]


def _timed(name: str, files: Path, options: str, chosen: str, limit: int) -> Step:
    """All layers in float16, the rows of which survive whatever comes."""
    command = [*PYTEST, "benchmarks", "--device", "cuda", "--dtype", "fp16", "--benchmark-max-time", "0.02"]
    command += [*shlex.split(f"--batch 32 {options}"), "-k", chosen, "--rows", str(files / "rows.jsonl")]
    return Step(name, command, limit, [*command, "--device", "cpu", "--backend", "auto", "--collect-only"])


def _networks(name: str, files: Path, options: str, limit: int) -> Step:
    command = [PYTHON, "-m", "fastconv", "bench", "--device", "cuda", "--dtypes", "fp16", "--train"]
    command += ["--minutes", f"{limit / 75:.1f}", *shlex.split(options), "--json", str(files / f"{name}.json")]
    command += ["--networks", "resnet50", "googlenet", "alexnet2012", "torchvision:mobilenet_v2"]
    small = shlex.split("--device cpu --dtypes fp32 --batches 1 --minutes 0 --backend auto --networks lenet5")
    return Step(name, command, limit, [*command, *small])


class Run:
    """A command under way, alone in its process group: what it leaves behind must not disturb the times of others."""

    GRACE = 20  # seconds after the interruption, for pytest and `fastconv bench` to write what they have

    def __init__(self, step: Step, command: list[str], files: Path, limit: float) -> None:
        self._log = files / f"{step.name}.txt"
        self._limit = limit
        self._started = time.monotonic()
        self._interrupted = False
        with open(self._log, "w") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**_environ(), **step.environ},
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


def _environ() -> dict[str, str]:
    """With the checkout's package, where none is installed."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT)}


def run(stage: list[Step], files: Path, has_gpu: bool, deadline: float) -> Iterator[tuple[Step, dict[str, object]]]:
    """The steps of a stage with their results, in the order in which they end."""
    running: dict[str, tuple[Step, Run]] = {}
    try:
        for step in stage:
            command = step.command if has_gpu else step.dry
            left = deadline - time.monotonic() - Run.GRACE
            if command is None:
                yield step, {"outcome": "needs a GPU"}
            elif left < 10:
                yield step, {"outcome": NO_TIME}
            elif shutil.which(command[0]) is None:
                yield step, {"outcome": f"FAILED ({command[0]} is not installed)"}
            elif step.unless and _succeeds(step.unless):
                yield step, {"outcome": "passed", "last line": "there was nothing to do"}
            else:
                running[step.name] = step, Run(step, command, files, min(step.limit, left))
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


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, cwd=ROOT, env=_environ(), capture_output=True).returncode == 0


def save(out: Path, summary: dict[str, dict[str, object]], files: Path) -> None:
    """A few files, whatever there is of logs and results."""
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    fresh = out / "files.tar.gz.new"
    with tarfile.open(fresh, "w:gz") as archive:
        for path in [*sorted(files.iterdir()), *sorted(GOLDENS.glob("*.json"))]:
            archive.add(path, path.name)
    fresh.replace(out / "files.tar.gz")
    if (files / "rows.jsonl").exists():
        shutil.copy(files / "rows.jsonl", out)


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for what is found; made if there is none")
    parser.add_argument("--part", choices=MINUTES, default="all", help="proofs, timings, or all (default)")
    default = ", ".join(f"{minutes:g} of {part}" for part, minutes in MINUTES.items())
    parser.add_argument("--minutes", type=float, help=f"after which all has ended; default: {default}")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = started + 60 * (args.minutes or MINUTES[args.part])
    name, arch = find_gpu() or (None, None)
    print(name or "no GPU: a dry run", f"-> {out}", flush=True)
    summary: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        for stage in stages(args.part, arch, files):
            wanted = [step for step in stage if not args.only or step.name in args.only]
            for step, result in run(wanted, files, name is not None, deadline):
                summary[step.name] = {**asdict(step), **result}
                save(out, summary, files)
                print(
                    f"{step.name:<22}{result['outcome']:<28}{result.get('seconds', ''):>6}  "
                    f"{result.get('last line', '')}",
                    flush=True,
                )
                if name is None:
                    print(f"{'':<22}with a GPU: {shlex.join(step.command)}", flush=True)
    missing = [name for name, step in summary.items() if step["outcome"] == NO_TIME]
    if missing:
        print(f"left out for lack of time: {', '.join(missing)}", flush=True)
    return bool(missing) or any(str(step["outcome"]).startswith("FAILED") for step in summary.values())


if __name__ == "__main__":
    sys.exit(main())

"""Builds, proves and times the GPU kernels: `make gpu-check OUT=folder`, in nine and a half minutes.

Each step runs in a process of its own, with a limit, and a step that fails does not stop the others. Steps that prove
run side by side, those that time alone. All that they print and measure is in one archive, `files.tar.gz`;
`summary.json` says how each ended, `table.txt` says it to people. The three are written anew every few seconds, so that
an end in the middle, whatever its reason, costs little: `--resume` with that folder goes on from there.

Where there is no GPU this is a dry run: the steps that need none are run, of the others enough to see that they start.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_results
import gpu_runner
import gpu_steps
from gpu_runner import NO_TIME, Result, Step

# With room below ten minutes, as a command on a borrowed GPU may be limited to; a dry run may be on a slow machine.
MINUTES, DRY_MINUTES = 9.5, 60.0
SAVED_EVERY = 15.0  # seconds
# Of all that is in the archive, before it is compressed; what is beyond is named in its stead.
ARCHIVE_BYTES = 15 * 2**20
NOT_FINISHED = "not finished"

FIND_GPU = """
import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), sep="\\n")
"""


def find_gpu() -> tuple[str, str] | None:
    """Its name, and its architecture as nvcc has it."""
    command = [gpu_steps.PYTHON, "-c", FIND_GPU]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    if not process.stdout:
        return None
    name, major, minor = process.stdout.splitlines()
    return name, f"{major}{minor}{'a' if major == '9' else ''}"


class Record:
    """What is known so far, and the files in which it is kept."""

    def __init__(self, out: Path, files: Path, gpu: str | None) -> None:
        self.out, self.files, self.gpu = out, files, gpu
        self.sources = gpu_results.sources_digest()
        self.steps: dict[str, dict[str, Any]] = {}
        self._saved = 0.0

    def resume(self, folder: Path) -> None:
        """Goes on where the run ended that left its files in this folder; that of another GPU is left alone."""
        with tempfile.TemporaryDirectory() as unpacked:
            if (there := gpu_results.unpack(folder, Path(unpacked))["gpu"]) != self.gpu:
                print(f"not resumed: {folder} is of {there or 'no GPU'}", flush=True)
                return
        self.steps = gpu_results.unpack(folder, self.files)["steps"]

    def is_done(self, step: Step) -> bool:
        """Whether it passed in the run that this one resumes; what has to be there on each machine is seen to anew."""
        return not step.unless and self.steps.get(step.name, {}).get("outcome") == "passed"

    def failed(self, step: Step) -> bool:
        """Whether it had its time, and nothing is to be gained from it but the same once more."""
        outcome = str(self.steps.get(step.name, {}).get("outcome", ""))
        return not step.unless and outcome.startswith("FAILED") and not outcome.endswith(gpu_runner.CUT_SHORT)

    def begin(self, step: Step) -> None:
        self.steps[step.name] = {"outcome": NOT_FINISHED, "sources": self.sources, **asdict(step)}

    def end(self, step: Step, result: Result) -> None:
        self.steps[step.name] |= result
        self.save()

    @property
    def summary(self) -> dict[str, Any]:
        return {"gpu": self.gpu, "sources": self.sources, "steps": self.steps}

    def save_now_and_then(self) -> None:
        if time.monotonic() > self._saved + SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Each file in one step: whoever looks, or whenever the power fails, finds the old one or the new one."""
        _replace(self.out / "files.tar.gz", self._archive())
        _replace(self.out / "summary.json", (json.dumps(self.summary, indent=1) + "\n").encode())
        _replace(self.out / "table.txt", (self.table() + "\n").encode())
        self._saved = time.monotonic()

    def _archive(self) -> bytes:
        """Results before logs, as many as there is room for."""
        paths = [path for path in self.files.rglob("*") if path.is_file()]
        paths.sort(key=lambda path: (path.suffix == ".txt", path))
        memory, room, beyond = io.BytesIO(), ARCHIVE_BYTES, []
        with tarfile.open(fileobj=memory, mode="w:gz", compresslevel=6) as archive:

            def add(name: str, content: bytes) -> None:
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(content), int(time.time())
                archive.addfile(info, io.BytesIO(content))

            for path in paths:
                name = str(path.relative_to(self.files))
                try:
                    size = path.stat().st_size
                    content = path.read_bytes()[:size] if size <= room else None  # it may be growing
                except OSError:  # it was there a moment ago
                    continue
                if content is None:
                    beyond.append(f"{name}: {size} bytes\n")
                    continue
                room -= len(content)
                add(name, content)
            if beyond:
                add("left-out.txt", "".join(beyond).encode())
        return memory.getvalue()

    def table(self) -> str:
        """For people: each step, how it ended, and what is worth a commit."""
        lines = [f"{'step':<22}{'outcome':<42}{'seconds':>8}  says"]
        for name, step in self.steps.items():
            outcome = step["outcome"] + ("" if step["sources"] == self.sources else " (of other sources)")
            lines.append(f"{name:<22}{outcome:<42}{step.get('seconds', ''):>8}  {step.get('last line', '')[:100]}")
            lines += [f"{'':<24}{failure[:140]}" for failure in step.get("failures", ())]
        found = gpu_results.to_commit(self.files, self.summary) if self.gpu else {}
        if found:
            lines += ["", f"to commit, by make gpu-results FROM={self.out}:"]
            lines += [f"  {name}" for name in found]
        return "\n".join(lines)


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_bytes(content)
    fresh.replace(path)


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for what is found; made if there is none")
    parser.add_argument("--minutes", type=float, help=f"after which all has ended; default: {MINUTES} on a GPU")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="leave out what passed in the run that is there")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        name, arch = find_gpu() or (None, None)
        print(name or "no GPU: a dry run", f"-> {out}", flush=True)
        record = Record(out, files, name)
        if args.resume:
            try:
                record.resume(args.resume)
            except ValueError as problem:
                print(f"not resumed: {problem}", flush=True)
        for place in gpu_results.PLACES:
            (files / place).mkdir(exist_ok=True)
        stages = [
            [step for step in stage if (not args.only or step.name in args.only) and not record.is_done(step)]
            for stage in gpu_steps.stages(arch, files)
        ]
        # What failed in the run that is resumed comes last.
        again = [[step for step in stage if record.failed(step)] for stage in stages]
        first = [[step for step in stage if not record.failed(step)] for stage in stages]
        deadline = started + 60 * (args.minutes or (MINUTES if name else DRY_MINUTES))
        for stage in [*first, *again]:
            _run(record, stage, deadline, stop)
        record.save()
        print("", record.table(), sep="\n")
    outcomes = {name: str(step["outcome"]) for name, step in record.steps.items()}
    missing = [name for name, outcome in outcomes.items() if outcome == NO_TIME]
    if missing:
        print(f"left out for lack of time: {', '.join(missing)}", flush=True)
    return int(any(outcome not in ("passed", "needs a GPU") for outcome in outcomes.values()))


def _run(record: Record, stage: list[Step], deadline: float, stop: threading.Event) -> None:
    for step in stage:
        record.begin(step)
    has_gpu = record.gpu is not None
    for step, result in gpu_runner.run(stage, record.files, has_gpu, deadline, stop, record.save_now_and_then):
        record.end(step, result)
        line = f"{step.name:<22}{result['outcome']:<42}{result.get('seconds', ''):>8}  {result.get('last line', '')}"
        print(line, flush=True)
        if not has_gpu:
            print(f"{'':<22}with a GPU: {shlex.join(step.command)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

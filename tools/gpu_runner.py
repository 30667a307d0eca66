"""Runs the steps of `gpu_check.py`: commands with a limit each, some side by side, whatever they do."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_TIME = "left out: no time"
INTERRUPTED = "interrupted"
CUT_SHORT = "no time for more)"
# In the environment of all that a step starts: what left its process group is found by it.
MARK = "FASTCONV_GPU_CHECK_STEP"
# Of a log, once from its beginning and once from its end; what floods the disk is cut in the middle.
LOG_BYTES = 200_000

Result = dict[str, object]


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


class Run:
    """A command under way, alone in its process group: what it leaves behind must not disturb the times of others."""

    GRACE = 20.0  # seconds after the interruption, for pytest and `fastconv bench` to write what they have
    LAST_GRACE = 5.0  # where all is interrupted, and for the system to end what was killed
    LEAST = 10.0  # seconds without which it is not begun

    def __init__(self, step: Step, command: list[str], files: Path, left: float) -> None:
        self._log = files / f"{step.name}.txt"
        self._limit, self._grace = min(step.limit, left), self.GRACE
        self._late = f"FAILED (more than {self._limit:.0f} s" + (")" if left >= step.limit else f": {CUT_SHORT}")
        self._started = time.monotonic()
        self._interrupted = False
        self._mark = f"{MARK}={os.getpid()} {step.name} {time.monotonic_ns()}"
        self._log.unlink(missing_ok=True)
        with open(self._log, "ab") as file:  # appending: it goes on at the end of what was cut
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environ(), **step.environ, MARK: self._mark.partition("=")[2]},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell's background jobs ignore interruptions, and so would what they start.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )

    def result(self) -> Result | None:
        """How it ended; None while it runs. Ends it when it is over its limit."""
        code, seconds = self._process.poll(), time.monotonic() - self._started
        cut_in_the_middle(self._log)
        if code is None:
            late = seconds - self._limit
            if late > self._grace:
                self.kill()
            elif late > 0 and not self._interrupted:
                self._interrupted = True
                self._signal(signal.SIGINT)
            if late <= self._grace + self.LAST_GRACE:
                return None
            self._late = "FAILED (it cannot be ended)"  # it waits within the driver, say
        self.kill()
        outcome = "passed" if code == 0 else f"FAILED ({_cause(code)})"
        lines = self._log.read_text(errors="replace").splitlines()
        lines = [line for line in lines if any(map(str.isalnum, line))]  # not the frame of a table
        return {
            "outcome": self._late if self._interrupted else outcome,
            "seconds": round(seconds, 1),
            "last line": lines[-1].strip()[:200] if lines else "",
            "failures": [line[:200] for line in lines if line.startswith(("FAILED ", "ERROR "))][:5],
        }

    def stop(self) -> None:
        """Ends it soon, whatever its limit."""
        if not self._interrupted:
            self._limit, self._grace, self._late = time.monotonic() - self._started, self.LAST_GRACE, INTERRUPTED

    def kill(self) -> None:
        """The command and all that it started, in whatever session."""
        self._signal(signal.SIGKILL)
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def environ() -> dict[str, str]:
    """With the checkout's package, where none is installed."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT)}


def cut_in_the_middle(log: Path) -> None:
    """Leaves the beginning and the end of a log, to which somebody may be appending, if it has become long."""
    if log.stat().st_size <= 3 * LOG_BYTES:
        return
    with open(log, "r+b") as file:
        file.seek(-LOG_BYTES, os.SEEK_END)
        end = file.read(LOG_BYTES)
        file.truncate(LOG_BYTES)
    with open(log, "ab") as file:
        file.write(b"\n[here some of it was left out]\n" + end)


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"status {code}"


def run(
    stage: list[Step],
    files: Path,
    has_gpu: bool,
    deadline: float,
    stop: threading.Event,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Step, Result]]:
    """The steps of a stage with their results, in the order in which they end.

    Args:
        stage: what runs side by side.
        files: the folder of logs.
        has_gpu: whether it is the commands that run, or what is `dry` of them.
        deadline: of time.monotonic, by which all of it has ended.
        stop: set from elsewhere, ends what runs and leaves out the rest.
        meanwhile: is called several times a second.
    """
    running: dict[str, tuple[Step, Run]] = {}
    try:
        for step in stage:
            command = step.command if has_gpu else step.dry
            if stop.is_set():
                yield step, {"outcome": INTERRUPTED}
            elif command is None:
                yield step, {"outcome": "needs a GPU"}
            elif (left := deadline - time.monotonic() - Run.GRACE) < Run.LEAST:
                yield step, {"outcome": NO_TIME}
            elif shutil.which(command[0]) is None:
                yield step, {"outcome": f"FAILED ({command[0]} is not installed)"}
            elif step.unless and _succeeds(step.unless):
                yield step, {"outcome": "passed", "last line": "there was nothing to do"}
            else:
                running[step.name] = step, Run(step, command, files, left)
        while running:
            for name, (step, process) in list(running.items()):
                if stop.is_set():
                    process.stop()
                result = process.result()
                if result is not None:
                    del running[name]
                    yield step, result
            meanwhile()
            stop.wait(0.1) if not stop.is_set() else time.sleep(0.1)
    finally:
        for _, process in running.values():
            process.kill()


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, cwd=ROOT, env=environ(), capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False

"""``python -m fastconv tune``: block sizes of the Triton kernels measured on this GPU, as a table of the user's own.

The shipped table (fastconv/triton_kernels/table.py) serves without; nothing is ever tuned unasked. Each entry of the
table is timed on one call that stands for its shape class (fastconv/triton_kernels/samples.py). From the shipped sizes
the search goes to a neighbour, a size halved or doubled, as long as one is faster. A candidate counts only if its
result is right by the numerics policy. The batch size does not matter to an entry, so one run serves all.

An entry is saved as soon as it was measured. A run that was interrupted goes on where it stood.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..measure.tolerance import compare, poisoned_outputs
from ..operators import backends

if TYPE_CHECKING:
    from ..triton_kernels.samples import Sample
    from ..triton_kernels.table import Config, Measured

# Milliseconds that a call takes.
Timer = Callable[[Callable[[], Any]], float]

# Of an entry, the shipped one included. Most climbs end before, at a candidate that is no slower than its neighbours.
MOST_CANDIDATES = 16
# A neighbour has to be faster by more than what two timings of the same differ by.
GAIN = 0.98
# Of the calls that are judged: the code is the same for every batch size, float64 on the CPU takes its time.
JUDGED_BATCH = 2


class Fatal(Exception):
    """After this launch nothing works in this process any more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", default="", help="only the kernels whose name contains this")
    parser.add_argument("--batch", type=int, default=32, help="of the calls that are timed (default: 32)")
    parser.add_argument("--dry-run", action="store_true", help="print what is found and save nothing")


def run(args: argparse.Namespace) -> int:
    reason = backends.problem("triton")
    if reason is None and not torch.cuda.is_available():
        reason = "no GPU is visible (Triton's interpreter is on: TRITON_INTERPRET=1)"
    if reason is not None:
        print(f"fastconv: tune measures on a GPU, and Triton cannot run on one here: {reason}", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    return tune(args, partial(do_bench, return_mode="median"), torch.device("cuda"))


def tune(args: argparse.Namespace, timer: Timer, device: torch.device, side: int = 56) -> int:
    """Measures what is not in the user's table yet, on images of this side; the exit status."""
    from ..triton_kernels import table

    path = table.user_path()
    measured = None
    if not args.dry_run:
        try:
            measured = table.Measured(path)
        except (OSError, ValueError) as error:
            print(
                f"fastconv: {path} cannot take the table: {error}; move it away, or name another in "
                "FASTCONV_TRITON_TABLE",
                file=sys.stderr,
            )
            return 1
    entries = [(kernel, name) for kernel, rows in table.SHIPPED.items() for name in rows if args.kernel in kernel]
    todo = [entry for entry in entries if measured is None or not measured.has(*entry)]
    print(f"{len(todo)} entries to measure, at most {MOST_CANDIDATES} candidates each", flush=True)
    if len(todo) < len(entries):
        print(f"{len(entries) - len(todo)} more are in {path} already; remove it to measure them once more")
    done = failed = 0
    started = time.monotonic()
    try:
        for done, (kernel, name) in enumerate(todo):
            remaining = f"{(time.monotonic() - started) / done * (len(todo) - done) / 60:.0f} min left" if done else ""
            print(f"[{done + 1}/{len(todo)}] {kernel} {name:<24} {remaining}", flush=True)
            best = climb(kernel, name, Judge(kernel, name, args.batch, side, device, timer, measured))
            if best is None:
                failed += 1
            elif measured is not None:
                measured.add(kernel, name, best)
    except (KeyboardInterrupt, Fatal) as stop:
        print(f"fastconv: {stop if isinstance(stop, Fatal) else 'interrupted'}", file=sys.stderr)
        if measured is not None:
            print(f"{done - failed} entries measured before are kept in {path}; the same command goes on from there")
        return 1 if isinstance(stop, Fatal) else 130
    if failed:
        print(f"fastconv: nothing was right for {failed} entries, see above; please report it", file=sys.stderr)
    if measured is not None:
        print(f"written to {path}; it is read when the next process starts")
    return 1 if failed else 0


def neighbours(kernel: str, name: str, config: Config, taps: int) -> Iterator[Config]:
    """The entries one step away that may stand in a table and that the guard for large filters leaves alone."""
    from ..triton_kernels import table
    from ..triton_kernels.launch import guarded

    for key, value in config.items():
        if key == "num_stages":
            # without a matrix product there is nothing to pipeline
            others = [value + 1, value - 1] if "BLOCK_K" in config else []
        elif key == "GROUP":
            others = []
        else:
            others = [2 * value, value // 2]
        for other in others:
            found = {**config, key: other}
            if table.problem(kernel, name, found) is None and guarded(found, taps) == found:
                yield found


class Judge:
    """Milliseconds of an entry's sample with a candidate; None for one that is wrong or does not run here."""

    def __init__(
        self,
        kernel: str,
        name: str,
        batch: int,
        side: int,
        device: torch.device,
        timer: Timer,
        measured: Measured | None,
    ) -> None:
        from ..triton_kernels.samples import SAMPLES, Maker

        self.kernel, self.name, self._device, self._timer, self._measured = kernel, name, device, timer, measured
        self._precision = name.split()[0] if name.startswith(("tf32", "ieee")) else None
        self._timed, self._judged = (
            SAMPLES[kernel](Maker(name, size, side, device)) for size in (batch, min(batch, JUDGED_BATCH))
        )
        with precision(self._precision):
            sample: Sample = self._judged
            self._oracles = sample.reference(*(t.cpu().double() for t in sample.tensors))
            self._baselines = sample.reference(*sample.tensors)
        self.taps = sample.taps

    def __call__(self, candidate: Config) -> float | None:
        from ..triton_kernels import table

        if self._measured is not None and self._measured.is_fatal(self.kernel, self.name, candidate):
            return None
        try:
            with table.trial(self.kernel, self.name, candidate), precision(self._precision):
                with poisoned_outputs():
                    outputs = self._judged.run(*self._judged.tensors)
                for output, oracle, baseline in zip(outputs, self._oracles, self._baselines, strict=True):
                    verdict = compare(output, oracle, baseline.to(output.dtype))
                    if not verdict.ok:
                        self._say(candidate, f"wrong, {verdict}")
                        return None
                return self._timer(lambda: self._timed.run(*self._timed.tensors))
        except Exception as error:
            # too much shared memory, too many registers: not an entry for this card
            what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if is_broken(self._device):
                if self._measured is not None:
                    self._measured.add_fatal(self.kernel, self.name, candidate)
                raise Fatal(
                    f"the GPU gave up on {self.kernel} '{self.name}' with {candidate} ({what}); that candidate is "
                    "left out from now on"
                ) from error
            self._say(candidate, what)
            return None

    def _say(self, candidate: Config, what: str) -> None:
        print(f"  left out {candidate}: {what}", flush=True)


def climb(kernel: str, name: str, judge: Judge) -> Config | None:
    """The fastest entry that was found; None if none was right."""
    from ..triton_kernels import table

    shipped = best = table.SHIPPED[kernel][name]
    before = fastest = judge(shipped)
    tried = [shipped]
    steps = neighbours(kernel, name, best, judge.taps)
    while len(tried) < MOST_CANDIDATES and (candidate := next(steps, None)) is not None:
        if candidate in tried:
            continue
        tried.append(candidate)
        milliseconds = judge(candidate)
        if milliseconds is not None and (fastest is None or milliseconds < GAIN * fastest):
            best, fastest = candidate, milliseconds
            steps = neighbours(kernel, name, best, judge.taps)
    if fastest is None:
        return None
    was = "wrong or impossible" if before is None else f"{before:.4f} ms"
    print(f"  {was} -> {fastest:.4f} ms with {best}", flush=True)
    return best


@contextlib.contextmanager
def precision(name: str | None) -> Iterator[None]:
    """Inside, torch's switch for float32 convolutions is at "tf32" or "ieee"; None leaves it alone."""
    switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = switch.fp32_precision
    if name is not None:
        switch.fp32_precision = name
    try:
        yield
    finally:
        switch.fp32_precision = before


def is_broken(device: torch.device) -> bool:
    """Whether an error left the GPU unusable for this process, as an illegal access does."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False

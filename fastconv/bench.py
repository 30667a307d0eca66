"""``python -m fastconv bench``: whole networks, eager against swapped.

The contenders have the same weights and take turns, so that a busy moment of the machine hits all
alike; medians are reported. fastconv gets no time where its error against float64 is beyond twice
eager's: such a result is WRONG.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import models
from fastconv._numerics import BASELINE_FACTOR
from fastconv._report import Table, environment
from fastconv.verify import DTYPES

NETWORKS = ("alexnet2012", "vgg16", "googlenet", "resnet50", "xception", "torchvision:mobilenet_v2")

CONTIGUOUS = "eager contiguous"
CHANNELS_LAST = "eager channels_last"
LRN_ONLY = "only LRN swapped"
SWAPPED = "fastconv"
IN_INFERENCE = (CONTIGUOUS, CHANNELS_LAST, SWAPPED)
IN_TRAINING = (CONTIGUOUS, CHANNELS_LAST, LRN_ONLY, SWAPPED)

FEWEST_RUNS, MOST_RUNS = 3, 50
SLOWEST_RUN = 10.0  # seconds; what is known to take longer is left out

# A gradient is a sum over ReLUs and max pools, some of which rounding makes choose otherwise.
GRADIENT_FLOOR = 1e-3


@dataclass
class Result:
    """One contender on one task."""

    seconds: list[float] = field(default_factory=list)  # of each run
    error: float | None = None  # see Row.allowed_error
    peak_bytes: int | None = None  # in training, see peak_bytes
    note: str = ""  # why there are no seconds

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and the 80th percentile."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        cuts = statistics.quantiles(self.seconds, n=5, method="inclusive")
        return cuts[0], cuts[-1]


@dataclass
class Row:
    """One task: a network in inference or in training, in a dtype, for a batch."""

    network: str
    mode: str
    dtype: str
    batch: int
    results: dict[str, Result] = field(default_factory=dict)
    # In inference of the class scores, largest error / largest score; in training of the gradient
    # of that parameter where it is largest, norm of the error / norm of the gradient.
    allowed_error: float = 0.0
    note: str = ""  # why there are no results

    @property
    def is_wrong(self) -> bool:
        return any(result.note.startswith("WRONG") for result in self.results.values())

    def speedup(self, over: str, of: str = SWAPPED) -> float | None:
        theirs, ours = self.results.get(over), self.results.get(of)
        if not (theirs and ours and theirs.seconds and ours.seconds):
            return None
        return theirs.median / ours.median

    def __str__(self) -> str:
        outcome = self.note or ", ".join(
            f"{who} {f'{1e3 * result.median:.1f} ms' if result.seconds else result.note}"
            for who, result in self.results.items()
        )
        return f"{self.network} {self.mode} {self.dtype} batch {self.batch}: {outcome}"


class Budget:
    """Spreads the time that is left over the rows that are left."""

    def __init__(self, seconds: float, rows: int) -> None:
        self._start = time.perf_counter()
        self._seconds = seconds
        self._rows = rows

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def next_row(self) -> float:
        """Seconds to spend on repeats; as much again goes into building, float64 and first runs."""
        share = (self._seconds - self.elapsed) / max(1, self._rows) / 2
        self._rows -= 1
        return max(0.0, share)


# --------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--networks",
        nargs="*",
        default=NETWORKS,
        metavar="NAME",
        help=f"for inference: {', '.join(models.names())} or torchvision:NAME; "
        f"default: {' '.join(NETWORKS)}",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: fp32 bf16"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="default: 1 16")
    parser.add_argument(
        "--train",
        nargs="*",
        default=["alexnet2012"],
        metavar="NAME",
        help="for training, in fp32; default: alexnet2012",
    )
    parser.add_argument("--train-batch", type=int, default=64, help="default: 64")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--minutes", type=float, default=6.0, help="to aim at; default: 6")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for all that was measured")
    parser.add_argument("--markdown", action="store_true", help="tables for a README")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 1 if a result is wrong, 2 if a network is unknown."""
    for name in (*args.networks, *args.train):
        if name not in models.names() and not name.startswith("torchvision:"):
            known = ", ".join((*models.names(), "torchvision:NAME"))
            print(f"fastconv bench: got network {name!r}, needed one of {known}", file=sys.stderr)
            return 2
    torch.set_num_threads(args.threads)
    rows = []
    for row in _measure(args):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    facts = environment()
    if args.json:
        document = {"environment": facts, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(*(f"{name}: {value}" for name, value in facts.items()), "", sep="\n")
    for table in tables(rows):
        table.show(markdown=args.markdown)
    return 1 if any(row.is_wrong for row in rows) else 0


def _measure(args: argparse.Namespace) -> Iterator[Row]:
    tasks = len(args.networks) * len(args.dtypes) * len(args.batches) + len(args.train)
    budget = Budget(args.minutes * 60, tasks)
    pace: dict[tuple[str, str], float] = {}
    for name in args.networks:
        yield from infer(name, args.dtypes, sorted(args.batches), budget, pace)
    for name in args.train:
        yield train(name, args.train_batch, budget)


# -------------------------------------------------------------------------------------- networks


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with random weights, in training mode; and the [C, H, W] that it takes.

    Raises:
        ImportError: it is torchvision's, which is not installed.
        ValueError: torchvision has no such network.
    """
    torch.manual_seed(0)
    family, _, plain = name.rpartition(":")
    if family == "torchvision":
        import torchvision

        side = 299 if plain == "inception_v3" else 224
        return torchvision.models.get_model(plain, weights=None), (3, side, side)
    _, *shape = models.input_shape(plain)
    return models.build(plain), (shape[0], shape[1], shape[2])


def prepare(who: str, model: nn.Module) -> nn.Module:
    """The model as this contender runs it; it may be changed."""
    if who != CONTIGUOUS:
        model = model.to(memory_format=torch.channels_last)
    if who == SWAPPED:
        return fastconv.swap(model)
    for module in model.modules():
        if type(module) is nn.LocalResponseNorm:
            module.__class__ = fastconv.nn.LocalResponseNorm if who == LRN_ONLY else EagerLRN
    return model


class EagerLRN(nn.LocalResponseNorm):
    """In float32 for 16-bit input: aten has no other kernel on the CPU, so users write this."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


def _laid_out(who: str, images: Tensor) -> Tensor:
    if who == CONTIGUOUS:
        return images
    return images.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------- inference


@torch.no_grad()
def infer(
    network: str,
    dtypes: Sequence[str],
    batches: Sequence[int],
    budget: Budget,
    pace: dict[tuple[str, str], float],
) -> Iterator[Row]:
    """A row for each dtype and batch.

    Args:
        pace: the fewest seconds per FLOP that a contender was seen to take in a dtype; updated.
    """
    try:
        model, shape = build(network)
    except (ImportError, ValueError) as problem:
        for dtype, batch in itertools.product(dtypes, batches):
            budget.next_row()
            yield Row(network, "inference", dtype, batch, note=f"skipped: {problem}")
        return
    images = torch.randn(batches[-1], *shape)
    update_bn([torch.randn(4, *shape)], model)  # as training does; unnormalised values would grow
    model.eval()
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(images[:1].to("meta"))
    flop = counter.get_total_flops()

    for dtype in dtypes:
        typed = copy.deepcopy(model).to(DTYPES[dtype])
        input = images.to(DTYPES[dtype])
        ends = input[:: max(1, len(input) - 1)]  # the first and the last image
        oracle = copy.deepcopy(typed).double()(ends.double())
        contenders = {who: prepare(who, copy.deepcopy(typed)) for who in IN_INFERENCE}
        baseline = contenders[CHANNELS_LAST](_laid_out(CHANNELS_LAST, ends))
        allowed = BASELINE_FACTOR * _error(baseline, oracle) + torch.finfo(DTYPES[dtype]).eps
        for batch in batches:
            row = Row(network, "inference", dtype, batch, allowed_error=allowed)
            calls = {}
            for who, contender in contenders.items():
                expected = pace.get((who, dtype), 0.0) * flop * batch
                if expected > SLOWEST_RUN:
                    row.results[who] = Result(note=f"left out: at least {expected:.0f} s a run")
                    continue
                call = functools.partial(contender, _laid_out(who, input[:batch]))
                start = time.perf_counter()
                output = call()
                seconds = time.perf_counter() - start
                pace[who, dtype] = min(seconds / (flop * batch), pace.get((who, dtype), torch.inf))
                found = output[[0, -1]] if 1 < batch == len(input) else output[:1]
                error = _error(found, oracle[: len(found)])
                row.results[who] = Result(error=error)
                if who == SWAPPED and not error <= allowed:
                    row.results[who].note = f"WRONG: error {error:.1e}, allowed {allowed:.1e}"
                elif seconds > SLOWEST_RUN:
                    row.results[who].seconds = [seconds]
                else:
                    calls[who] = call
            take_turns(calls, row.results, budget.next_row())
            yield row


def _error(output: Tensor, oracle: Tensor) -> float:
    return float((output.double() - oracle).abs().max() / oracle.abs().max())


def take_turns(
    calls: Mapping[str, Callable[[], Any]], results: dict[str, Result], allowance: float
) -> None:
    """Times the calls one after the other, again and again.

    Each runs at least FEWEST_RUNS times, then until it had its share of the allowance (seconds).
    """
    share = allowance / max(1, len(calls))

    def goes_on(who: str) -> bool:
        seconds = results[who].seconds
        return len(seconds) < FEWEST_RUNS or (len(seconds) < MOST_RUNS and sum(seconds) < share)

    while active := [who for who in calls if goes_on(who)]:
        for who in active:
            start = time.perf_counter()
            calls[who]()
            results[who].seconds.append(time.perf_counter() - start)


# -------------------------------------------------------------------------------------- training


def train(network: str, batch: int, budget: Budget) -> Row:
    """One step of SGD with momentum, in float32: time and peak memory."""
    row = Row(network, "training", "fp32", batch)
    try:
        model, shape = build(network)
    except (ImportError, ValueError) as problem:
        row.note = f"skipped: {problem}"
        return row
    images, labels = torch.randn(batch, *shape), torch.randint(1000, (batch,))

    few = (images[:4], labels[:4])
    still = copy.deepcopy(model)
    for module in still.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    oracle = _gradients(CONTIGUOUS, copy.deepcopy(still).double(), few[0].double(), few[1])
    for who in (CHANNELS_LAST, CONTIGUOUS, LRN_ONLY, SWAPPED):
        found = _gradients(who, prepare(who, copy.deepcopy(still)), *few)
        error = max(
            float((found[name].double() - exact).norm() / exact.norm())
            for name, exact in oracle.items()
        )
        row.results[who] = Result(error=error)
        if who == CHANNELS_LAST:
            row.allowed_error = BASELINE_FACTOR * error + GRADIENT_FLOOR
        elif who in (LRN_ONLY, SWAPPED) and not error <= row.allowed_error:
            row.results[who].note = f"WRONG: error {error:.1e}, allowed {row.allowed_error:.1e}"
    del oracle, still

    right = [who for who in IN_TRAINING if not row.results[who].note]
    steps = {}
    for who in right:
        steps[who] = Step(prepare(who, copy.deepcopy(model)), _laid_out(who, images), labels)
        steps[who]()
    take_turns(steps, row.results, budget.next_row())
    del steps
    for who in right:
        row.results[who].peak_bytes = _peak_bytes_of_a_process(network, who, batch)
    return row


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    outputs = model(images)
    heads = (outputs,) if isinstance(outputs, Tensor) else outputs  # GoogLeNet has three
    return torch.stack([F.cross_entropy(head, labels) for head in heads]).sum()


def _gradients(who: str, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = _loss(model, _laid_out(who, images), labels)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


class Step:
    """One training step, on the same images every time."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self._arguments = (model, images, labels)
        # The rate is too small for anything to grow in as many steps as there may be.
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        _loss(*self._arguments).backward()
        self._optimizer.step()


def _peak_bytes_of_a_process(network: str, who: str, batch: int) -> int | None:
    code = "import sys; from fastconv import bench; bench.print_peak_bytes(*sys.argv[1:])"
    arguments = [network, who, str(batch), str(torch.get_num_threads())]
    # With a fixed threshold, glibc gives every larger block pages of its own, and gives them back.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environ, capture_output=True, text=True
    )
    if process.returncode != 0:
        print(f"no peak memory of {network}, {who}: {process.stderr[-500:]}", file=sys.stderr)
    return int(process.stdout) if process.stdout.strip().isdigit() else None


def print_peak_bytes(network: str, who: str, batch: str, threads: str) -> None:
    """How much resident memory rises above that of the process without the network.

    It counts every byte that is written, in tensors and in the libraries' scratch memory; not what
    the allocator keeps, see `_peak_bytes_of_a_process`. Linux only (VmHWM of /proc/self/status).
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return
    torch.set_num_threads(int(threads))
    before = _kib(status, "VmRSS")
    model, shape = build(network)
    images, labels = torch.randn(int(batch), *shape), torch.randint(1000, (int(batch),))
    step = Step(prepare(who, model), _laid_out(who, images), labels)
    for _ in range(2):  # momentum comes with the first, beside gradients only in the second
        step()
    print(1024 * (_kib(status, "VmHWM") - before))


def _kib(status: Path, name: str) -> int:
    return int(re.findall(rf"{name}:\s*(\d+) kB", status.read_text())[0])


# ---------------------------------------------------------------------------------------- report


def tables(rows: Sequence[Row]) -> list[Table]:
    """For inference and for training, as far as there are rows."""
    inference = Table(
        "Inference: median ms (20th to 80th percentile), and how many times as fast fastconv is",
        [
            *("network", "dtype", "batch", *IN_INFERENCE, "over contiguous", "over channels_last"),
            *("error", "eager's error"),
        ],
    )
    training = Table(
        f"Training, one step: median ms (20th to 80th percentile), peak memory, both to "
        f"{CHANNELS_LAST}",
        ["network", "batch", "", "ms", "speed", "peak MB", "memory", "error"],
    )
    for row in rows:
        table = inference if row.mode == "inference" else training
        for cells, is_loss in _inference_cells(row) if table is inference else _training_cells(row):
            table.add(cells, is_loss)
    return [table for table in (inference, training) if table.rows]


def _inference_cells(row: Row) -> Iterator[tuple[list[str], bool]]:
    speedups = [row.speedup(CONTIGUOUS), row.speedup(CHANNELS_LAST)]
    cells = [row.network, row.dtype, str(row.batch)]
    cells += [_time(row.results.get(who), row.note) for who in IN_INFERENCE]
    cells += [_times(speedup) for speedup in speedups]
    cells += [_scientific(row.results.get(who)) for who in (SWAPPED, CHANNELS_LAST)]
    yield cells, row.is_wrong or _is_less(*speedups)


def _training_cells(row: Row) -> Iterator[tuple[list[str], bool]]:
    if not row.results:
        yield [row.network, str(row.batch), row.note, *[""] * 5], False
    base = row.results.get(CHANNELS_LAST)
    for who, result in row.results.items():
        speedup = row.speedup(CHANNELS_LAST, who)
        memory = None
        if base and base.peak_bytes and result.peak_bytes:
            memory = result.peak_bytes / base.peak_bytes
        yield (
            [
                *(row.network, str(row.batch), who, _time(result), _times(speedup)),
                f"{result.peak_bytes / 1e6:.0f}" if result.peak_bytes else "",
                f"{memory:.2f}x" if memory else "",
                _scientific(result),
            ],
            who in (LRN_ONLY, SWAPPED) and (bool(result.note) or _is_less(speedup)),
        )


def _is_less(*speedups: float | None) -> bool:
    return any(speedup is not None and speedup < 1 for speedup in speedups)


def _times(speedup: float | None) -> str:
    if speedup is None:
        return ""
    return f"{speedup:.2f}x" + (" SLOWER" if _is_less(speedup) else "")


def _time(result: Result | None, note: str = "") -> str:
    if result is None or not result.seconds:
        return result.note if result else note
    if len(result.seconds) < FEWEST_RUNS:
        return f"{1e3 * result.median:.1f} ({len(result.seconds)} run)"
    low, high = result.spread
    return f"{1e3 * result.median:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})"


def _scientific(result: Result | None) -> str:
    return "" if result is None or result.error is None else f"{result.error:.0e}"

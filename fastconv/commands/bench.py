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
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import models
from fastconv.commands.verify import DTYPES
from fastconv.measure.report import Table, environment
from fastconv.measure.tolerance import BASELINE_FACTOR
from fastconv.operators import backends

NETWORKS = ("alexnet2012", "vgg16", "googlenet", "resnet50", "xception", "torchvision:mobilenet_v2")

CONTIGUOUS = "eager contiguous"
CHANNELS_LAST = "eager channels_last"
LRN_ONLY = "only LRN swapped"
SWAPPED = "fastconv"
COMPILED = "torch.compile"
EAGER_GRAPH = "eager graph"  # channels_last, replayed as a CUDA graph
SWAPPED_GRAPH = "fastconv graph"
IN_INFERENCE = {
    "cpu": (CONTIGUOUS, CHANNELS_LAST, SWAPPED),
    "cuda": (CONTIGUOUS, CHANNELS_LAST, EAGER_GRAPH, COMPILED, SWAPPED, SWAPPED_GRAPH),
}
OURS = (SWAPPED, SWAPPED_GRAPH)
IN_TRAINING = (CHANNELS_LAST, CONTIGUOUS, LRN_ONLY, SWAPPED)

FEWEST_RUNS, MOST_RUNS = 3, 50
MOST_SECONDS = 20.0  # of repeats for a row

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
        return f"{self.dtype} batch {self.batch}: {outcome}"


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
        return min(max(0.0, share), MOST_SECONDS)


# --------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--networks",
        nargs="*",
        default=NETWORKS,
        metavar="NAME",
        help=f"for inference: {', '.join(models.names())} or torchvision:NAME; default: {' '.join(NETWORKS)}",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: fp32 bf16")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="default: 1 16")
    parser.add_argument(
        "--train",
        nargs="*",
        default=["alexnet2012"],
        metavar="NAME",
        help="for training, in fp32; default: alexnet2012",
    )
    parser.add_argument("--train-batch", type=int, default=128, help="default: 128")
    parser.add_argument("--device", default="cpu", type=torch.device, help="default: cpu; training is timed there only")
    parser.add_argument("--backend", default="auto", choices=backends.names(), help="of fastconv; default: auto")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--minutes", type=float, default=6.0, help="to aim at; default: 6")
    parser.add_argument(
        "--longest",
        type=float,
        default=3.0,
        metavar="SECONDS",
        help="leaves out 16-bit runs of eager that must take longer: where the processor has no "
        "such instructions they can take minutes; default: 3",
    )
    parser.add_argument("--no-compile", action="store_true", help="leaves out torch.compile, which takes its time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for all that was measured, after each row")
    parser.add_argument("--markdown", action="store_true", help="tables for a README")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 1 if a result is wrong, 2 if a network is unknown."""
    for name in (*args.networks, *args.train):
        if name not in models.names() and not name.startswith("torchvision:"):
            known = ", ".join((*models.names(), "torchvision:NAME"))
            print(f"fastconv bench: got network {name!r}, needed one of {known}", file=sys.stderr)
            return 2
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    facts = environment()
    rows: list[Row] = []

    def save() -> None:
        if args.json:
            document = {"environment": facts, "rows": [asdict(row) for row in rows]}
            args.json.write_text(json.dumps(document, indent=1) + "\n")

    save()  # rather than find out after the first network that it cannot be
    try:
        for row in _measure(args):
            rows.append(row)
            print(f"  {row}", file=sys.stderr, flush=True)
            save()
    except KeyboardInterrupt:
        print("interrupted: here is what was measured", file=sys.stderr)
    print(*(f"{name}: {value}" for name, value in facts.items()), "", sep="\n")
    for table in tables(rows):
        table.show(markdown=args.markdown)
    return 1 if any(row.is_wrong for row in rows) else 0


def _measure(args: argparse.Namespace) -> Iterator[Row]:
    tasks = len(args.networks) * len(args.dtypes) * len(args.batches) + len(args.train)
    budget = Budget(args.minutes * 60, tasks)
    pace = Pace()
    for name in args.networks:
        print(f"{name}, inference ...", file=sys.stderr, flush=True)
        with backends.use_backend(args.backend):
            contenders = [who for who in IN_INFERENCE[args.device.type] if not (who == COMPILED and args.no_compile)]
            batches = sorted(args.batches)
            yield from infer(name, args.device, contenders, args.dtypes, batches, budget, pace, args.longest)
    for name in args.train:
        print(f"{name}, training ...", file=sys.stderr, flush=True)
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
    if who in OURS:
        return fastconv.swap(model)
    if who == COMPILED:
        # Without this the second batch size would get a graph for any: not what a user times.
        return cast(nn.Module, torch.compile(model, dynamic=False))
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.LocalResponseNorm:
                lrn = fastconv.nn.LocalResponseNorm if who == LRN_ONLY else EagerLRN
                setattr(module, name, lrn(child.size, child.alpha, child.beta, child.k))
    return model


class EagerLRN(nn.LocalResponseNorm):
    """On a CPU in float32 for 16-bit input: aten has no other kernel there, so users write this."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu" and input.dtype.itemsize == 2:
            return super().forward(input.float()).to(input.dtype)
        return super().forward(input)


def _laid_out(who: str, images: Tensor) -> Tensor:
    if who == CONTIGUOUS:
        return images
    return images.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------- inference


class Pace:
    """How fast a contender was seen to be in a dtype, to tell what it cannot do in time."""

    def __init__(self) -> None:
        self._seconds_per_flop: dict[tuple[str, str], float] = {}

    def saw(self, who: str, dtype: str, flop: int, seconds: float) -> None:
        pace = seconds / flop
        self._seconds_per_flop[who, dtype] = min(pace, self._least(who, dtype, default=pace))

    def seconds(self, who: str, dtype: str, flop: int) -> float:
        """At the best pace seen; 0 if none was."""
        return flop * self._least(who, dtype, default=0.0)

    def _least(self, who: str, dtype: str, default: float) -> float:
        return self._seconds_per_flop.get((who, dtype), default)


@torch.no_grad()
def infer(
    network: str,
    device: torch.device,
    who_takes_part: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    budget: Budget,
    pace: Pace,
    longest: float,
) -> Iterator[Row]:
    """A row for each dtype and batch.

    Args:
        who_takes_part: names of contenders, among them CHANNELS_LAST.
        batches: in ascending order.
        longest: seconds; 16-bit runs of eager that must take longer are left out.
    """
    try:
        model, shape = build(network)
    except (ImportError, ValueError) as problem:
        for dtype, batch in itertools.product(dtypes, batches):
            budget.next_row()
            yield Row(network, "inference", dtype, batch, note=f"skipped: {problem}")
        return
    update_bn([torch.randn(4, *shape)], model)  # as training does; unnormalised values would grow
    model.eval()
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(torch.empty(1, *shape, device="meta"))
    image_flop = counter.get_total_flops()
    model.to(device)
    all_images = torch.randn(batches[-1], *shape).to(device)

    for dtype in dtypes:
        typed = copy.deepcopy(model).to(DTYPES[dtype])
        images = all_images.to(DTYPES[dtype])
        ends = images[:: max(1, len(images) - 1)]  # the first and the last
        oracle = copy.deepcopy(typed).double()(ends.double())
        contenders = {who: prepare(who, copy.deepcopy(typed)) for who in who_takes_part}
        baseline = contenders[CHANNELS_LAST](_laid_out(CHANNELS_LAST, ends))
        allowed = BASELINE_FACTOR * _error(baseline, oracle) + torch.finfo(DTYPES[dtype]).eps
        for batch in batches:
            row = Row(network, "inference", dtype, batch, allowed_error=allowed)
            calls = {}
            for who, contender in contenders.items():
                may_be_slow = dtype != "fp32" and who not in OURS and device.type == "cpu"
                at_least = pace.seconds(who, dtype, image_flop * batch)
                if may_be_slow and at_least > longest:
                    row.results[who] = Result(note=f"left out: at least {at_least:.0f} s")
                    continue
                call: Callable[[], Tensor] = functools.partial(contender, _laid_out(who, images[:batch]))
                if who in OURS:
                    call()  # packs the weights
                if who in (EAGER_GRAPH, SWAPPED_GRAPH):
                    call = captured(call)
                start = time.perf_counter()
                output = call()
                synchronize(device.type)
                seconds = time.perf_counter() - start
                pace.saw(who, dtype, image_flop * batch, seconds)
                scores = output[[0, -1]] if 1 < batch == len(images) else output[:1]
                error = _error(scores, oracle[: len(scores)])
                row.results[who] = Result(error=error)
                if who in OURS and not error <= allowed:
                    row.results[who].note = f"WRONG: error {error:.1e}, allowed {allowed:.1e}"
                elif may_be_slow and seconds > longest:
                    row.results[who].seconds.append(seconds)
                else:
                    calls[who] = call
            take_turns(calls, row.results, budget.next_row(), device.type)
            for who in calls:
                pace.saw(who, dtype, image_flop * batch, min(row.results[who].seconds))
            yield row


def _error(output: Tensor, oracle: Tensor) -> float:
    return float((output.double() - oracle).abs().max() / oracle.abs().max())


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph, which returns the same tensor every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # allocations and choices that must not be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def take_turns(
    calls: Mapping[str, Callable[[], Any]], results: dict[str, Result], allowance: float, device: str = "cpu"
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
            synchronize(device)
            start = time.perf_counter()
            calls[who]()
            synchronize(device)
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
    images, labels = torch.randn(batch, *shape), torch.randint(10, (batch,))

    few = (images[:4], labels[:4])
    still = copy.deepcopy(model)
    for module in still.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    oracle = _gradients(CONTIGUOUS, copy.deepcopy(still).double(), few[0].double(), few[1])
    has_lrn = any(isinstance(module, nn.LocalResponseNorm) for module in model.modules())
    for who in IN_TRAINING if has_lrn else (CHANNELS_LAST, CONTIGUOUS, SWAPPED):
        found = _gradients(who, prepare(who, copy.deepcopy(still)), *few)
        error = max(float((found[name].double() - exact).norm() / exact.norm()) for name, exact in oracle.items())
        row.results[who] = Result(error=error)
        if who == CHANNELS_LAST:
            row.allowed_error = BASELINE_FACTOR * error + GRADIENT_FLOOR
        elif who in (LRN_ONLY, SWAPPED) and not error <= row.allowed_error:
            row.results[who].note = f"WRONG: error {error:.1e}, allowed {row.allowed_error:.1e}"
    del oracle, still

    right = [who for who, result in row.results.items() if not result.note]
    steps = {}
    for who in right:
        step = Step(prepare(who, copy.deepcopy(model)))
        steps[who] = functools.partial(step, _laid_out(who, images), labels)
        steps[who]()
    take_turns(steps, row.results, budget.next_row())
    del steps, step
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
    """Steps of training a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # The rate is too small for anything to grow in as many steps as there may be.
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self._optimizer.zero_grad()
        _loss(self._model, images, labels).backward()
        self._optimizer.step()


def _peak_bytes_of_a_process(network: str, who: str, batch: int) -> int | None:
    code = "import sys; from fastconv import bench; bench.print_peak_bytes(*sys.argv[1:])"
    arguments = [network, who, str(batch), str(torch.get_num_threads())]
    # With a fixed threshold, glibc gives every larger block pages of its own, and gives them back.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run([sys.executable, "-c", code, *arguments], env=environ, capture_output=True, text=True)
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
    images, labels = torch.randn(int(batch), *shape), torch.randint(10, (int(batch),))
    images = _laid_out(who, images)
    step = Step(prepare(who, model))
    step(images[:2], labels[:2])  # momentum comes with the first step
    step(images, labels)
    print(1024 * (_kib(status, "VmHWM") - before))


def _kib(status: Path, name: str) -> int:
    return int(re.findall(rf"{name}:\s*(\d+) kB", status.read_text())[0])


# ---------------------------------------------------------------------------------------- report


def tables(rows: Sequence[Row]) -> list[Table]:
    """For inference and for training, as far as there are rows."""
    contenders = list(dict.fromkeys(who for row in rows if row.mode == "inference" for who in row.results))
    inference = Table(
        "Inference: median ms (20th to 80th percentile), and how many times as fast fastconv is",
        [
            *("network", "dtype", "batch", *contenders),
            *("over contiguous", "over channels_last", "error", "eager's error"),
        ],
    )
    training = Table(
        f"Training, one step: median ms (20th to 80th percentile) and peak memory, beside those of {CHANNELS_LAST}",
        ["network", "batch", "", "ms", "times as fast", "peak MB", "memory", "error"],
    )
    for row in rows:
        table = inference if row.mode == "inference" else training
        if row.note:
            cells = [row.network, str(row.batch), row.note]
            table.add(cells + [""] * (len(table.columns) - len(cells)), is_loss=False)
        elif table is inference:
            speedups = [row.speedup(CONTIGUOUS), row.speedup(CHANNELS_LAST)]
            table.add(
                [
                    *(row.network, row.dtype, str(row.batch)),
                    *(_milliseconds(row.results[who]) for who in contenders),
                    *map(_times, speedups),
                    *(_error_of(row.results[who]) for who in (SWAPPED, CHANNELS_LAST)),
                ],
                is_loss=row.is_wrong or any(map(_is_less, speedups)),
            )
        else:
            _add_training(table, row)
    return [table for table in (inference, training) if table.rows]


def _add_training(table: Table, row: Row) -> None:
    base = row.results[CHANNELS_LAST].peak_bytes
    for who, result in row.results.items():
        speedup, peak = row.speedup(CHANNELS_LAST, who), result.peak_bytes
        table.add(
            [
                *(row.network, str(row.batch), who, _milliseconds(result), _times(speedup)),
                f"{peak / 1e6:.0f}" if peak else "?",
                f"{peak / base:.2f}x" if peak and base else "?",
                _error_of(result),
            ],
            is_loss=who in (LRN_ONLY, SWAPPED) and (bool(result.note) or _is_less(speedup)),
        )


def _is_less(speedup: float | None) -> bool:
    return speedup is not None and round(speedup, 2) < 1


def _times(speedup: float | None) -> str:
    if speedup is None:
        return "?"
    return f"{speedup:.2f}x SLOWER" if _is_less(speedup) else f"{speedup:.2f}x"


def _milliseconds(result: Result) -> str:
    if not result.seconds:
        return result.note
    low, high = result.spread
    spread = f"{1e3 * low:.1f}-{1e3 * high:.1f}" if len(result.seconds) > 1 else "1 run"
    return f"{1e3 * result.median:.1f} ({spread})"


def _error_of(result: Result) -> str:
    return "?" if result.error is None else f"{result.error:.0e}"

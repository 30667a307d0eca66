"""``python -m fastconv bench``: whole networks, eager against swapped.

Single layers of each op are timed by ``pytest benchmarks``, which is ``make bench``.

The contenders have the same weights and take turns, so that a busy moment of the machine hits all alike; medians are
reported. fastconv gets no time where its error against float64 is beyond twice eager's: such a result is WRONG.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fastconv.measure import environment, networks
from fastconv.measure.calls import DTYPES
from fastconv.measure.contenders import (
    CHANNELS_LAST,
    COMPILED,
    CONTIGUOUS,
    IN_INFERENCE,
    IN_TRAINING,
    LRN_ONLY,
    SWAPPED,
    Result,
    Row,
)
from fastconv.measure.inference import Plan, infer
from fastconv.measure.report import Table
from fastconv.measure.timing import Budget
from fastconv.measure.training import train
from fastconv.operators import backends

NETWORKS = ("alexnet2012", "vgg16", "googlenet", "resnet50", "xception", "torchvision:mobilenet_v2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--networks",
        nargs="*",
        default=NETWORKS,
        metavar="NAME",
        help=f"for inference: {networks.known()}; default: {' '.join(NETWORKS)}",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: fp32 bf16")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="default: 1 16")
    parser.add_argument(
        "--train",
        nargs="*",
        default=["alexnet2012"],
        metavar="NAME",
        help="for training; default: alexnet2012",
    )
    parser.add_argument(
        "--train-dtype", choices=DTYPES, default="fp32", help="of training, by autocast if of 16 bits; default: fp32"
    )
    parser.add_argument("--train-batch", type=int, default=128, help="default: 128")
    parser.add_argument("--device", default="cpu", type=torch.device, help="default: cpu")
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
    try:
        for name in (*args.networks, *args.train):
            networks.check(name)
    except ValueError as problem:
        print(f"fastconv bench: {problem}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    facts = environment.facts()
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
    budget = Budget(args.minutes * 60, len(args.networks) * len(args.dtypes) * len(args.batches) + len(args.train))

    def contenders(of: dict[str, tuple[str, ...]]) -> list[str]:
        return [who for who in of[args.device.type] if not (who == COMPILED and args.no_compile)]

    plan = Plan(args.device, contenders(IN_INFERENCE), args.dtypes, sorted(args.batches), budget, args.longest)
    for name in args.networks:
        print(f"{name}, inference ...", file=sys.stderr, flush=True)
        with backends.use_backend(args.backend):
            yield from infer(name, plan)
    for name in args.train:
        print(f"{name}, training ...", file=sys.stderr, flush=True)
        with backends.use_backend(args.backend):
            yield train(name, args.train_batch, budget, contenders(IN_TRAINING), args.train_dtype, args.device)


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

"""``python -m fastconv qualify MODEL``: proves and times the kernels on this machine; `auto` then takes what won.

Without a model, for the layers that the benchmarks have. See `fastconv.qualify`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

import torch

from ..measure import networks
from ..measure.calls import DTYPES, FORMATS, laid_out, mapped, named_tensors
from ..measure.layers import LAYERS
from ..operators import backends, table_files, tables
from ..operators.fingerprint import fingerprint
from ..qualification.collecting import Collected, calls_of, recording
from ..qualification.examination import Options
from ..qualification.qualify import in_rounds, known_backends
from ..qualification.reporting import Qualification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"each one of {networks.known()}")
    parser.add_argument("--layers", action="store_true", help="the layers of the benchmarks; the default without MODEL")
    parser.add_argument("--op", action="append", metavar="OP", help="of them only this op's (repeatable)")
    parser.add_argument("--device", type=torch.device, help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--layout", choices=FORMATS, default="channels_last", help="default: channels_last")
    parser.add_argument("--batch", type=int, nargs="+", help="numbers of images; default: 32 on a GPU, 1 on a CPU")
    parser.add_argument("--no-inference", action="store_true", help="leaves out calls without gradients")
    parser.add_argument("--no-training", action="store_true", help="leaves out the backward")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="beside aten only these; default: all that run")
    parser.add_argument("--search", action="store_true", help="also block sizes of Triton kernels: takes minutes")
    parser.add_argument("--allow-lost-nan", action="store_true", help="lets win what turns a NaN into a number")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--threads", type=int, help="of a CPU; default: as torch has it")
    parser.add_argument("--minutes", type=float, help="after which no call is begun; the same command goes on")
    parser.add_argument(
        "--export", metavar="FILE", help="writes the table there, to share or to commit; FOLDER/: under its own name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the entries of this run there")


def run(args: argparse.Namespace) -> int:
    """Prints what was found; 1 if it was interrupted or something was left out, 2 for bad arguments."""
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    try:
        options = Options(known_backends(args.backends), args.search, args.allow_lost_nan)
        for name in args.models:
            networks.check(name)
        if device.type == "cuda" and (reason := backends.no_gpu()):
            raise ValueError(reason)
        calls = functools.partial(_calls, args, device)
        found = in_rounds(calls, device, options, again=args.again, deadline=deadline)
        print(found)
        _write(args, found, device)
    except (ImportError, OSError, RuntimeError, ValueError) as problem:
        print(f"fastconv qualify: {problem}", file=sys.stderr)
        return 2
    return 1 if found.is_interrupted or found.left_out else 0


def _calls(args: argparse.Namespace, device: torch.device) -> Collected:
    found = Collected()
    on_gpu = device.type == "cuda"
    dtype = DTYPES[args.dtype or ("fp16" if on_gpu else "fp32")]
    for batch in args.batch or [32 if on_gpu else 1]:
        for name in args.models:
            print(f"{name}, batch {batch}: its calls ...", file=sys.stderr, flush=True)
            model, shape = networks.build(name)
            model = model.to(device, dtype).to(memory_format=torch.channels_last)
            images = laid_out(torch.randn(batch, *shape, device=device, dtype=dtype), args.layout)
            found.add(calls_of(model, [images], inference=not args.no_inference, training=not args.no_training))
        if args.layers or not args.models:
            with recording() as collected:
                for layer in LAYERS:
                    if args.op and layer.op not in args.op:
                        continue
                    tensors = layer.sized(batch).tensors(dtype, args.layout, device)
                    if args.no_training:
                        layer(tensors, None)
                        continue
                    wanted = mapped(tensors, lambda tensor: tensor.requires_grad_())
                    if layer.reads_image:
                        wanted["input"].requires_grad_(False)
                    outputs = layer(wanted, None)
                    leaves = [tensor for _, tensor in named_tensors(wanted) if tensor.requires_grad]
                    torch.autograd.grad(outputs, leaves, [torch.randn_like(output) for output in outputs])
            found.add(collected)
    return found


def _write(args: argparse.Namespace, found: Qualification, device: torch.device) -> None:
    if args.export:
        table = table_files.load(found.path, fingerprint(device))
        if table is None:
            raise ValueError(f"there is no table in {found.path} to export")
        path = Path(args.export)
        if args.export.endswith(os.sep):
            path.mkdir(parents=True, exist_ok=True)
        print(f"written to {table_files.export(table, path)}")
    if args.json:
        document = {"device": found.device, "entries": [tables.plain(entry) for entry in found.entries]}
        args.json.write_text(json.dumps(document, indent=1) + "\n")

"""``python -m fastconv explain MODEL``: what swapping a model would change, and why not the rest."""

from __future__ import annotations

import argparse
import sys

import torch

from fastconv.measure import networks
from fastconv.swapping import explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"one of {networks.known()}")
    parser.add_argument("--batch", type=int, default=1, help="of the example input (default 1)")
    parser.add_argument("--size", type=int, help="its height and width (default: those the network was made for)")


def run(args: argparse.Namespace) -> int:
    """Prints the explanation; 2 if there is no such network."""
    try:
        model, shape = networks.build(args.model)
    except (ImportError, ValueError) as problem:
        print(f"fastconv explain: {problem}", file=sys.stderr)
        return 2
    if args.size:
        shape = (shape[0], args.size, args.size)
    print(explain(model.eval(), torch.randn(args.batch, *shape)))
    return 0

"""``python -m fastconv explain MODEL``: what swapping a model would change, and why not the rest."""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

from .. import models
from ..swapping import explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help=f"one of {', '.join(models.names())}, or torchvision:NAME",
    )
    parser.add_argument("--batch", type=int, default=1, help="of the example input (default 1)")
    parser.add_argument("--size", type=int, help="its height and width (default: the paper's)")


def run(args: argparse.Namespace) -> int:
    family, _, name = args.model.rpartition(":")
    try:
        if family == "torchvision":
            model, shape = _torchvision(name), (args.batch, 3, 224, 224)
        else:
            model, shape = models.build(args.model), models.input_shape(args.model, args.batch)
    except (ImportError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.size:
        shape = (*shape[:2], args.size, args.size)
    print(explain(model.eval(), torch.randn(shape)))
    return 0


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)

"""The truth: what an operator's outputs are in float64, computed on the device itself, in pieces that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..aten_kernels import OPERATORS
from ..measure.timing import untuned_cudnn
from ..operators.shape_classes import IMAGES
from .calls import OperatorCall, flat, mapped_tensors

# Of the outputs of backward operators, those that have images; the others are sums over all of them.
_OF_IMAGES = {
    "conv2d_backward": (0, 3),
    "pointwise_conv2d_group_backward": (0,),
    "depthwise_separable_conv2d_backward": (0,),
}
# Of float64 tensors at a time, in bytes.
MOST_MEMORY = {"cpu": 2**29, "cuda": 2**31}
# Up to so many elements, the truth of a GPU is held against that of the CPU.
_SMALL = 200_000


class Untrustworthy(RuntimeError):
    """The device's own float64 is not what the CPU's is."""


def exact(call: OperatorCall, args: Sequence[Any], device: torch.device) -> list[Tensor]:
    """The outputs in float64 of the very same arguments.

    Raises:
        Untrustworthy: on a GPU, where those of a small call are not what a CPU computes.
    """
    with untuned_cudnn():
        found = in_pieces(call, args)
    if device.type != "cpu" and call.numel <= _SMALL:
        again = in_pieces(call, mapped_tensors(args, Tensor.cpu))
        for one, other in zip(found, again, strict=True):
            scale = float(other.abs().nan_to_num(0.0).max()) if other.numel() else 0.0
            if not torch.allclose(one.cpu(), other, rtol=1e-9, atol=1e-9 * scale, equal_nan=True):
                raise Untrustworthy(f"float64 results of {call.operator} on {device} are not those of the CPU")
    return found


def in_pieces(call: OperatorCall, args: Sequence[Any]) -> list[Tensor]:
    """A few images at a time."""
    images = call.batch
    first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    bytes_of_an_image = 8 * 6 * max(1, call.numel // max(1, images))
    at_once = max(1, MOST_MEMORY.get(first.device.type, 2**29) // bytes_of_an_image)
    if images <= at_once:
        return flat(OPERATORS[call.operator](*mapped_tensors(args, Tensor.double)))
    pieces = []
    for start in range(0, images, at_once):

        def piece(tensor: Tensor, start: int = start) -> Tensor:
            return tensor[start : start + at_once].double()

        named = zip(call.named(), args, strict=True)
        some = [mapped_tensors([v], piece if name in IMAGES else Tensor.double)[0] for name, v in named]
        pieces.append(OPERATORS[call.operator](*some))
    if not call.is_backward:
        return [torch.cat(parts) for parts in zip(*map(flat, pieces), strict=True)]
    of_images = _OF_IMAGES.get(call.operator, (0,))
    joined: list[Tensor] = []
    for i, parts in enumerate(zip(*(p if isinstance(p, (list, tuple)) else [p] for p in pieces), strict=True)):
        for same in zip(*map(flat, parts), strict=True):
            joined.append(torch.cat(same) if i in of_images else torch.stack(same).sum(0))
    return joined

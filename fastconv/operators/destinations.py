"""Where a result may go, if the caller says so (``out``): the checks of it, as in csrc/common/checks.cpp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import has_memory, storage
from .messages import dtype_of, fail, listed, shape_of


def check(op: str, name: str, out: Tensor, shape: Sequence[int], like: Tensor, others: Iterable[Tensor | None]) -> None:
    """A result of this shape, in the dtype and on the device of `like`, can go into `out`, which overlaps neither
    itself nor the others.

    Of tensors without memory of their own, as while torch.compile traces, only the former is known.
    """
    if (list(out.shape), out.dtype, out.device) != (list(shape), like.dtype, like.device):
        fail(
            op,
            f"{name} of shape {shape_of(out)}, {dtype_of(out)} on {out.device}",
            f"{listed(shape)}, {dtype_of(like)} on {like.device}, as the result is",
            "allocate it so, it is not resized",
        )
    storage(op, name, out)
    if _overlaps_itself(out):
        fail(
            op,
            f"{name} of shape {shape_of(out)} with strides {listed(out.stride())}",
            "memory for every element",
            "pass a tensor whose elements do not overlap",
        )
    if any(other is not None and _overlap(out, other) for other in others):
        fail(
            op,
            f"{name} that overlaps the memory of another argument",
            "memory of its own",
            "pass another tensor, or a slice that nothing else uses",
        )


def check_each(
    op: str, out: Sequence[Tensor], shapes: Sequence[Sequence[int]], like: Tensor, others: Iterable[Tensor | None]
) -> None:
    if len(out) != len(shapes):
        fail(op, f"{len(out)} tensors in out", f"{len(shapes)}, one for each weight", "pass as many")
    taken = list(others)
    for i, (tensor, shape) in enumerate(zip(out, shapes, strict=True)):
        check(op, f"out[{i}]", tensor, shape, like, taken)
        taken.append(tensor)


def check_for(op: str, found: Any, args: Sequence[Any], out: Any) -> None:
    """What an operator found for its arguments, a tensor or several, can go into `out`."""
    others = tensors(args)
    if isinstance(found, Tensor):
        check(op, "out", out, found.shape, found, others)
    else:
        check_each(op, out, [result.shape for result in found], found[0], others)


def store(op: str, found: Any, args: Sequence[Any], out: Any) -> None:
    """Copies it there, after that check."""
    check_for(op, found, args, out)
    for result, destination in zip(tensors([found]), tensors([out]), strict=True):
        destination.copy_(result)


def tensors(args: Sequence[Any]) -> list[Tensor]:
    """Those among an operator's arguments, in lists too."""
    lists = [arg if isinstance(arg, (list, tuple)) else [arg] for arg in args]
    return [value for values in lists for value in values if isinstance(value, Tensor)]


def check_writable(op: str, out: Tensor) -> None:
    """torch's own rule for what is written in place."""
    if out.is_inference() and not torch.is_inference_mode_enabled():
        fail(
            op,
            "out that was made in inference mode",
            "a tensor from outside of it",
            "clone it, or call the op within torch.inference_mode()",
        )


def check_no_gradient(op: str, needed: bool) -> None:
    if needed:
        fail(
            op,
            "out beside an argument that requires grad",
            "no such argument while gradients are recorded",
            "call it without out, or within torch.no_grad()",
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory; taken for granted where the strides interleave too wildly to tell."""
    extents = list(zip(tensor.stride(), tensor.shape, strict=True))
    if torch.compiler.is_compiling() or not all(type(number) is int for extent in extents for number in extent):
        return any(size > 1 and stride == 0 for stride, size in extents)
    if 0 in tensor.shape:
        return False
    steps: list[tuple[int, tuple[int, int]]] = []  # the longest first
    reach = 0
    for stride, size in sorted(extents):
        if size == 1:
            continue
        if stride == 0 or any(stride == shorter for shorter, _ in steps):
            return True
        # In a tensor that was allocated, sliced or permuted a step is longer than all the shorter ones together.
        if stride <= reach:
            work = [1000]
            # at least one step of this dimension, none of a longer one, back to where it began
            if _add_up(0, [(stride, (1, size - 1)), *steps], work) or work[0] < 0:
                return True
        steps.insert(0, (stride, (1 - size, size - 1)))
        reach += stride * (size - 1)
    return False


def _overlap(one: Tensor, two: Tensor) -> bool:
    if torch.compiler.is_compiling() or not (has_memory(one) and has_memory(two)):
        return False
    # the distance that one step covers, and the fewest and the most steps from a byte of one to a byte of the other
    steps: dict[int, tuple[int, int]] = {}

    def add(length: int, least: int, most: int) -> None:
        low, high = steps.get(length, (0, 0))
        steps[length] = (low + least, high + most)

    size = one.element_size()
    for extent, stride in zip(one.shape, one.stride(), strict=True):
        add(stride * size, 0, extent - 1)
    for extent, stride in zip(two.shape, two.stride(), strict=True):
        add(stride * size, 1 - extent, 0)
    add(1, 1 - size, size - 1)
    steps.pop(0, None)
    return _add_up(two.data_ptr() - one.data_ptr(), sorted(steps.items(), reverse=True), [1000])


def _add_up(distance: int, steps: list[tuple[int, tuple[int, int]]], work: list[int]) -> bool:
    """Whether the steps, the longest first, add up to this distance.

    What the shorter ones can reach leaves few counts of the longest to try, in slices of one tensor at most three;
    gives up, hence no, when `work` tries are spent and it is then negative.
    """
    if not steps:
        return distance == 0
    (length, (least, most)), *shorter = steps
    low = sum(step * fewest for step, (fewest, _) in shorter)
    high = sum(step * highest for step, (_, highest) in shorter)
    for count in range(max(least, -((high - distance) // length)), min(most, (distance - low) // length) + 1):
        work[0] -= 1
        if work[0] < 0:
            return False
        if _add_up(distance - count * length, shorter, work):
            return True
    return False

"""Who takes part where whole networks are measured, and what is found of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

import fastconv
from fastconv.measure import timing
from fastconv.measure.calls import laid_out

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
IN_TRAINING = {
    "cpu": (CHANNELS_LAST, CONTIGUOUS, LRN_ONLY, SWAPPED),
    "cuda": (CHANNELS_LAST, COMPILED, SWAPPED),
}
OURS = (SWAPPED, SWAPPED_GRAPH)
GRAPHS = (EAGER_GRAPH, SWAPPED_GRAPH)


@dataclass
class Result(timing.Result):
    """One contender on one task."""

    error: float | None = None  # see Row.allowed_error
    peak_bytes: int | None = None  # in training, see memory.peak_bytes
    note: str = ""  # why there are no seconds


@dataclass
class Row:
    """One task: a network in inference or in training, in a dtype, for a batch."""

    network: str
    mode: str
    dtype: str
    batch: int
    results: dict[str, Result] = field(default_factory=dict)
    # In inference of the class scores, largest error / largest score; in training of the gradient in float32
    # of that parameter where it is largest, norm of the error / norm of the gradient.
    allowed_error: float = 0.0
    note: str = ""  # why there are no results

    @property
    def is_wrong(self) -> bool:
        return any(result.note.startswith("WRONG") for result in self.results.values())

    def judge(self, who: str, error: float) -> bool:
        """Enters the error of a contender of ours; whether it is small enough to be given a time."""
        self.results[who] = Result(error=error)
        is_right = error <= self.allowed_error  # not so for NaN
        if not is_right:
            self.results[who].note = f"WRONG: error {error:.1e}, allowed {self.allowed_error:.1e}"
        return is_right

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


def images_for(who: str, images: Tensor) -> Tensor:
    """In the layout that this contender takes them in."""
    return laid_out(images, "contiguous" if who == CONTIGUOUS else "channels_last")


class EagerLRN(nn.LocalResponseNorm):
    """On a CPU in float32 for 16-bit input: aten has no other kernel there, so users write this."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu" and input.dtype.itemsize == 2:
            return super().forward(input.float()).to(input.dtype)
        return super().forward(input)

"""What the planners of csrc/cuda choose for a call, asked without running it.

The ops run in the emulator, which checks and notes launches and touches no tensor: so what is asked is the very code
that chooses on a GPU, with its tensors' layouts and alignment, and calls of any size cost no more than small ones.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import emulator
import machine_code
from fastconv.operators import kernels
from gpu_model import Gpu
from zoo_convolutions import Convolution

BACKEND = "cuda-emulated"
PASSES = ("fprop", "dgrad", "wgrad")
Call = Callable[[], Any]


@dataclass(frozen=True)
class Launch:
    kernel: str  # as the table of kernels has it
    code: str  # as machine_code has it
    blocks: int
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Plan:
    """What one choice came to: the kernel, and its launches with those that finish its work."""

    choice: kernels.Choice
    launches: tuple[Launch, ...]

    @property
    def candidate(self) -> kernels.Candidate:
        return next(each for each in self.choice.candidates if each.kernel == self.choice.chosen)


@functools.cache
def _library() -> emulator.Library:
    found = emulator.library()
    kernels.add(BACKEND, found)
    return found


@functools.cache
def _names() -> dict[int, str]:
    """Of the kernels in the emulator's library, by where they lie."""
    text = subprocess.run(["nm", str(_library().path)], stdout=subprocess.PIPE, text=True, check=True).stdout
    at = {int(address, 16): name for address, name in re.findall(r"(\w+) [tTwW] (_ZN8fastconv\w+)", text)}
    plain = machine_code.readable(list(at.values()))
    types = {"Half": "__half", "BFloat16": "__nv_bfloat16"}
    return {
        address: re.sub(r"\b(Half|BFloat16)\b", lambda match: types[match[1]], plain[name])
        for address, name in at.items()
    }


def plan(gpu: Gpu, call: Call) -> list[Plan]:
    """What the call would choose and launch on this GPU. The launches all belong to the last choice."""
    library = _library()
    library.device(gpu.facts)
    try:
        with torch.no_grad(), kernels.choices() as made, library.planning() as noted:
            call()
    finally:
        library.reset_device()
    launches = tuple(
        Launch(
            entry["kernel"],
            _names()[entry["code"]],
            math.prod(entry["grid"]),
            entry["threads"],
            entry["shared_bytes"],
        )
        for entry in noted
    )
    chosen = [choice for choice in made if choice.backend == BACKEND]
    return [Plan(choice, launches) for choice in chosen]


@contextlib.contextmanager
def forced(op: str, kernel: str) -> Iterator[None]:
    _library()
    with kernels.forced(op, kernel, BACKEND):
        yield


def table() -> list[dict[str, Any]]:
    return _library().kernel_table()


def empty(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format = torch.channels_last) -> Tensor:
    """Without memory of its own, as nothing touches it."""
    return torch.empty(shape, dtype=dtype, memory_format=layout)


def call_of(
    conv: Convolution,
    batch: int,
    direction: str,
    dtype: torch.dtype = torch.float16,
    layout: torch.memory_format = torch.channels_last,
) -> Call:
    """The convolution with its ReLU, or one of its gradients."""
    ops = torch.ops.fastconv_emulated
    _library()
    image = empty((batch, conv.channels, *conv.image), dtype, layout)
    weight = empty((conv.filters, conv.channels // conv.groups, *conv.kernel), dtype, layout)
    bias = torch.empty(conv.filters, dtype=dtype)
    geometry = [list(conv.stride), list(conv.padding), [1, 1]]
    if direction == "fprop":
        if conv.is_depthwise:
            return partial(ops.depthwise_conv2d, image, weight, bias, *geometry, "relu")
        return partial(ops.conv2d_relu, image, weight, bias, *geometry, conv.groups, "relu")
    output = empty((batch, conv.filters, *conv.output), dtype, layout)
    activation, saved = ("relu", output) if conv.relu else ("none", None)
    # A batch norm leaves no bias.
    mask = [direction == "dgrad", direction == "wgrad", direction == "wgrad" and conv.relu, False]
    return partial(ops.conv2d_backward, output, saved, image, weight, *geometry, conv.groups, activation, mask)

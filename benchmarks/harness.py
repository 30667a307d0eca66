"""One way to time everything: verify first, then let pytest-benchmark repeat and count.

A case is a layer, a direction (forward, backward) and a contender. Its result is compared with
float64 by fastconv/measure/tolerance.py; a wrong one fails and gets no time.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cudnn
import eager
from fastconv import ops
from fastconv.measure.calls import BATCHED, DTYPES, Layer, laid_out, mapped, named_tensors
from fastconv.measure.ceilings import copy_seconds, flop_per_second
from fastconv.measure.timing import clock, cold_cache, durations, synchronize, untuned_cudnn
from fastconv.measure.tolerance import assert_close_to_oracle, poisoned_outputs

Call = Callable[..., Any]
ALL = slice(None)
NONE = slice(0)


@dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    device: torch.device
    dtype: str
    batch: int
    backend: str
    largest_side: float
    seconds: float
    least_rounds: int

    def __str__(self) -> str:
        return f"{self.device.type} {self.dtype} batch {self.batch}"


@dataclass(frozen=True)
class Contender:
    """An implementation, and the layout of its tensors."""

    who: str
    layout: str

    def __str__(self) -> str:
        return f"{self.who}-{self.layout}"

    def call(self, layer: Layer, backend: str) -> Call:
        if self.who == "fastconv":
            return functools.partial(getattr(ops, layer.op), **layer.options, backend=backend)
        if self.who == "cudnn":
            return functools.partial(cudnn.call, **layer.options)
        call = functools.partial(getattr(eager, layer.op), **layer.options)
        if self.who == "eager":
            return call
        torch._dynamo.reset()
        return torch.compile(call, dynamic=False)

    def is_for(self, layer: Layer, direction: str, device: torch.device) -> bool:
        if self.who == "cudnn":
            return device.type == "cuda" and direction == "forward" and cudnn.has(layer)
        return True


CONTENDERS = (
    Contender("fastconv", "channels_last"),
    Contender("eager", "channels_last"),
    Contender("cudnn", "channels_last"),
    Contender("compile", "channels_last"),
    Contender("fastconv", "contiguous"),
    Contender("eager", "contiguous"),
)


def measure(benchmark: BenchmarkFixture, problem: Problem, contender: Contender) -> None:
    """Verifies the contender, then times it into `benchmark`."""
    device, layout = problem.settings.device, contender.layout
    call = contender.call(problem.layer, problem.settings.backend)
    fastest = flop_per_second(device, DTYPES[problem.settings.dtype])
    try:
        first_call = problem.verify(contender, call)
    except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, say
        pytest.skip(f"torch.compile: {str(error).strip().splitlines()[0]}")
    except RuntimeError as error:
        if contender.who != "cudnn" or "CUDA error" in str(error):
            raise
        pytest.skip(f"cuDNN: {str(error).strip().splitlines()[0]}")  # has none for this layout, say

    benchmark.group = f"{problem.layer.op} {problem.direction}: {problem.layer.name}, {problem.settings}"
    benchmark.extra_info |= {
        "layer": problem.layer.name,
        "why": problem.layer.why,
        "op": problem.layer.op,
        "direction": problem.direction,
        "contender": contender.who,
        "layout": layout,
        "device": device.type,
        "dtype": problem.settings.dtype,
        "batch": problem.settings.batch,
        "bytes": problem.moved_bytes,
        "flop": problem.flop,
        "floor_s": max(copy_seconds(problem.moved_bytes, device), problem.flop / fastest),
        "host_us": host_microseconds(problem, contender, call),
        "first_call_s": first_call,
    }
    target, setup = problem.timed(call, layout, flush=cold_cache(device))
    once = statistics.median(durations(target, setup, clock(device), 3))
    rounds = max(problem.settings.least_rounds, min(1000, int(problem.settings.seconds / once)))
    benchmark.pedantic(target, setup=setup, rounds=rounds)

    if benchmark.stats is not None:  # not with --benchmark-disable
        median = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "gb_per_s": problem.moved_bytes / median / 1e9,
            "of_floor": benchmark.extra_info["floor_s"] / median,
            "gflop_per_s": problem.flop / median / 1e9,
        }


class Problem:
    """A layer in one direction, with random arguments and what has to come out."""

    def __init__(self, layer: Layer, direction: str, settings: Settings) -> None:
        self.layer = layer.sized(settings.batch, settings.largest_side)
        self.direction = direction
        self.settings = settings
        torch.manual_seed(0)
        dtype = DTYPES[settings.dtype]
        self._arguments = self.layer.tensors(dtype, "contiguous", settings.device)
        self._reference = functools.partial(getattr(ops, layer.op), **layer.options, backend="reference")
        self._baselines: dict[str, dict[str, Tensor]] = {}
        # On a GPU, too: a CPU would take most of the time that there is.
        exact = mapped(self._arguments, Tensor.double)
        with untuned_cudnn():
            self._grads = [
                (gate * torch.randn(gate.shape, device=settings.device)).to(dtype)
                for gate in self.layer.gates(exact, dtype)
            ]
            self._oracle = self._results(
                self._reference, self._recording(exact), [grad.double() for grad in self._grads]
            )

    def verify(self, contender: Contender, call: Call) -> float:
        """Raises if a result is beyond the bounds of fastconv/measure/tolerance.py.

        Returns: seconds that this call took, usually the first.
        """
        arguments, grads = self._tensors(contender.layout)
        if contender.layout not in self._baselines:
            self._baselines[contender.layout] = self._results(self._reference, arguments, grads)
        # torch.compile would compile once more for it.
        poisoned = poisoned_outputs() if contender.who == "fastconv" else nullcontext()
        start = time.perf_counter()
        with poisoned:
            found = self._results(call, arguments, grads)
            synchronize(self.settings.device)
        seconds = time.perf_counter() - start

        for name, oracle in self._oracle.items():
            spatial = oracle.dim() == 4 and min(oracle.shape[-2:]) > 1
            assert_close_to_oracle(
                found[name],
                oracle,
                self._baselines[contender.layout][name],
                what=f"{contender}, {self.layer.name}, {self.direction}, {name}",
                border=self.layer.border if spatial else None,
            )
        return seconds

    def timed(self, call: Call, layout: str, *, flush: Call, images: slice = ALL) -> tuple[Call, Call]:
        """(target, setup): what to time; and what runs, untimed, before each round."""
        arguments, grads = self._tensors(layout, images)
        if self.direction == "forward":

            def setup() -> tuple[tuple[()], dict[str, Any]]:
                flush()
                return (), arguments

            return call, setup

        leaves = list(_leaves(arguments).values())

        def backward(outputs: Any) -> Any:
            return torch.autograd.grad(outputs, leaves, grads)

        def run_forward() -> tuple[tuple[Any], dict[str, Any]]:
            outputs = call(**arguments)
            flush()
            return (outputs,), {}

        return backward, run_forward

    @property
    def moved_bytes(self) -> int:
        """Every tensor that must be read or written, once; no intermediate results."""
        arguments = sum(tensor.nbytes for _, tensor in named_tensors(self._arguments))
        outputs = sum(grad.nbytes for grad in self._grads)
        if self.direction == "forward":
            return arguments + outputs
        if self.layer.op == "add_relu":  # reads gradient and mask; one gradient serves both inputs
            return 3 * outputs
        mask = outputs if self.layer.activation != "none" else 0
        found = arguments - (self._arguments["input"].nbytes if self.layer.reads_image else 0)
        return outputs + mask + arguments + found

    @property
    def flop(self) -> int:
        """Of the convolutions by their definition; those of the backward for each gradient."""
        on_meta = mapped(self._arguments, lambda tensor: tensor.to("meta"))
        with FlopCounterMode(display=False) as counter:
            getattr(eager, self.layer.op)(**on_meta, **self.layer.options)
        gradients = 1 if self.layer.reads_image else 2
        return counter.get_total_flops() * (1 if self.direction == "forward" else gradients)

    def _recording(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """For the backward, leaves: all tensors but images."""
        backward = self.direction == "backward"
        arguments = mapped(arguments, lambda tensor: tensor.detach().requires_grad_(backward))
        arguments["input"].requires_grad_(backward and not self.layer.reads_image)
        return arguments

    def _tensors(self, layout: str, images: slice = ALL) -> tuple[dict[str, Any], list[Tensor]]:
        """Arguments, and gradients of the outputs."""

        arguments = {name: value[images] if name in BATCHED else value for name, value in self._arguments.items()}
        return (
            self._recording(mapped(arguments, lambda tensor: laid_out(tensor, layout))),
            [laid_out(grad[images], layout) for grad in self._grads],
        )

    def _results(self, call: Call, arguments: dict[str, Any], grads: list[Tensor]) -> dict[str, Tensor]:
        """Outputs, or gradients, by name."""
        outputs = call(**arguments)
        if self.direction == "forward":
            return dict(named_tensors({"output": outputs}))
        leaves = _leaves(arguments)
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        return {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True)}


# The contenders of a layer follow each other, and need the same one.
problem_of = functools.lru_cache(maxsize=1)(Problem)


def _leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in named_tensors(arguments) if tensor.requires_grad}


def host_microseconds(problem: Problem, contender: Contender, call: Call) -> float | None:
    """What a call costs the host before any arithmetic.

    On a GPU the time until the call returns; on a CPU the time for an empty batch, for which
    torch.compile would compile once more.
    """
    device = problem.settings.device
    on_cpu = device.type == "cpu"
    if on_cpu and contender.who == "compile":
        return None
    images = NONE if on_cpu else ALL
    target, setup = problem.timed(call, contender.layout, flush=lambda: synchronize(device), images=images)
    return 1e6 * statistics.median(durations(target, setup, time.perf_counter, 50))

"""How calls are timed: in turns, for as long as there is time; on the clock of the host or of a GPU."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FEWEST_RUNS, MOST_RUNS = 3, 50
MOST_SECONDS = 20.0  # of repeats that share a Budget

CPU = torch.device("cpu")


@dataclass
class Result:
    """The times of one contender."""

    seconds: list[float] = field(default_factory=list)  # of each run

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


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    results: Mapping[str, Result],
    allowance: float,
    device: torch.device = CPU,
) -> None:
    """Times the calls one after the other, again and again, so that a busy moment of the machine hits all alike.

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


class Budget:
    """Spreads the time that is left over the tasks that are left."""

    def __init__(self, seconds: float, tasks: int) -> None:
        self._start = time.perf_counter()
        self._seconds = seconds
        self._tasks = tasks

    def next_task(self) -> float:
        """Seconds to spend on repeats; as much again goes into building, float64 and first runs."""
        left = self._seconds - (time.perf_counter() - self._start)
        share = left / max(1, self._tasks) / 2
        self._tasks -= 1
        return min(max(0.0, share), MOST_SECONDS)


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


def durations(
    target: Callable[..., Any],
    setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
    now: Callable[[], Any],
    repeats: int,
) -> list[float]:
    """Seconds of each repeat, after one for warming up; `setup` returns the arguments and is not timed."""

    def once() -> float:
        args, kwargs = setup()
        start = now()
        target(*args, **kwargs)
        return now() - start

    once()
    return [once() for _ in range(repeats)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes with so many threads: small layers gain nothing from more, and wait for busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------- GPUs


def synchronize(device: torch.device) -> None:
    """Waits for what was launched."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clock(device: torch.device) -> Callable[[], Any]:
    """What returns a moment, in whose differences seconds are counted."""
    return CudaInstant if device.type == "cuda" else time.perf_counter


class CudaInstant:
    """A moment of the GPU; one subtracts two, as with those of time.perf_counter."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: CudaInstant) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


@functools.cache
def cold_cache(device: torch.device) -> Callable[[], Any]:
    """What makes a GPU's L2 cache cold, and keeps the GPU busy while the host launches the target.

    A CPU's caches stay as they are: as warm as the layer before leaves them.
    """
    if device.type != "cuda":
        return lambda: None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    memory = torch.empty(size, dtype=torch.uint8, device=device)

    def flush() -> None:
        memory.zero_()
        # Half a millisecond: overwriting alone is done before a host that is slow has launched anything, and the
        # time between the two events would then be the host's.
        torch.cuda._sleep(1_000_000)

    return flush


@contextmanager
def _cudnn_with(switch: str, value: bool) -> Iterator[None]:
    before = getattr(torch.backends.cudnn, switch)
    setattr(torch.backends.cudnn, switch, value)
    try:
        yield
    finally:
        setattr(torch.backends.cudnn, switch, before)


def untuned_cudnn() -> AbstractContextManager[None]:
    """Inside, cuDNN tries out nothing: trying all float64 algorithms, to run one of them once, would take long."""
    return _cudnn_with("benchmark", False)


def tf32(allowed: bool) -> AbstractContextManager[None]:
    """Inside, float32 convolutions may use TF32, or may not.

    The switch is for all of cuDNN: with a different one for convolutions alone torch.export raises, halfway into its
    own change of the backends' switches.
    """
    return _cudnn_with("allow_tf32", allowed)


def true_float32() -> AbstractContextManager[None]:
    """Inside, float32 convolutions do without TF32, whose rounding hides errors."""
    return tf32(False)


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

"""The times of candidates that passed, in turns, and which of them is to run.

On a CPU wall time. On a GPU the time between two events around the call, after its L2 cache was flushed; the time of
the host until the call returns; and for short calls the time of a replayed CUDA graph. What counts is the larger of the
first two, which is what a caller waits for.

A candidate wins if it was faster than aten beyond the spread: of the ratios of their times, one for each turn, the 80th
percentile is below 1, in one series of turns and again in another. So whatever slows the machine down hits both, and
the luckiest of many is not taken for the fastest. On a GPU its kernels must not be slower than aten's either, for then
it would lose in a CUDA graph. What runs without a table, as the CPU's own kernels do, stays unless it was slower: its
median has to be below 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..measure.timing import captured, clock, cold_cache, synchronize
from ..operators.tables import Times
from .calls import flat

Call = Callable[[], object]

FEWEST_TURNS, MOST_TURNS = 7, 40
# Of a series, shared by all candidates.
SECONDS = 1.0
# Kernels shorter than this are timed in CUDA graphs, too.
_SHORT = 200e-6
# Percentiles of the spread.
_LOW, _HIGH = 0.2, 0.8


@dataclass
class Series:
    """Seconds of each turn."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)

    @property
    def waited(self) -> list[float]:
        """What a caller waits for."""
        return [max(pair) for pair in zip(self.device, self.host, strict=True)] if self.host else self.device


def take_turns(calls: Mapping[str, Call], device: torch.device, seconds: float = SECONDS) -> dict[str, Series]:
    """Times the calls one after the other, again and again, as often as `seconds` allow; every other turn backwards, as
    who comes second may find caches that the first has filled."""
    flush, now = cold_cache(device), clock(device)
    found = {name: Series() for name in calls}
    moments: dict[str, list[tuple[object, object]]] = {name: [] for name in calls}
    started = time.perf_counter()

    def goes_on(turn: int) -> bool:
        return turn < FEWEST_TURNS or (turn < MOST_TURNS and time.perf_counter() - started < seconds)

    turn = 0
    while goes_on(turn):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            call = calls[name]
            flush()
            begin = now()
            host = time.perf_counter()
            call()
            host = time.perf_counter() - host
            end = now()
            if device.type == "cpu":
                found[name].device.append(end - begin)
            else:
                found[name].host.append(host)
                moments[name].append((begin, end))
        synchronize(device)
        turn += 1
    for name, pairs in moments.items():
        found[name].device += [end - begin for begin, end in pairs]  # type: ignore[operator]
    return found


def time_graphs(calls: Mapping[str, Call], device: torch.device, found: Mapping[str, Series]) -> None:
    """Adds the times of CUDA graphs, of all or of none: where the kernels are so short that launching them counts, and
    where they can be captured."""
    if device.type != "cuda" or all(statistics.median(series.device) > _SHORT for series in found.values()):
        return
    replays: dict[str, Call] = {}
    for name, call in calls.items():

        def first(call: Call = call) -> Tensor:
            return flat(call())[0]

        try:
            replays[name] = captured(first)
        except RuntimeError:
            return
    for name, series in take_turns(replays, device, SECONDS / 2).items():
        found[name].graph = series.device


def times(seconds: list[float]) -> Times | None:
    """Median, 20th and 80th percentile."""
    if not seconds:
        return None
    return statistics.median(seconds), quantile(seconds, _LOW), quantile(seconds, _HIGH)


def quantile(values: list[float], share: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), share))


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b if b > 0 else 1.0 for a, b in zip(ours, theirs, strict=True)]


def loses(ours: Series, aten: Series, is_default: bool) -> str:
    """Why it is not to run instead of aten; "" if it is. `is_default`: it is what runs without a table."""
    found = ratios(ours.waited, aten.waited)
    low, median, high = quantile(found, _LOW), statistics.median(found), quantile(found, _HIGH)
    if (median if is_default else high) >= 1:
        beyond = "" if is_default else " beyond the spread"
        return f"not faster than aten{beyond}: {median:.2f}x ({low:.2f} to {high:.2f})"
    if ours.host:
        kernels = ratios(ours.graph, aten.graph) if ours.graph and aten.graph else ratios(ours.device, aten.device)
        if quantile(kernels, _LOW) > 1:
            return f"its kernels take {statistics.median(kernels):.2f}x as long as aten's, the host alone gains"
    return ""

"""Networks in inference: verified against float64, then timed in turns."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

from fastconv.measure import networks
from fastconv.measure.calls import DTYPES
from fastconv.measure.contenders import CHANNELS_LAST, GRAPHS, OURS, Result, Row, images_for, prepare
from fastconv.measure.timing import Budget, Pace, captured, synchronize, take_turns, untuned_cudnn
from fastconv.measure.tolerance import BASELINE_FACTOR

Call = Callable[[], Tensor]


@dataclass
class Plan:
    """What is measured of each network.

    Attributes:
        device: where.
        who: the contenders, among them CHANNELS_LAST.
        dtypes: names in `DTYPES`.
        batches: in ascending order.
        budget: of time for all rows, those of other networks included.
        longest: seconds; 16-bit runs of eager on the CPU that must take longer are left out.
    """

    device: torch.device
    who: Sequence[str]
    dtypes: Sequence[str]
    batches: Sequence[int]
    budget: Budget
    longest: float

    def __post_init__(self) -> None:
        self.pace = Pace()


@torch.no_grad()
def infer(network: str, plan: Plan) -> Iterator[Row]:
    """A row for each dtype and batch."""
    try:
        model, shape = networks.build(network)
    except (ImportError, ValueError) as problem:
        for dtype, batch in itertools.product(plan.dtypes, plan.batches):
            plan.budget.next_task()
            yield Row(network, "inference", dtype, batch, note=f"skipped: {problem}")
        return
    update_bn([torch.randn(4, *shape)], model)  # as training does; unnormalised values would grow
    model.eval()
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(torch.empty(1, *shape, device="meta"))
    image_flop = counter.get_total_flops()
    model.to(plan.device)
    all_images = torch.randn(plan.batches[-1], *shape).to(plan.device)

    for dtype in plan.dtypes:
        contest = _Contest(model, all_images, image_flop, dtype, plan)
        for batch in plan.batches:
            row = Row(network, "inference", dtype, batch, allowed_error=contest.allowed_error)
            contest.measure(row)
            yield row


class _Contest:
    """The contenders on one network in one dtype."""

    def __init__(self, model: nn.Module, images: Tensor, image_flop: int, dtype: str, plan: Plan) -> None:
        self._plan = plan
        self._dtype = dtype
        self._image_flop = image_flop
        typed = copy.deepcopy(model).to(DTYPES[dtype])
        self._images = images.to(DTYPES[dtype])
        ends = self._images[:: max(1, len(images) - 1)]  # the first and the last
        with untuned_cudnn():
            self._oracle = copy.deepcopy(typed).double()(ends.double())
        self._models = {who: prepare(who, copy.deepcopy(typed)) for who in plan.who}
        baseline = self._models[CHANNELS_LAST](images_for(CHANNELS_LAST, ends))
        self.allowed_error = BASELINE_FACTOR * _error(baseline, self._oracle) + torch.finfo(DTYPES[dtype]).eps

    def measure(self, row: Row) -> None:
        """Enters a result for each contender; only what is right and may be repeated is."""
        calls = {}
        for who in self._models:
            call = self._first_run(who, row)
            if call is not None:
                calls[who] = call
        take_turns(calls, row.results, self._plan.budget.next_task(), self._plan.device)
        for who in calls:
            self._plan.pace.saw(who, self._dtype, self._image_flop * row.batch, min(row.results[who].seconds))

    def _first_run(self, who: str, row: Row) -> Call | None:
        """Judges what the contender returns; the call to repeat, None if it is not to be."""
        plan, flop = self._plan, self._image_flop * row.batch
        may_be_slow = self._dtype != "fp32" and who not in OURS and plan.device.type == "cpu"
        at_least = plan.pace.seconds(who, self._dtype, flop)
        if may_be_slow and at_least > plan.longest:
            row.results[who] = Result(note=f"left out: at least {at_least:.0f} s")
            return None
        call: Call = functools.partial(self._models[who], images_for(who, self._images[: row.batch]))
        if who in OURS:
            call()  # packs the weights
        if who in GRAPHS:
            call = captured(call)
        start = time.perf_counter()
        output = call()
        synchronize(plan.device)
        seconds = time.perf_counter() - start
        plan.pace.saw(who, self._dtype, flop, seconds)

        scores = output[[0, -1]] if 1 < row.batch == len(self._images) else output[:1]
        error = _error(scores, self._oracle[: len(scores)])
        if who in OURS:
            return call if row.judge(who, error) else None
        row.results[who] = Result(error=error)
        if may_be_slow and seconds > plan.longest:
            row.results[who].seconds.append(seconds)
            return None
        return call


def _error(output: Tensor, oracle: Tensor) -> float:
    return float((output.double() - oracle).abs().max() / oracle.abs().max())

"""What is found out about one call: which candidates are right, how fast those are, and which is to run.

What goes on is told in events, of which each is a dictionary, so that whoever waits knows what was at work when this
process dies: ``{"trying": [backend, variant]}`` before a candidate is run, ``{"candidate": ...}`` once it was judged or
timed, at last ``{"entry": ...}``, both as in a table's file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..operators import backends, kernels, tables
from ..operators.messages import one_line
from ..operators.tables import Candidate, Entry, Key
from . import timing
from .calls import OperatorCall
from .candidates import REFERENCE, Contender, bound, contenders, out_runner, runner
from .judging import Judge
from .truth import Untrustworthy
from .variants import climb, cuda_variants, triton_candidates, triton_neighbours

Event = dict[str, Any]

MOST_SEARCHED = 16  # of block sizes
MOST_KERNELS, _FEW_KERNELS = 8, 3  # of a family that choose for a call, with a search and without
_WORDS = 300  # characters of an error
_ATEN = Contender(REFERENCE, {})


@dataclass(frozen=True)
class Options:
    """Attributes:
    among: the backends to try beside aten; None for all that can run.
    search: whether block sizes of Triton kernels are tried, too, and more of the CUDA kernels.
    allow_lost_nan: whether a candidate may win that turns NaN into a number.
    seconds: of a series of turns of a candidate and aten.
    """

    among: tuple[str, ...] | None = None
    search: bool = False
    allow_lost_nan: bool = False
    seconds: float = 0.3


class Broken(RuntimeError):
    """After this candidate nothing works in this process any more."""


class Examination:
    """Of one call on one device.

    Args:
        known: what was found out before this process; those refused are not tried again.
    """

    def __init__(
        self, call: OperatorCall, device: torch.device, options: Options, known: Sequence[Candidate] = ()
    ) -> None:
        self._call = call
        self._device = device
        self._options = options
        self._found = {Contender(one.backend, one.variant).key: one for one in known}
        self._judge = Judge(call, device)
        self._args = call.draw(device, 0)
        self._series: dict[str, timing.Series] = {}
        self._aten = timing.Series()  # beside the last one

    def run(self, backward: Sequence[Key] = ()) -> Iterator[Event]:
        """Examines; `backward` is kept in the entry."""
        with torch.no_grad():
            yield {"trying": list(_ATEN)}
            self._found[_ATEN.key] = self._of_aten()
            todo = contenders(self._call, self._device, self._options.among)[1:]
            for contender in todo:
                yield from self._examine(contender)
                if not self._is_right(contender):
                    continue
                if kernels.table(contender.backend):
                    most = MOST_KERNELS if self._options.search else _FEW_KERNELS
                    for variant in cuda_variants(self._bound(contender), contender.backend, most):
                        yield from self._examine(Contender(contender.backend, variant))
                elif contender.backend == "triton":
                    yield from self._block_sizes(contender)
            yield from self._confirm()
            entry = Entry(*self._call.shape_class, candidates=self._ordered(), backward=tuple(backward))
            entry = replace(entry, searched=self._options.search)
            yield {"entry": tables.plain(entry)}

    # ------------------------------------------------------------------------------------------ one candidate

    def _examine(self, contender: Contender) -> Iterator[Event]:
        """Judges, and times what is right."""
        known = self._found.get(contender.key)
        if known is not None and (known.outcome != "ok" or contender.key in self._series):
            return
        yield {"trying": list(contender)}
        try:
            found = known if known is not None else self._judged(contender)
            if found.outcome == "ok":
                found = self._timed(contender, found)
        except Untrustworthy:
            raise
        except torch.OutOfMemoryError:
            return  # the machine is to blame, for now: nothing is said of the candidate
        except Exception as error:  # too much shared memory, no such kernel, ...
            found = Candidate(*contender, outcome="refused", reason=_in_words(error))
            self._found[contender.key] = found
            yield {"candidate": tables.plain(found)}
            if self._is_broken():
                raise Broken(found.reason) from error
            return
        self._found[contender.key] = found
        yield {"candidate": tables.plain(found)}

    def _judged(self, contender: Contender) -> Candidate:
        run, into_out = runner(contender, self._call), out_runner(contender, self._call)
        found = self._judge(run, into_out, any_layout=contender.backend == backends.PREPARED)
        reason = found.reason
        if not reason and not found.keeps_nan and not self._options.allow_lost_nan:
            reason = "it turns NaN into a number"
        return Candidate(
            *contender,
            outcome="refused" if reason else "ok",
            reason=reason,
            error=_finite(found.error),
            baseline_error=_finite(found.baseline_error),
            deterministic=found.deterministic,
            keeps_nan=found.keeps_nan,
        )

    def _of_aten(self) -> Candidate:
        """The baseline is right by definition; its error is told."""
        trial = next(self._judge.trials())
        _, error, _ = trial.verdict(trial.baseline)
        return Candidate(REFERENCE, {}, outcome="ok", error=_finite(error), baseline_error=_finite(error))

    def _timed(self, contender: Contender, found: Candidate) -> Candidate:
        ours, aten = self._turns(contender)
        self._series[contender.key], self._aten = ours, aten
        base = self._found[_ATEN.key]
        if base.seconds is None:
            self._found[_ATEN.key] = _with_times(base, aten)
        waited = timing.times(timing.ratios(ours.waited, aten.waited))
        defaults = (backends.default(self._device), backends.PREPARED)
        reason = timing.loses(ours, aten, contender.backend in defaults and not contender.variant)
        return replace(_with_times(found, ours), reason=reason, ratio=waited)

    def _turns(self, contender: Contender) -> tuple[timing.Series, timing.Series]:
        calls = {"ours": self._bound(contender), "aten": self._bound(_ATEN)}
        for call in calls.values():
            call()
        found = timing.take_turns(calls, self._device, self._options.seconds)
        timing.time_graphs(calls, self._device, found)
        return found["ours"], found["aten"]

    def _bound(self, contender: Contender) -> timing.Call:
        return bound(contender, self._call, self._args)

    def _is_right(self, contender: Contender) -> bool:
        found = self._found.get(contender.key)
        return found is not None and found.outcome == "ok"

    def _is_broken(self) -> bool:
        """Whether an error left the GPU unusable for this process, as an illegal access does."""
        if self._device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return True
        return False

    # ---------------------------------------------------------------------------------------------- the choice

    def _block_sizes(self, contender: Contender) -> Iterator[Event]:
        """The few that the table has for the call; with a search others, from the shipped ones to better ones."""
        from ..triton_kernels import table

        with table.noted() as noted:
            self._bound(contender)()
        for candidate in triton_candidates(noted):
            yield from self._examine(Contender(contender.backend, candidate))
        if not self._options.search:
            return
        start: dict[str, Any] = {}
        search = climb(start, lambda variant: triton_neighbours(noted, variant), MOST_SEARCHED)
        variant = next(search)
        while True:
            tried = Contender(contender.backend, variant)
            yield from self._examine(tried)
            series = self._series.get(tried.key)
            try:
                variant = search.send(statistics.median(series.waited) if series else None)
            except StopIteration:
                return

    def _confirm(self) -> Iterator[Event]:
        """The winner has to win once more: of many candidates one will have been lucky. What is told are the times of
        this second series."""
        while (best := self._best()) is not None:
            yield {"trying": list(best)}
            found = self._found[best.key] = self._timed(best, self._found[best.key])
            self._found[_ATEN.key] = _with_times(self._found[_ATEN.key], self._aten)
            yield {"candidate": tables.plain(found)}
            if not found.reason:
                return

    def _best(self) -> Contender | None:
        right = [one for key, one in self._found.items() if key in self._series and one.outcome == "ok"]
        winners = [Contender(one.backend, one.variant) for one in right if not one.reason]
        return min(winners, key=lambda one: self._found[one.key].ratio or (1.0,), default=None)

    def _ordered(self) -> tuple[Candidate, ...]:
        """Those that beat aten, the fastest first; aten; those that do not; those that are wrong."""

        def order(one: Candidate) -> tuple[int, float]:
            if one.outcome != "ok":
                return 3, 0.0
            if one.backend == REFERENCE or one.ratio is None:
                return 1, 0.0
            return (2 if one.reason else 0), one.ratio[0]

        return tuple(sorted(self._found.values(), key=order))


def _with_times(found: Candidate, series: timing.Series) -> Candidate:
    return replace(
        found,
        seconds=timing.times(series.device),
        host_seconds=timing.times(series.host),
        graph_seconds=timing.times(series.graph),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _in_words(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return one_line(f"{type(error).__name__}: {line}", _WORDS)

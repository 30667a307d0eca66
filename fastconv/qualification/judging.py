"""Whether a candidate's results are right, on a call's own shapes: by the policy of `fastconv.measure.tolerance`.

Each candidate is tried

- on two sets of random arguments, on the first three times: it must be right every time, and whether all bits are the
  same is written down. What it allocates was filled with NaN before: by torch the first time; the other times, as
  libraries allocate behind torch's back, by freeing memory full of it. Border and interior are judged apart;
- with a NaN in one argument after the other that has images, which must be found where aten has it, and nowhere else;
  a forward also with Inf and -Inf in its input;
- in a backward also on gradients that lie in memory as a network's last layers and sums leave them: in the other of the
  two layouts, and expanded;
- where the operator has an overload that takes ``out``, also with that: channels of a larger tensor, of which the
  others must be afterwards what they were.

Arguments must be afterwards what they were, too. Results have memory of their own, and lie in it as torch.compile or
aten say. Only the first trial has all images: kernels depend on how many there are, but rarely.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..measure.tolerance import poisoned_outputs
from .calls import OperatorCall, flat
from .trials import FIRST, SECOND, Trial, makers
from .truth import Untrustworthy as Untrustworthy  # which `Judge` raises

Run = Callable[[Sequence[Any]], Any]
OutRun = Callable[[Sequence[Any], Any], None]

# Channels of `out` before the results, and at least as many behind them.
_BESIDE = 8


@dataclass(frozen=True)
class Judgement:
    """Attributes:
    reason: why the candidate is refused; "" if it is right.
    error, baseline_error: of the worst tensor, largest error / largest value; of the candidate and of aten.
    """

    reason: str
    error: float
    baseline_error: float
    deterministic: bool
    keeps_nan: bool


class Judge:
    """The trials of one call, made once for all of its candidates."""

    def __init__(self, call: OperatorCall, device: torch.device) -> None:
        self._makers = list(makers(call, device))
        self._made: list[Trial | None] = []

    def trials(self) -> Iterator[Trial]:
        """Made when they are first needed: most wrong candidates fail the first. One that could not be made, for want
        of memory, say, is tried again for the next candidate."""
        for i, make in enumerate(self._makers):
            if i == len(self._made):
                self._made.append(make())
            trial = self._made[i]
            if trial is not None:
                yield trial

    @torch.no_grad()
    def __call__(self, run: Run, out_run: OutRun | None = None, *, any_layout: bool = False) -> Judgement:
        """Tries a candidate.

        Args:
            run: what runs it on arguments of the call.
            out_run: its overload that takes ``out``, if there is one.
            any_layout: whether results may lie in memory as they like.

        Raises:
            torch.OutOfMemoryError: there is too little memory for the truth, or for the candidate.
            Untrustworthy: on a GPU, where the truth is not what a CPU computes.
            Exception: whatever the candidate raises.
        """
        found = _Found(run, any_layout)
        for trial in self.trials():
            if trial.nonfinite:
                found.try_nonfinite(trial)
            else:
                found.try_values(trial)
            if trial.name == SECOND and out_run is not None and not found.reason:
                found.try_out(trial, out_run)
            if found.reason:
                break
        return Judgement(found.reason, found.error, found.baseline_error, found.deterministic, found.keeps_nan)


class _Found:
    """What is found out about one candidate; the attributes are those of `Judgement`."""

    def __init__(self, run: Run, any_layout: bool) -> None:
        self._run = run
        self._any_layout = any_layout
        self.reason = ""
        self.error = self.baseline_error = 0.0
        self.deterministic = self.keeps_nan = True

    def try_values(self, trial: Trial) -> None:
        poisoned = self._outputs(trial, _poisoned)
        self._hold(trial, poisoned)
        if trial.name != FIRST or self.reason:
            return
        first: list[Tensor] | None = None
        for _ in range(2):
            again = self._outputs(trial, _on_dirt(poisoned))
            self._hold(trial, again)
            if self.reason:
                self.reason += ", when it was run again"
                return
            # Not with the first: while outputs are poisoned, aten runs algorithms that are deterministic.
            first = first or again
            self.deterministic &= all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def try_nonfinite(self, trial: Trial) -> None:
        outputs = self._outputs(trial, _poisoned)
        if not self.reason:
            self.reason, lost = trial.nonfinite_verdict(outputs)
            self.keeps_nan &= not lost

    def try_out(self, trial: Trial, out_run: OutRun) -> None:
        whole, slices = _slices(trial.baseline)
        inside = slice(_BESIDE, _BESIDE + sum(part.shape[1] for part in slices))

        def run(args: Sequence[Any]) -> list[Tensor]:
            out_run(args, slices if isinstance(args[1], list) else slices[0])
            return [part.clone() for part in slices]

        outputs = self._called(trial, lambda args: flat(run(args)))
        self._hold(trial, outputs)
        outside = [whole[:, : inside.start], whole[:, inside.stop :]]
        if not self.reason and not all(bool(part.isnan().all()) for part in outside):
            self.reason = "it writes outside of out"
        elif self.reason:
            self.reason += ", into out"

    def _outputs(self, trial: Trial, how: Callable[[Run, Sequence[Any]], list[Tensor]]) -> list[Tensor]:
        """What it returns, if that may be compared; else there is a reason."""
        outputs = self._called(trial, lambda args: how(self._run, args))
        self.reason = self.reason or trial.flaw(outputs, any_layout=self._any_layout)
        # Whoever keeps an output to return it once more would return what was overwritten.
        return [tensor.detach().clone() for tensor in outputs]

    def _called(self, trial: Trial, run: Callable[[Sequence[Any]], list[Tensor]]) -> list[Tensor]:
        try:
            outputs = run(trial.args)
        except Exception:
            trial.put_back()
            raise
        if trial.put_back():
            self.reason = "it changes its arguments"
        return outputs

    def _hold(self, trial: Trial, outputs: list[Tensor]) -> None:
        """Against the truth."""
        if not self.reason:
            self.reason, error, baseline_error = trial.verdict(outputs)
            self.error = max(self.error, error)
            self.baseline_error = max(self.baseline_error, baseline_error)


def _poisoned(run: Run, args: Sequence[Any]) -> list[Tensor]:
    with poisoned_outputs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # aten's about operators that have no deterministic algorithm
        return flat(run(args))


def _on_dirt(outputs: Sequence[Tensor]) -> Callable[[Run, Sequence[Any]], list[Tensor]]:
    """Where the allocator is likely to hand out memory that is full of NaN."""

    def how(run: Run, args: Sequence[Any]) -> list[Tensor]:
        dirt = [torch.full_like(tensor, float("nan")) for tensor in outputs for _ in range(2)]
        del dirt
        return flat(run(args))

    return how


def _slices(results: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A tensor full of NaN, and room in it for such results side by side, in their layout."""
    first = results[0]
    widths = [result.shape[1] for result in results]
    behind = _BESIDE + -sum(widths) % _BESIDE
    shape = (len(first), _BESIDE + sum(widths) + behind, *first.shape[2:])
    plain = first.is_contiguous()
    whole = torch.full(shape, float("nan"), dtype=first.dtype, device=first.device)
    whole = whole.contiguous(memory_format=torch.contiguous_format if plain else torch.channels_last)
    return whole, list(whole[:, _BESIDE : _BESIDE + sum(widths)].split(widths, 1))

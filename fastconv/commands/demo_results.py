"""What ``python -m fastconv demo`` finds: for its table, its verdict and its picture."""

from __future__ import annotations

from dataclasses import dataclass

from fastconv.measure.tolerance import Verdict


@dataclass(frozen=True)
class Inference:
    """One network on the photographs, with torch.nn as it is and swapped."""

    title: str
    verdict: Verdict  # of the class scores, against float64
    top5_equal: bool
    seconds: dict[str, float]  # medians: "eager", "channels_last", "fastconv"

    @property
    def error(self) -> float:
        """fastconv's largest error, in units of the largest score."""
        return self.verdict.regions[0].error / self.verdict.scale

    @property
    def torch_error(self) -> float:
        return self.verdict.regions[0].baseline_error / self.verdict.scale

    def speedup(self, baseline: str) -> float:
        return self.seconds[baseline] / self.seconds["fastconv"]


@dataclass(frozen=True)
class Training:
    """LeNet-5 on the digits."""

    losses: list[float]  # one per step
    accuracy: float  # on the digits it has not seen

"""Every op on layers of the networks, forward and backward; how to read the times is in README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastconv.measure.calls import Layer
from fastconv.measure.layers import LAYERS
from harness import CONTENDERS, Contender, Settings, measure, problem_of


def every(test: Callable[..., None]) -> Any:
    """All contenders on all layers; those of a layer follow each other."""
    for name, values in (("layer", LAYERS), ("contender", CONTENDERS)):
        test = pytest.mark.parametrize(name, values, ids=str)(test)
    return test


@every
def test_forward(benchmark: BenchmarkFixture, settings: Settings, layer: Layer, contender: Contender) -> None:
    with torch.no_grad():
        measure(benchmark, problem_of(layer, "forward", settings), contender)


@every
def test_backward(benchmark: BenchmarkFixture, settings: Settings, layer: Layer, contender: Contender) -> None:
    with torch.enable_grad():
        measure(benchmark, problem_of(layer, "backward", settings), contender)

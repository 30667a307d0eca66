"""Which calls a model makes is found by running it, and the model is afterwards what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv.operators import measured
from fastconv.operators.shape_classes import shape_class
from fastconv.operators.tables import Candidate, Entry, Table
from fastconv.qualification.collecting import calls_of

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two convolutions, of which the second has what comes after it."""

    def __init__(self, *after: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), *after)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


X = torch.randn(1, 3, 8, 8)


def operators(model: Any, *inputs: Any, **more: Any) -> list[str]:
    return [call.operator for call in calls_of(model, inputs, **more).calls.values()]


def test_both_passes() -> None:
    found = calls_of(Net(), [X])
    assert set(operators(Net(), X, training=False)) == {"conv2d_relu", "pointwise_conv2d"}
    assert {call.operator for call in found.calls.values()} == {"conv2d_relu", "pointwise_conv2d", "conv2d_backward"}
    for forward, backwards in found.backward.items():
        assert forward in found.calls
        assert backwards
        assert all(one in found.calls for one in backwards)


@pytest.mark.parametrize(
    "after",
    [
        pytest.param((nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8)), id="batch norm of one value"),
        pytest.param((nn.Flatten(), nn.Linear(512, 4), nn.CrossEntropyLoss()), id="targets"),
    ],
)
def test_a_training_pass_that_fails(after: tuple[nn.Module, ...]) -> None:
    """Leaves the calls of inference, if that works, and is told."""

    class WithoutTargets(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and isinstance(self.body[-1], nn.CrossEntropyLoss):
                raise TypeError("needs targets")
            return self.body[:-1](x) if isinstance(self.body[-1], nn.CrossEntropyLoss) else self.body(x)

    found = calls_of(WithoutTargets(*after), [X])
    assert "conv2d_relu" in {call.operator for call in found.calls.values()}
    (why,) = found.failed
    assert why.startswith("the training pass failed, ")
    with pytest.raises((TypeError, ValueError)):
        calls_of(WithoutTargets(*after), [X], inference=False)


def test_the_graph_and_the_inputs_are_the_users() -> None:
    """A backward through what the input was made of still works, and a first layer in place changes nothing."""
    backbone = nn.Conv2d(3, 3, 1)
    hidden = backbone(X)
    before = hidden.detach().clone()
    calls_of(nn.Sequential(nn.Hardtanh(inplace=True), Net()), [hidden])
    assert torch.equal(hidden, before)
    hidden.sum().backward()
    assert backbone.weight.grad is not None


def test_models_of_other_kinds() -> None:
    """Compiled ones, and those with parts that are mapped over: whose sizes are known only later."""

    class Mapped(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda one: fastconv.ops.add_relu(one, one))(self.body(x))

    assert "conv2d_relu" in operators(Mapped(), X, training=False)
    assert operators(torch.compile(Net()), X, training=False) == operators(Net(), X, training=False)


def test_a_residual_that_is_broadcast() -> None:
    """No op has that: it is not a call of one."""

    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shift = nn.Conv2d(3, 8, 1), nn.Parameter(torch.ones(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + self.shift)

    for call in calls_of(Broadcast(), [X], training=False).calls.values():
        getattr(torch.ops.fastconv, call.operator)(*call.draw(CPU, 0))


def test_layouts_are_those_in_which_the_model_runs() -> None:
    """oneDNN's convolutions hand channels_last on, whatever they were given."""
    (first, second) = calls_of(Net(), [torch.randn(1, 3, 64, 64)], training=False).calls
    assert " contiguous" in first.family.partition(";")[0]
    assert " channels_last" in second.family.partition(";")[0]


def test_each_layout_has_its_winner() -> None:
    """In a swapped model, whichever came first."""
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU()).eval()
    plain = torch.randn(1, 8, 8, 8)
    last = plain.to(memory_format=torch.channels_last)
    entries = {}
    for x, winner in ((plain, "reference"), (last, "onednn")):
        args = (x, conv.weight, conv.bias, [1, 1], [1, 1], [1, 1], 1, "relu")
        key = shape_class("conv2d_relu", args)
        candidates = tuple(Candidate(name, outcome="ok") for name in dict.fromkeys((winner, "onednn", "reference")))
        entries[key.operator, key.family, key.size] = Entry(*key, candidates=candidates)
    try:
        for first, second in ((plain, last), (last, plain)):
            measured.use(CPU, Table({"device": "this"}, entries=entries))
            fast = fastconv.swap(model)
            with torch.no_grad():
                for x in (first, second):
                    for _ in range(2):
                        fast(x)
            ran = {x.stride(): fastconv.explain(fast, x).kernels[0].kernel for x in (plain, last)}
            assert "aten" in ran[plain.stride()]
            assert "oneDNN" in ran[last.stride()]
    finally:
        measured.forget()

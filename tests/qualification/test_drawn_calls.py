"""What a candidate is judged by: the calls that are drawn, and the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv
from fastconv.aten_kernels import OPERATORS
from fastconv.operators.shape_classes import ShapeClass
from fastconv.qualification import truth
from fastconv.qualification.calls import OperatorCall, TensorSpec, flat, tensors_of
from fastconv.qualification.collecting import recording
from fastconv.qualification.truth import Untrustworthy, exact
from support.operator_calls import CALLS, CPU, with_relu6


def test_every_operator_is_called() -> None:
    assert {call.operator for call in CALLS} == {name for name in OPERATORS if not name.endswith(".out")}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.operator)
def test_a_call_is_drawn_as_it_was_made(call: OperatorCall) -> None:
    """In its class, the same numbers for a seed; and comes back from JSON."""
    args = call.draw(CPU, 0)
    assert OperatorCall.of(call.operator, args) == call
    assert OperatorCall.from_json(call.to_json()) == call
    again, other = call.draw(CPU, 0), call.draw(CPU, 1)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(args), tensors_of(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors_of(args), tensors_of(other), strict=True))


def test_drawn_in_the_layouts_that_were() -> None:
    whole = torch.randn(2, 8, 5, 5)
    call = OperatorCall.of("add_relu", (whole[:, 2:6], whole[:, :4].expand(2, 4, 5, 5), "relu"))
    drawn = call.draw(CPU, 0)
    assert drawn[0].stride() == whole[:, 2:6].stride()
    expanded = OperatorCall.of("add_relu", (whole, torch.randn(1, 8, 1, 1).expand(2, 8, 5, 5), "relu"))
    assert expanded.draw(CPU, 0)[1].stride() == (0, 1, 0, 0)


@pytest.mark.parametrize("call", with_relu6().values(), ids=with_relu6())
def test_both_kinks_are_drawn(call: OperatorCall) -> None:
    for seed in range(2):
        args = call.draw(CPU, seed)
        named = dict(zip(call.named(), args, strict=True))
        kinked = [] if named.get("pointwise_activation") == "none" else tensors_of([named.get("output")])
        kinked += tensors_of([named.get("outputs")])
        if not call.is_backward and call.named().get("pointwise_activation") != "none":
            kinked = flat(OPERATORS[call.operator](*args))
        if named.get("depthwise_activation") == "relu6":
            geometry = (named["stride"], named["padding"], named["dilation"])
            of_depthwise = (named["input"], named["depthwise_weight"], named["depthwise_bias"])
            kinked.append(OPERATORS["depthwise_conv2d"](*of_depthwise, *geometry, "relu6"))
        if "response_norm" in call.operator:
            kinked = [named["input"].clamp(0, 6)]
        assert kinked
        assert all((tensor == kink).any() for tensor in kinked for kink in (0, 6))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.operator)
def test_truthin_pieces(call: OperatorCall, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image at a time is what all at once is: results side by side, gradients of weights added."""
    args = call.draw(CPU, 0)
    whole = exact(call, args, CPU)
    monkeypatch.setitem(truth.MOST_MEMORY, "cpu", 1)
    pieces = exact(call, args, CPU)
    assert call.batch > 1
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_gpu_that_cannot_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth of a GPU is held against the CPU's: here one that is off by a millionth."""
    (call,) = [c for c in CALLS if c.operator == "conv2d_relu"]
    original = truth.in_pieces
    seen: list[int] = []

    def in_pieces(call: OperatorCall, args: Sequence[Any]) -> list[Tensor]:
        seen.append(1)
        return [one * (1 + 1e-6) if len(seen) == 1 else one for one in original(call, args)]

    monkeypatch.setattr(truth, "in_pieces", in_pieces)
    with pytest.raises(Untrustworthy, match="float64 results of conv2d_relu on cuda are not those of the CPU"):
        exact(call, call.draw(CPU, 0), torch.device("cuda"))


def test_families_are_without_sizes() -> None:
    def of(batch: int, side: int, layout: torch.memory_format = torch.contiguous_format) -> ShapeClass:
        input = torch.randn(batch, 8, side, side).contiguous(memory_format=layout)
        args = (input, torch.randn(4, 8, 1, 1), None, None, [1, 1], "relu")
        return OperatorCall.of("pointwise_conv2d", args).shape_class

    assert of(3, 7) == of(4, 7)
    assert of(4, 7).size == (4, 7, 7)
    assert of(5, 9).size == (8, 9, 9)
    assert of(4, 7).family == of(8, 9).family
    assert of(4, 7).family != of(4, 7, torch.channels_last).family
    assert of(4, 7).pixels == 196


def test_a_spec_of_overlapping_memory() -> None:
    spec = TensorSpec((2, 3), (1, 1), torch.float32)
    found = spec.filled(lambda shape: torch.arange(shape[0]).float())
    assert found.tolist() == [[0, 1, 2], [1, 2, 3]]


def test_recording_leaves_no_backend_behind() -> None:
    with recording() as collected:
        fastconv.ops.add_relu(torch.ones(2), torch.ones(2))
    assert [call.operator for call in collected.calls.values()] == ["add_relu"]
    with pytest.raises(ValueError, match="got backend 'recorder'"):
        fastconv.ops.add_relu(torch.ones(2), torch.ones(2), backend="recorder")

"""NaN and Inf in the arguments: a candidate must have them where aten has them, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fastconv.aten_kernels import OPERATORS
from fastconv.operators.shape_classes import IMAGES
from fastconv.qualification.calls import OperatorCall, flat, tensors_of
from fastconv.qualification.judging import Judge, Run
from support.operator_calls import CALLS, CPU, of


def test_a_nan_that_spreads() -> None:
    (call,) = [c for c in CALLS if c.operator == "conv2d_relu"]

    def run(args: Sequence[Any]) -> Any:
        found = OPERATORS[call.operator](*args)
        return found.fill_(float("nan")) if found.isnan().any() else found

    assert Judge(call, CPU)(run).reason == "it spreads a NaN to where aten has none"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.operator)
def test_every_image_argument_has_a_nan_once(call: OperatorCall) -> None:
    """And aten has one then in its results; a forward's input has an Inf, too, unless it comes out as 6."""
    found = [trial for trial in Judge(call, CPU).trials() if trial.nonfinite]
    images = [name for name in call.named() if name in IMAGES and "output" not in name.removeprefix("grad_")]
    images += [name for name in call.named() if name.startswith("grad_output")]
    expected = {f"NaN in {name}" for name in images if call.named()[name] is not None}
    with_inf = not call.is_backward and call.named().get("activation") != "relu6"
    assert {trial.name for trial in found} == expected | ({"Inf in input"} if with_inf else set())
    assert all(trial.is_telling for trial in found)


@pytest.mark.parametrize("call", [c for c in CALLS if c.is_backward], ids=lambda call: call.operator)
def test_a_nan_is_let_through_by_the_activation(call: OperatorCall) -> None:
    """In each gradient at pixels of its own."""
    (trial,) = [trial for trial in Judge(call, CPU).trials() if trial.name.startswith("NaN in grad_output")]
    named = dict(zip(call.named(), trial.args, strict=True))
    grads = tensors_of(trial.args[:1])
    for grad, output in zip(grads, tensors_of([named.get("output", named.get("outputs"))]), strict=False):
        assert ((output[grad.isnan()] > 0) & (output[grad.isnan()] < 6)).all()
    times = sum(grad[-1, 0].isnan().int() for grad in grads)
    assert all((grad[-1, 0].isnan() & (times == 1)).any() for grad in grads)


def test_a_nan_that_is_masked_itself() -> None:
    """Of which aten says one thing and another."""
    call = of("local_response_norm", "relu6_even", layout="contiguous")[1]
    assert Judge(call, CPU)(lambda args: torch.ops.fastconv.local_response_norm_backward(*args)).reason == ""


def without_nan(run: Run, *which: int) -> Run:
    """Some of its results with 0 for NaN."""

    def without(args: Sequence[Any]) -> Any:
        found = flat(run(args))
        return [one.nan_to_num(0.0, torch.inf, -torch.inf) if i in which else one for i, one in enumerate(found)]

    return without


@pytest.mark.parametrize("side", [7, 8, 13, 14])
def test_a_lost_nan_of_a_strided_shortcut(side: int) -> None:
    """It reads few pixels: one that it reads has to have the NaN."""
    for stride in (2, 3, 4):
        input, weight = torch.randn(2, 4, side, side), torch.randn(6, 4, 1, 1)
        call = OperatorCall.of("pointwise_conv2d", [input, weight, None, None, [stride] * 2, "relu"])
        run = without_nan(lambda args: OPERATORS["pointwise_conv2d"](*args), 0)
        assert not Judge(call, CPU)(run).keeps_nan


@pytest.mark.parametrize("name", ["vgg", "small_relu6", "plain"])
@pytest.mark.parametrize("result", range(3))
def test_a_lost_nan_of_a_gradient(name: str, result: int) -> None:
    call = of("conv2d_relu", name)[1]
    judgement = Judge(call, CPU)(without_nan(lambda args: OPERATORS[call.operator](*args), result))
    assert (judgement.reason, judgement.keeps_nan) == ("", False)


@pytest.mark.parametrize(
    ("index", "argument"),
    [(0, "conv2d_add_relu"), (3, "conv2d_add_relu"), (0, "conv2d_backward"), (2, "conv2d_backward")],
)
def test_a_nan_that_is_lost_on_the_way_in(index: int, argument: str) -> None:
    """From each argument that has images, whatever the others do."""
    forward, backward = of("conv2d_add_relu", "basic_block")
    call = forward if argument == forward.operator else backward

    def run(args: Sequence[Any]) -> Any:
        cleaned = [arg.nan_to_num(0.0, torch.inf, -torch.inf) if i == index else arg for i, arg in enumerate(args)]
        return OPERATORS[call.operator](*cleaned)

    judgement = Judge(call, CPU)(run)
    assert (judgement.reason, judgement.keeps_nan) == ("", False)


@pytest.mark.parametrize(
    ("op", "name"), [("conv2d_relu", "stem7x7"), ("depthwise_conv2d", "small"), ("add_relu", "resnet")]
)
def test_inf(op: str, name: str) -> None:
    """Large numbers instead of it, and what comes of multiplying it by zeros."""
    call = of(op, name)[0]
    run = OPERATORS[op]
    assert Judge(call, CPU)(lambda args: run(*args).clamp(max=1e30)).reason == "it turns an Inf into another value"

    def spreads(args: Sequence[Any]) -> Any:
        found = run(*args)
        return found + 0 * found.amax(1, keepdim=True) if found.isinf().any() else found

    assert "an Inf" in Judge(call, CPU)(spreads).reason

"""Who passes the judge and who does not: the package's kernels, aten, and liars of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastconv.aten_kernels import OPERATORS
from fastconv.operators.schemas import WITH_OUT
from fastconv.qualification import judging, trials
from fastconv.qualification.calls import OperatorCall, flat
from fastconv.qualification.candidates import Contender, out_runner, runner
from fastconv.qualification.judging import Judge, Run
from fastconv.qualification.trials import FIRST, SECOND, Trial
from support.cases import FIRST as FIRST_OF
from support.cases import LAYOUTS
from support.operator_calls import CALLS, CPU, calls_of, of, with_relu6


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.operator)
def test_the_package_is_right(call: OperatorCall) -> None:
    """The CPU's kernels pass all trials, and aten those of float32."""
    overload = getattr(torch.ops.fastconv, call.operator).default
    judgement = Judge(call, CPU)(lambda args: overload(*args))
    assert (judgement.reason, judgement.keeps_nan) == ("", True)


Spoil = Callable[[list[Tensor], Sequence[Any]], None]


def spoiled(call: OperatorCall, spoil: Spoil) -> judging.Judgement:
    def run(args: Sequence[Any]) -> Any:
        outputs = OPERATORS[call.operator](*args)
        found = [out for out in flat(outputs) if out.dim() == 4]
        spoil(found, args)
        return outputs

    return Judge(call, CPU)(run)


@pytest.mark.parametrize("call", [c for c in CALLS if c.is_backward], ids=lambda call: call.operator)
def test_odd_gradients_are_tried(call: OperatorCall) -> None:
    """A backward that takes every gradient to lie as the first one does."""

    def only(layout: Callable[[Tensor], bool]) -> Spoil:
        def spoil(outputs: list[Tensor], args: Sequence[Any]) -> None:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            if layout(first):
                outputs[0].mul_(1.1)

        return spoil

    for layout, named in (
        (lambda grad: 0 in grad.stride(), "expanded gradients"),
        (lambda grad: grad.is_contiguous() and 0 not in grad.stride(), "contiguous gradients"),
    ):
        assert f"with {named}" in spoiled(call, only(layout)).reason


# ------------------------------------------------------------------------------------------------- ReLU6


def replaced(args: Sequence[Any], old: Any, new: Any) -> list[Any]:
    return [new if isinstance(arg, str) and arg == old else arg for arg in args]


@pytest.mark.parametrize("call", with_relu6().values(), ids=with_relu6())
def test_relu6_is_not_relu(call: OperatorCall) -> None:
    assert "wrong" in Judge(call, CPU)(lambda args: OPERATORS[call.operator](*replaced(args, "relu6", "relu"))).reason
    assert "wrong" in Judge(call, CPU)(lambda args: OPERATORS[call.operator](*replaced(args, "relu6", "none"))).reason


def test_a_hidden_relu6_of_many_channels() -> None:
    """Some gradient is left where rounding to bfloat16 may fall on either side of 6."""
    (call,) = [c for c in CALLS if c.operator == "depthwise_separable_conv2d_backward"]
    shapes = [(2, 4, 7, 7), (2, 4, 7, 7), (2, 1024, 7, 7), (1024, 1, 3, 3), (4, 1024, 1, 1)]
    tensors = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    options = ([1, 1], [1, 1], [1, 1], "relu6", "none", [True] * 3 + [False] * 2)
    call = OperatorCall.of(call.operator, [*tensors, None, *options])
    run = OPERATORS[call.operator]
    assert "wrong" in Judge(call, CPU)(lambda args: run(*replaced(args, "relu6", "relu"))).reason
    assert Judge(call, CPU)(lambda args: run(*args)).reason == ""


# ------------------------------------------------------------------------------------------------- memory


def test_what_is_wrong_on_few_images_alone() -> None:
    (call,) = [c for c in CALLS if c.operator == "conv2d_relu"]
    larger = OperatorCall.of("conv2d_relu", [torch.randn(5, *a.shape[1:]) if n == 0 else a for n, a in _args(call)])

    def spoil(outputs: list[Tensor], args: Sequence[Any]) -> None:
        if args[0].shape[0] == 2:
            outputs[0][0] += 1

    assert "with other values" in spoiled(larger, spoil).reason


def _args(call: OperatorCall) -> list[tuple[int, Any]]:
    return list(enumerate(call.draw(CPU, 0)))


def judged_with_an_honest_one(call: OperatorCall, run: Run) -> str:
    """Why it is refused; who comes after it is not the worse for it."""
    judge = Judge(call, CPU)
    reason = judge(run).reason
    assert judge(lambda args: OPERATORS[call.operator](*args)).reason == ""
    return reason


@pytest.mark.parametrize("images", [1, 2])
def test_gradients_that_are_masked_in_place(images: int) -> None:
    """Even where that changes nothing in the result; `images` of the few last trials, too."""
    call = of("conv2d_relu", "vgg")[1].of_images(images)

    def run(args: Sequence[Any]) -> Any:
        if 0 not in args[0].stride():
            args[0].mul_(args[1] > 0)
        return OPERATORS[call.operator](*args)

    assert judged_with_an_honest_one(call, run) == "it changes its arguments"


@pytest.mark.parametrize("kind", [FIRST, SECOND, "NaN in input", "NaN in residual", "Inf in input"])
def test_a_residual_that_is_overwritten(kind: str) -> None:
    call = of("conv2d_add_relu", "basic_block")[0]
    judge = Judge(call, CPU)
    at = [trial.name for trial in judge.trials()].index(kind)
    calls = 0

    def run(args: Sequence[Any]) -> Any:
        nonlocal calls
        calls += 1
        found = OPERATORS[call.operator](*args)
        return args[3].copy_(found).clone() if calls == (1 if at == 0 else at + 3) else found

    assert judge(run).reason == "it changes its arguments"
    assert calls == (1 if at == 0 else at + 3)
    calls = 100
    assert judge(run).reason == ""


def test_expanded_gradients_that_are_changed() -> None:
    call = of("conv2d_relu", "plain")[1]

    def run(args: Sequence[Any]) -> Any:
        found = OPERATORS[call.operator](*args)
        if 0 in args[0].stride():
            args[0][:, :, :1, :1].fill_(3.0)
        return found

    assert judged_with_an_honest_one(call, run) == "it changes its arguments"


def test_results_that_are_arguments() -> None:
    call = of("conv2d_add_relu", "linear")[1]

    def run(args: Sequence[Any]) -> Any:
        return *OPERATORS[call.operator](*args)[:3], args[0]

    reason = "the memory of result 3 is that of an argument or of another result"
    assert judged_with_an_honest_one(call, run) == reason


def test_results_that_share_memory() -> None:
    call = of("pointwise_conv2d_group", "inception")[0]

    def run(args: Sequence[Any]) -> Any:
        found = OPERATORS[call.operator](*args)
        return list(torch.cat(found, 1).split([len(one[0]) for one in found], 1))

    reason = "the memory of result 1 is that of an argument or of another result"
    assert judged_with_an_honest_one(call, run) == reason


def test_layouts() -> None:
    """As torch.compile takes them to be; but a caller may let it be any."""
    forward, backward = of("conv2d_relu", "vgg")

    def run(args: Sequence[Any]) -> Any:
        return OPERATORS[forward.operator](*args).contiguous()

    judge = Judge(forward, CPU)
    assert judge(run).reason == "it lies in memory as (4704, 196, 14, 1), not as (4704, 1, 336, 24)"
    assert judge(run, any_layout=True).reason == ""

    def back(args: Sequence[Any]) -> Any:
        first, weight, *others = OPERATORS[backward.operator](*args)
        return first, weight.contiguous(), *others

    assert Judge(backward, CPU)(back).reason.startswith("result 1 lies in memory as (144, 9, 3, 1), not as (144, 1,")


# --------------------------------------------------------------------------------------------------- out


def out_liar(call: OperatorCall, spoil: Callable[[Tensor], Any]) -> str:
    def into(args: Sequence[Any], out: Any) -> None:
        OPERATORS[f"{call.operator}.out"](*args, out)
        spoil(flat(out)[-1])

    return Judge(call, CPU)(lambda args: OPERATORS[call.operator](*args), into).reason


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", WITH_OUT)
def test_results_into_a_slice_of_channels(op: str, layout: str) -> None:
    call = calls_of(FIRST_OF[op], layout)[0]

    def beyond(out: Tensor) -> None:
        whole = out.as_strided((1,), (1,), out.storage_offset() + out.shape[1] * out.stride(1) - 1 + out.stride(1))
        whole.fill_(1.0)

    assert out_liar(call, lambda out: None) == ""
    assert out_liar(call, beyond) == "it writes outside of out"
    assert out_liar(call, lambda out: out[0, 0, 0, 0].fill_(float("nan"))).endswith(", into out")


def test_who_has_an_overload_for_out() -> None:
    forward, backward = of("conv2d_relu", "vgg")
    assert out_runner(Contender("reference", {}), forward) is None
    assert out_runner(Contender("onednn", {}), forward) is None
    assert out_runner(Contender("cpu", {}), backward) is None
    run = out_runner(Contender("cpu", {}), forward)
    args = forward.draw(CPU, 0)
    out = torch.empty_like(OPERATORS["conv2d_relu"](*args))
    assert run is not None
    run(args, out)
    torch.testing.assert_close(out, OPERATORS["conv2d_relu"](*args))


@pytest.mark.parametrize("call", [c for c in CALLS if c.operator in WITH_OUT], ids=lambda call: call.operator)
def test_the_library_is_right_into_out(call: OperatorCall) -> None:
    cpu = Contender("cpu", {})
    assert Judge(call, CPU)(runner(cpu, call), out_runner(cpu, call)).reason == ""


# ---------------------------------------------------------------------------------------- what is no verdict


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_aten_is_not_held_to_more_than_it_does(dtype: torch.dtype) -> None:
    """A bias's gradient that adds up to little: 16 bits of what is added are not 16 bits of the sum."""
    (call,) = [c for c in CALLS if c.operator == "depthwise_separable_conv2d_backward"]
    shapes = [(3, 1, 5, 5), (3, 8, 5, 5), (8, 1, 3, 3), (1, 8, 1, 1)]
    grad, *others = (torch.randn(s, dtype=dtype).contiguous(memory_format=torch.channels_last) for s in shapes)
    options = ([1, 1], [1, 1], [1, 1], "none", "none", [True] * 5)
    call = OperatorCall.of(call.operator, [grad, None, *others, torch.randn(8, dtype=dtype), *options])
    assert Judge(call, CPU)(lambda args: OPERATORS[call.operator](*args)).reason == ""


def test_a_cap_is_not_lifted_by_an_overflow() -> None:
    """Of aten's: it would excuse anything."""
    (call,) = [c for c in CALLS if c.operator == "add_relu"]
    args = call.draw(CPU, 0)
    trial = Trial(FIRST, call, args, CPU)
    trial.baseline[0][0, 0, 0, 0] = torch.inf
    assert "wrong" in trial.verdict([trial.truth[0].float() * 1.01])[0]


def test_too_little_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the candidate's nor the truth's; what could not be made is made for the next one."""
    call = of("conv2d_relu", "vgg")[0]

    def run(args: Sequence[Any]) -> Any:
        args[0].zero_()
        raise torch.OutOfMemoryError

    judge = Judge(call, CPU)
    with pytest.raises(torch.OutOfMemoryError):
        judge(run)
    tried: list[str] = []

    def full(call: OperatorCall, args: Sequence[Any], device: torch.device) -> list[Tensor]:
        tried.append(call.operator)
        raise error

    for error in (torch.OutOfMemoryError(), judging.Untrustworthy("float64")):
        with monkeypatch.context() as patch:
            patch.setattr(trials, "exact", full)
            with pytest.raises(type(error)):
                judge(lambda args: OPERATORS[call.operator](*args))
    assert len(tried) == 2
    wrong = judge(lambda args: OPERATORS[call.operator](*args) + (args[0].isnan().any() | args[0].isinf().any()))
    assert (wrong.reason, wrong.keeps_nan) == ("", True)
    assert [trial.name for trial in judge.trials()] == [FIRST, SECOND, "NaN in input", "Inf in input"]


def test_memory_that_libraries_allocate_is_dirty() -> None:
    """0 * z of what an output held before, as an engine may compute with a factor of zero."""
    (call,) = [c for c in CALLS if c.operator == "add_relu"]

    def run(args: Sequence[Any]) -> Any:
        z = torch.empty_like(args[0])
        return OPERATORS[call.operator](*args) + 0 * z

    assert "wrong with random values" in Judge(call, CPU)(run).reason


def test_shapes_and_numbers_of_results() -> None:
    (call,) = [c for c in CALLS if c.operator == "conv2d_relu"]
    assert "the shape or dtype is (1," in Judge(call, CPU)(lambda args: torch.zeros(1, 1)).reason
    assert "it returned 2 tensors, not 1" in Judge(call, CPU)(lambda args: [torch.zeros(1), torch.zeros(1)]).reason

"""Every op on every case, dtype and layout against float64, by the numerics policy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from fastconv import ops
from fastconv.operators.schemas import WITH_OUT
from support import numerics
from support.cases import CASES, CONV_OPS, DTYPES, LAYOUTS, Case, named, run
from support.kernel_backends import CUDA, on


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the tensors of a test go, which runs on the backend that belongs to it."""
    with on(request.param) as found:
        yield found


BACKENDS = ("auto", *CUDA, "cudnn")


def combinations(dtypes: Sequence[torch.dtype] = DTYPES, layouts: Sequence[str] = LAYOUTS) -> pytest.MarkDecorator:
    """Backend, dtype and layout."""
    found = []
    for backend, dtype, layout in itertools.product(BACKENDS, dtypes, layouts):
        if backend == "cuda-emulated" and (dtype, layout) not in numerics.EMULATED:
            continue
        marks = numerics.EMULATED[dtype, layout] if backend == "cuda-emulated" else ()
        name = f"{backend}-{str(dtype).removeprefix('torch.')}-{layout}"
        found.append(pytest.param(backend, dtype, layout, marks=marks, id=name))
    return pytest.mark.parametrize(("device", "dtype", "layout"), found, indirect=["device"])


@combinations()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    numerics.check_forward(case, dtype, layout, device)


@combinations()
@pytest.mark.parametrize("case", named(*WITH_OUT), ids=str)
def test_out(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    numerics.check_out(case, dtype, layout, device)


@combinations([torch.float32, torch.float16])
def test_from_one_slice_into_the_next(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    numerics.check_from_one_slice_into_the_next(dtype, layout, device)


@combinations()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    numerics.check_backward(case, dtype, layout, device)


IMAGES = [case for case in CASES if len(case.shapes["input"]) == 4 and case.shapes["input"][0]]


def for_odd_gradients(backend: str) -> list[Case]:
    """In the emulator two of each op: it is the number of channels that decides what becomes of an odd gradient."""
    if backend != "cuda-emulated":
        return IMAGES
    of_ops = [[case for case in IMAGES if case.op == op] for op in ops.__all__]
    return [case for cases in of_ops for case in (cases[0], max(cases, key=lambda c: c.shapes["input"][1]))]


@pytest.mark.parametrize("make", numerics.ODD_GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("case", "device"),
    [
        pytest.param(case, backend, id=f"{case}-{backend}")
        for backend in BACKENDS
        for case in for_odd_gradients(backend)
    ],
    indirect=["device"],
)
def test_odd_gradients(case: Case, layout: str, make: Any, device: torch.device) -> None:
    numerics.check_odd_gradients(case, layout, make, device)


@combinations([torch.float32, torch.bfloat16], ["contiguous"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_non_contiguous_inputs(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    numerics.check_non_contiguous_inputs(case, dtype, layout, device)


def test_same_bits_every_time() -> None:
    case = named("depthwise_separable_conv2d")[1]
    first, second = (
        numerics.gradients(case, arguments, [torch.ones_like(o) for o in run(case.op, arguments)])
        for arguments in [case.arguments(requires_grad=True)] * 2
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


# ----------------------------------------------------------------------------------------- edge values


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_through_activations(dtype: torch.dtype, activation: str) -> None:
    numerics.check_special_values_through_activations(dtype, activation)


@pytest.mark.parametrize("op", CONV_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_special_values_through_convolutions(op: str, dtype: torch.dtype, value: float) -> None:
    numerics.check_special_values_through_convolutions(op, dtype, value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_special_values_through_lrn(dtype: torch.dtype, layout: str, value: float) -> None:
    numerics.check_special_values_through_lrn(dtype, layout, value)


def test_float16_squares_do_not_overflow_in_lrn() -> None:
    output = ops.local_response_norm(torch.full((1, 8, 2, 2), 300.0).half(), 5, 1.0)
    expected = ops.local_response_norm(torch.full((1, 8, 2, 2), 300.0).double(), 5, 1.0)
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=0)


def test_bias_gradient_of_many_pixels() -> None:
    """A sum of 2^17 ones in bfloat16 would stop at 256."""
    input = torch.ones(2, 1, 256, 256, dtype=torch.bfloat16)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    bias = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    ops.conv2d_relu(input, weight, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.item() == 2**17

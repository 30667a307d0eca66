"""Every op on every case, dtype and layout against float64, by the numerics policy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastconv import ops, use_backend
from fastconv.measure.tolerance import assert_close_to_oracle, away_from_kinks, poisoned_outputs
from fastconv.operators.schemas import WITH_OUT
from support.cases import CASES, CONV_OPS, DTYPES, LAYOUTS, Case, Concatenation, layout_of, mapped, named, run, tensors
from support.kernel_backends import CUDA, device_of, true_float32


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the tensors of a test go, which runs on the backend that belongs to it."""
    found = device_of(request.param)
    with use_backend(request.param), true_float32():
        yield found


BACKENDS = ("auto", *CUDA)
# The emulator takes its time: some run always, some when slow tests do. Both kinds of 16 bits share their kernels'
# source, of which tests/test_cuda_*.py take each one; so do the layouts in float64.
EMULATED = {
    (torch.float32, "contiguous"): (),
    (torch.float16, "channels_last"): (),
    (torch.bfloat16, "contiguous"): (),
    (torch.float32, "channels_last"): pytest.mark.slow,
    (torch.float64, "contiguous"): pytest.mark.slow,
}


def combinations(dtypes: Sequence[torch.dtype] = DTYPES, layouts: Sequence[str] = LAYOUTS) -> pytest.MarkDecorator:
    """Backend, dtype and layout."""
    found = []
    for backend, dtype, layout in itertools.product(BACKENDS, dtypes, layouts):
        if backend == "cuda-emulated" and (dtype, layout) not in EMULATED:
            continue
        marks = EMULATED[dtype, layout] if backend == "cuda-emulated" else ()
        name = f"{backend}-{str(dtype).removeprefix('torch.')}-{layout}"
        found.append(pytest.param(backend, dtype, layout, marks=marks, id=name))
    return pytest.mark.parametrize(("device", "dtype", "layout"), found, indirect=["device"])


def border(case: Case, output: Tensor) -> int | None:
    """Convolutions are judged on their border and their interior apart."""
    return 1 if case.op in CONV_OPS and output.dim() >= 3 else None


@combinations()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    arguments = case.arguments(dtype, layout, device=device)
    with poisoned_outputs():
        outputs = run(case.op, arguments)
    oracles = run(case.op, mapped(arguments, Tensor.double), backend="reference")
    baselines = run(case.op, arguments, backend="reference")
    for output, oracle, baseline in zip(outputs, oracles, baselines, strict=True):
        assert_close_to_oracle(output, oracle, baseline, what=str(case), border=border(case, output))
        assert layout_of(output) == layout_of(baseline)


@combinations()
@pytest.mark.parametrize("case", named(*WITH_OUT), ids=str)
def test_out(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """Into slices of the channels of one tensor, the rest of which stays as it is."""
    arguments = case.arguments(dtype, layout, device=device)
    oracles = run(case.op, mapped(arguments, Tensor.double), backend="reference")
    baselines = run(case.op, arguments, backend="reference")
    joined = Concatenation.of(baselines, 3, layout)
    with poisoned_outputs():
        outputs = run(case.op, arguments, out=joined.argument(case.op))
    joined.check_the_rest()
    for output, slice, oracle, baseline in zip(outputs, joined.slices, oracles, baselines, strict=True):
        assert output is slice
        assert_close_to_oracle(output, oracle, baseline, what=str(case), border=border(case, output))


@combinations([torch.float32, torch.float16])
def test_from_one_slice_into_the_next(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """DenseNet's layers: input, result and residual are slices of one tensor."""
    arguments = named("conv2d_add_relu")[3].arguments(dtype, layout, device=device)
    parts = [arguments["input"], arguments["residual"], torch.full_like(arguments["residual"], torch.nan)]
    wide = torch.cat(parts, 1)
    input, residual, out = wide.split([part.shape[1] for part in parts], 1)
    ops.conv2d_add_relu(**{**arguments, "input": input, "residual": residual}, out=out)
    oracle, baseline = (
        run("conv2d_add_relu", chosen, backend="reference")[0]
        for chosen in (mapped(arguments, Tensor.double), arguments)
    )
    assert_close_to_oracle(out, oracle, baseline, what="dense block", border=1)
    assert torch.equal(input, arguments["input"])
    assert torch.equal(residual, arguments["residual"])


def preactivations(case: Case, arguments: dict[str, Any]) -> list[tuple[Tensor, str]]:
    """What goes into each activation of the call, in float64, with the activation's name."""
    exact = mapped(arguments, Tensor.double)
    found = []
    if case.op == "depthwise_separable_conv2d":
        names = {"depthwise_weight": "weight", "depthwise_bias": "bias"}
        names |= {name: name for name in ("input", "stride", "padding", "dilation")}
        first = {new: exact[old] for old, new in names.items() if old in exact}
        (hidden,) = run("depthwise_conv2d", first, backend="reference")
        found.append((hidden, exact.get("depthwise_activation", "none")))
        outer = "pointwise_activation"
    else:
        outer = "activation"
    exact_sign = case.op == "add_relu" and exact.get("activation") != "relu6"
    if case.op != "local_response_norm" and not exact_sign:
        default = "relu" if case.op.endswith("relu") else "none"
        for value in run(case.op, {**exact, outer: "none"}, backend="reference"):
            found.append((value, exact.get(outer, default)))
    return found


def torchs_masks(case: Case, arguments: dict[str, Any]) -> list[list[bool]]:
    """Where the outputs lie within the activation's kinks: what torch rounds between two convolutions can move them."""
    outputs = run(case.op, arguments, backend="reference")
    return [((output > 0) & (output < 6)).flatten().tolist() for output in outputs]


def arguments_off_the_kinks(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> dict[str, Any]:
    """Arguments whose gradients do not hang on a rounding error."""
    for seed in range(200):
        arguments = case.arguments(dtype, layout, seed=seed, requires_grad=True, device=device)
        with torch.no_grad():
            away = all(bool(away_from_kinks(v, a, dtype).all()) for v, a in preactivations(case, arguments))
            if away and torchs_masks(case, arguments) == torchs_masks(case, mapped(arguments, Tensor.double)):
                return arguments
    raise AssertionError(f"{case}: every seed has a value on a kink; make the case smaller")


def gradients(case: Case, arguments: dict[str, Any], grads: list[Tensor], **more: Any) -> list[Tensor]:
    return list(torch.autograd.grad(run(case.op, arguments, **more), tensors(arguments), grads))


def check_gradients(case: Case, arguments: dict[str, Any], grads: list[Tensor]) -> None:
    with poisoned_outputs():
        found = gradients(case, arguments, grads)
    exact = mapped(arguments, lambda t: t.detach().double().requires_grad_())
    oracles = gradients(case, exact, [g.double() for g in grads], backend="reference")
    baselines = gradients(case, arguments, grads, backend="reference")
    for argument, gradient, oracle, baseline in zip(tensors(arguments), found, oracles, baselines, strict=True):
        assert gradient.shape == argument.shape
        assert gradient.dtype == argument.dtype
        what = f"{case}, gradient of the argument of shape {tuple(argument.shape)}"
        ring = 1 if gradient.dim() > 2 and min(gradient.shape[-2:]) > 2 else None
        assert_close_to_oracle(gradient, oracle, baseline, what=what, border=ring)


@combinations()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    arguments = arguments_off_the_kinks(case, dtype, layout, device)
    grads = [torch.randn_like(output) for output in run(case.op, arguments)]
    check_gradients(case, arguments, grads)


def expanded(output: Tensor) -> Tensor:
    return torch.randn_like(output[(0,) * output.dim()]).expand_as(output)


def transposed(output: Tensor) -> Tensor:
    return torch.randn_like(output.mT.contiguous()).mT


def channels_last(output: Tensor) -> Tensor:
    return torch.randn_like(output).contiguous(memory_format=torch.channels_last)


def sliced(output: Tensor) -> Tensor:
    return torch.randn(*output.shape[:-1], 2 * output.shape[-1], dtype=output.dtype, device=output.device)[..., ::2]


IMAGES = [case for case in CASES if len(case.shapes["input"]) == 4 and case.shapes["input"][0]]


def for_odd_gradients(backend: str) -> list[Case]:
    """In the emulator two of each op: it is the number of channels that decides what becomes of an odd gradient."""
    if backend != "cuda-emulated":
        return IMAGES
    of_ops = [[case for case in IMAGES if case.op == op] for op in ops.__all__]
    return [case for cases in of_ops for case in (cases[0], max(cases, key=lambda c: c.shapes["input"][1]))]


@pytest.mark.parametrize("make", [expanded, transposed, channels_last, sliced])
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
    """`.sum()` sends expanded gradients, other consumers send any layout."""
    arguments = arguments_off_the_kinks(case, torch.float32, layout, device)
    check_gradients(case, arguments, [make(output) for output in run(case.op, arguments)])


@combinations([torch.float32, torch.bfloat16], ["contiguous"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_non_contiguous_inputs(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    def strided(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        wide[..., ::2] = tensor
        return wide[..., ::2]

    arguments = case.arguments(dtype, layout, device=device)
    outputs = run(case.op, mapped(arguments, strided))
    for output, expected in zip(outputs, run(case.op, arguments), strict=True):
        torch.testing.assert_close(output, expected)


def test_same_bits_every_time() -> None:
    case = named("depthwise_separable_conv2d")[1]
    first, second = (
        gradients(case, arguments, [torch.ones_like(o) for o in run(case.op, arguments)])
        for arguments in [case.arguments(requires_grad=True)] * 2
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


# ----------------------------------------------------------------------------------------- edge
# values

SPECIAL = [torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-45, 3e38, 6.0, 5.9999995]


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_through_activations(dtype: torch.dtype, activation: str) -> None:
    """NaN stays NaN, zeros keep the sign that torch's CPU kernels give them; the mask treats them as those do."""
    values = torch.tensor(SPECIAL * 7, dtype=dtype)  # vectors and a rest

    def forward_and_backward(values: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
        value = values.clone().requires_grad_()
        output = ops.add_relu(value, torch.full_like(value, -0.0), activation=activation, backend=backend)
        (gradient,) = torch.autograd.grad(output, value, torch.full_like(output, 3.0))
        if activation == "relu6":  # of NaN torch's own differs between its vectors and their rest
            gradient = gradient.where(~output.isnan(), 0)
        return output.cpu(), gradient.cpu()

    # torch's kernels for GPUs may lose the sign of -0.0.
    pairs = zip(forward_and_backward(values, None), forward_and_backward(values.cpu(), "reference"), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.parametrize("op", CONV_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_special_values_through_convolutions(op: str, dtype: torch.dtype, value: float) -> None:
    case = next(c for c in named(op) if len(c.shapes["input"]) == 4)
    arguments = case.arguments(dtype)
    arguments["input"][0, 0, 1, 1] = value
    for output, expected in zip(run(op, arguments), run(op, arguments, backend="reference"), strict=True):
        assert torch.equal(output.isnan(), expected.isnan())
        assert torch.equal(output.isinf(), expected.isinf())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_special_values_through_lrn(dtype: torch.dtype, layout: str, value: float) -> None:
    """A bad value spoils its own window and nothing beyond it."""
    case = named("local_response_norm")[1]
    arguments = case.arguments(dtype, layout)
    arguments["input"][1, 50, 3, 3] = value
    (output,) = run(case.op, arguments)
    (expected,) = run(case.op, arguments, backend="reference")
    assert torch.equal(output.isnan(), expected.isnan())
    torch.testing.assert_close(output, expected, equal_nan=True)


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

"""Calls of an op against float64 by the tolerance policy: what the tests of its kernels on every backend share.

They run on the backend of the context (`fastconv.use_backend`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle, away_from_kinks, poisoned_outputs
from support.cases import CONV_OPS, Case, Concatenation, layout_of, mapped, named, run, tensors

# The dtypes and layouts in which test_op_numerics.py has every case in the emulator, which takes its time: some run
# always, some when slow tests do. Both kinds of 16 bits share their kernels' source, of which tests/kernels/cuda take
# each one; so do the layouts in float64.
EMULATED = {
    (torch.float32, "contiguous"): (),
    (torch.float16, "channels_last"): (),
    (torch.bfloat16, "contiguous"): (),
    (torch.float32, "channels_last"): pytest.mark.slow,
    (torch.float64, "contiguous"): pytest.mark.slow,
}


def border(case: Case, output: Tensor) -> int | None:
    """Convolutions are judged on their border and their interior apart."""
    return 1 if case.op in CONV_OPS and output.dim() >= 3 else None


def check_outputs(case: Case, arguments: dict[str, Any]) -> None:
    """Values, and the layout that the reference gives them."""
    with poisoned_outputs():
        outputs = run(case.op, arguments)
    oracles = run(case.op, mapped(arguments, Tensor.double), backend="reference")
    baselines = run(case.op, arguments, backend="reference")
    for output, oracle, baseline in zip(outputs, oracles, baselines, strict=True):
        assert_close_to_oracle(output, oracle, baseline, what=str(case), border=border(case, output))
        assert layout_of(output) == layout_of(baseline)


def check_forward(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    check_outputs(case, case.arguments(dtype, layout, device=device))


def check_out(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
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


def check_from_one_slice_into_the_next(dtype: torch.dtype, layout: str, device: torch.device) -> None:
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


def check_backward(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
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


ODD_GRADIENTS = (expanded, transposed, channels_last, sliced)


def check_odd_gradients(case: Case, layout: str, make: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """`.sum()` sends expanded gradients, other consumers send any layout."""
    arguments = arguments_off_the_kinks(case, torch.float32, layout, device)
    check_gradients(case, arguments, [make(output) for output in run(case.op, arguments)])


def check_non_contiguous_inputs(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> None:
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


# ----------------------------------------------------------------------------------------- edge values

SPECIAL = [torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-45, 3e38, 6.0, 5.9999995]


def check_special_values_through_activations(dtype: torch.dtype, activation: str) -> None:
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


def check_special_values_through_convolutions(op: str, dtype: torch.dtype, value: float) -> None:
    case = next(c for c in named(op) if len(c.shapes["input"]) == 4)
    arguments = case.arguments(dtype)
    arguments["input"][0, 0, 1, 1] = value
    for output, expected in zip(run(op, arguments), run(op, arguments, backend="reference"), strict=True):
        assert torch.equal(output.isnan(), expected.isnan())
        assert torch.equal(output.isinf(), expected.isinf())


def check_special_values_through_lrn(dtype: torch.dtype, layout: str, value: float) -> None:
    """A bad value spoils its own window and nothing beyond it."""
    case = named("local_response_norm")[1]
    arguments = case.arguments(dtype, layout)
    arguments["input"][1, 50, 3, 3] = value
    (output,) = run(case.op, arguments)
    (expected,) = run(case.op, arguments, backend="reference")
    assert torch.equal(output.isnan(), expected.isnan())
    torch.testing.assert_close(output, expected, equal_nan=True)


# ----------------------------------------------------------------------------- arguments of a test's own


def random(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def judge(op: str, arguments: dict[str, Any], *, grad: bool = True) -> None:
    """Forward and, for gradients that do not hang on a rounding error, backward by the policy."""
    case = Case(op, "own", {}, "")
    arguments = mapped(arguments, lambda t: t.requires_grad_(grad))
    check_outputs(case, arguments)
    if grad:
        check_gradients(case, arguments, [torch.randn_like(output) for output in run(op, arguments)])

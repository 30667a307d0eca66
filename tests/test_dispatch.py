"""The ops as citizens of torch: opcheck, compile, export, autocast, vmap, backends."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from cases import CASES, Case, named, run, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
from fastconv import ops

FIRST = [next(iter(named(op))) for op in ops.__all__]


class Recorder(TorchDispatchMode):
    """The calls of fastconv's operators below autograd, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastconv":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch of op and backward op."""
    arguments = case.arguments(requires_grad=True)
    with Recorder() as recorder:
        outputs = run(case.op, arguments)
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    names = [function.name() for function, _ in recorder.calls]
    assert names[0] == f"fastconv::{case.op}"
    no_backward = case.op == "add_relu" and case.options.get("activation") == "none"
    assert [name.endswith("_backward") for name in names[1:]] == [True] * (not no_backward)

    def leaf(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(leaf(v) for v in value)
        return value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value

    for function, args in recorder.calls:
        torch.library.opcheck(function, leaf(args))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_compile_fullgraph(case: Case, dynamic: bool) -> None:
    """Forward and backward as one graph, on a new batch size without a break."""
    torch._dynamo.reset()

    def step(arguments: dict[str, Any]) -> list[Tensor]:
        return [output * 2 for output in run(case.op, arguments)]

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 5) if dynamic else (2,):
        arguments = Case(
            case.op,
            case.name,
            {
                name: (batch, *shape[1:]) if name in ("input", "residual", "other") else shape
                for name, shape in case.shapes.items()
            },
            case.why,
            case.options,
        ).arguments(requires_grad=True)
        found, expected = compiled(arguments), step(arguments)
        torch.testing.assert_close(found, expected)
        grads = [torch.randn_like(output) for output in expected]
        torch.testing.assert_close(
            torch.autograd.grad(found, tensors(arguments), grads),
            torch.autograd.grad(expected, tensors(arguments), grads),
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_compile_with_inductor(case: Case) -> None:
    torch._dynamo.reset()
    arguments = case.arguments()
    compiled = torch.compile(lambda: [o + 1 for o in run(case.op, arguments)], fullgraph=True)
    torch.testing.assert_close(compiled(), [o + 1 for o in run(case.op, arguments)])


class Call(torch.nn.Module):
    """The op with its weights as parameters, as a model holds it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        arguments = case.arguments()
        self.op = case.op
        self.input = arguments.pop("input")
        self.rest = arguments

    def forward(self, input: Tensor) -> list[Tensor]:
        return run(self.op, {"input": input, **self.rest})


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_export_is_one_node(case: Case) -> None:
    module = Call(case)
    dynamic = None
    if not any(name in case.shapes for name in ("residual", "other")):
        dynamic = {"input": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(module, (module.input,), dynamic_shapes=dynamic)
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [name for name in called if "getitem" not in name] == [f"fastconv.{case.op}.default"]

    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    torch.testing.assert_close(loaded(module.input), module(module.input))
    if dynamic is not None:
        larger = torch.cat([module.input] * 3)
        torch.testing.assert_close(loaded(larger), module(larger))


# -------------------------------------------------------------------------------------------
# autocast


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_autocast_dtypes_are_eagers(case: Case, dtype: torch.dtype, cast_to: torch.dtype, backend: str) -> None:
    arguments = case.arguments(dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=cast_to):
        outputs = run(case.op, arguments, backend=backend)
        expected = eager(case.op, arguments)
    assert [o.dtype for o in outputs] == [o.dtype for o in expected]
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    for tensor in tensors(arguments):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype


def eager(op: str, a: dict[str, Any]) -> list[Tensor]:
    """What a user writes with torch.nn.functional, for the first case of each op."""
    import torch.nn.functional as F

    if op == "add_relu":
        return [F.relu(a["input"] + a["other"])]
    if op == "local_response_norm":
        return [F.local_response_norm(a["input"], a["size"], a["alpha"], a["beta"], a["k"])]
    if op == "pointwise_conv2d_group":
        pairs = zip(a["weights"], a["biases"], strict=True)
        return [F.relu(F.conv2d(a["input"], w, b)) for w, b in pairs]
    if op == "depthwise_conv2d":
        groups = a["input"].shape[1]
        return [F.relu(F.conv2d(a["input"], a["weight"], a["bias"], 2, 1, 1, groups))]
    if op == "depthwise_separable_conv2d":
        groups = a["input"].shape[1]
        h = F.conv2d(a["input"], a["depthwise_weight"], a["depthwise_bias"], 1, 1, 1, groups)
        return [F.relu6(F.conv2d(F.relu(h), a["pointwise_weight"], a["pointwise_bias"]))]
    y = F.conv2d(a["input"], a["weight"], a["bias"], padding=a.get("padding", 0))
    return [F.relu(y + a["residual"] if "residual" in a else y)]


@pytest.mark.parametrize("op", ["conv2d_add_relu", "pointwise_conv2d"])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_wider_residual(op: str, residual: torch.dtype) -> None:
    """Eager promotes the sum; a bfloat16 result would lose what the caller kept."""
    arguments = named(op)[0].arguments()
    arguments["residual"] = arguments["residual"].to(residual)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (output,) = run(op, arguments)
        (expected,) = eager(op, arguments)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_autocast_under_compile(case: Case) -> None:
    torch._dynamo.reset()
    arguments = case.arguments()

    def step() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(case.op, arguments)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(), step(), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


# -----------------------------------------------------------------------------------------------
# vmap


@pytest.mark.parametrize("which", ["input", "everything"])
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_vmap(case: Case, which: str) -> None:
    """Over the input alone, which is one call on a larger batch, and over all tensors."""
    samples = [case.arguments(seed=seed) for seed in range(3)]
    fixed = samples[0]

    def is_mapped(name: str) -> bool:
        return name in ("input", "residual", "other") if which == "input" else name in case.shapes

    def stacked(name: str) -> Any:
        values = [sample[name] for sample in samples]
        if isinstance(values[0], list):
            return [None if v[0] is None else torch.stack(v, 1) for v in zip(*values, strict=True)]
        return torch.stack(values, 1) if values[0].dim() else torch.stack(values)

    names = [name for name in case.shapes if is_mapped(name)]
    values = {name: stacked(name) for name in names}
    dims = ({name: torch.utils._pytree.tree_map(lambda v: None if v is None else 1, values[name]) for name in names},)
    found = torch.vmap(lambda given: run(case.op, {**fixed, **given}), in_dims=dims)(values)
    for index, sample in enumerate(samples):
        given = {name: sample[name] for name in names}
        expected = run(case.op, {**fixed, **given})
        torch.testing.assert_close([output[index] for output in found], expected)


# -------------------------------------------------------------------------------------------
# backends


def test_use_backend_reaches_every_op() -> None:
    for case in FIRST:
        with fastconv.use_backend("reference"), Recorder() as recorder:
            run(case.op, case.arguments())
        assert not recorder.calls
        with Recorder() as recorder:
            run(case.op, case.arguments())
        assert recorder.calls


def test_backend_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="needed one of auto, cpu, cuda, triton, reference"):
        ops.add_relu(x, x, backend="cudnn")
    with pytest.raises(RuntimeError, match=r"'cuda', which cannot run here: .+; leave the backend"):
        ops.add_relu(x, x, backend="cuda")
    with pytest.raises(RuntimeError, match="cannot run here"), fastconv.use_backend("triton"):
        pass


def test_use_backend_is_undone_after_an_error() -> None:
    with pytest.raises(KeyError), fastconv.use_backend("reference"):
        raise KeyError
    with Recorder() as recorder:
        ops.add_relu(torch.ones(2), torch.ones(2))
    assert recorder.calls


def test_meta_tensors() -> None:
    for case in FIRST:
        arguments = case.arguments()
        found = run(case.op, torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments))
        expected = run(case.op, arguments)
        assert [(o.shape, o.stride(), o.dtype) for o in found] == [(o.shape, o.stride(), o.dtype) for o in expected]

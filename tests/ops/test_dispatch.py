"""The ops as citizens of torch: opcheck, compile, export, autocast, vmap, backends."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
from fastconv import ops
from fastconv.operators.schemas import WITH_OUT
from support.cases import CASES, Case, Concatenation, named, run, tensors

FIRST = [next(iter(named(op))) for op in ops.__all__]


def autocast(arguments: dict[str, Any], dtype: torch.dtype) -> torch.autocast:
    """On the device of the arguments: where other tests call these, that may be a GPU."""
    return torch.autocast(tensors(arguments)[0].device.type, dtype=dtype)


class Recorder(TorchDispatchMode):
    """The calls of fastconv's operators below autograd, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastconv":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def opchecked(case: Case) -> bool:
    """Beside the first of each op, those whose arguments a fake kernel treats in a way of its own."""
    return case in FIRST or case.name in ("unbatched", "empty_batch", "empty", "same", "broadcast", "one_bias")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if opchecked(c) else pytest.mark.slow, id=str(c)) for c in CASES]
)
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


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_compile_of_sums_that_are_broadcast(dynamic: bool | None) -> None:
    """One node, whatever the dtypes and shapes of the two."""
    image, channels, number = torch.randn(2, 4, 6, 6), torch.randn(4, 1, 1), torch.tensor(2.0)
    for pair in ((image, channels), (channels.double(), image), (image, number.double()), (image.long(), channels)):
        torch._dynamo.reset()
        compiled = torch.compile(ops.add_relu, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        expected = torch.relu(pair[0] + pair[1])
        torch.testing.assert_close(compiled(*pair), expected)


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
# out

FIRST_WITH_OUT = [case for case in FIRST if case.op in WITH_OUT]


def into_slices(case: Case, arguments: dict[str, Any], **more: Any) -> Tensor:
    """The results, written side by side into one tensor, after some arithmetic on it."""
    with torch.no_grad():
        results = run(case.op, arguments, **more)
    joined = Concatenation.of(results, 3, "channels_last")
    joined.whole.mul_(2)
    run(case.op, arguments, out=joined.argument(case.op), **more)
    return joined.whole + 1


@pytest.mark.parametrize("case", named(*WITH_OUT), ids=str)
def test_opcheck_out(case: Case) -> None:
    with Recorder() as recorder:
        into_slices(case, case.arguments())
    function, args = recorder.calls[1]
    assert function.name().endswith(f"::{case.op}.out")
    torch.library.opcheck(function, args)


@pytest.mark.parametrize(("backend", "dynamic"), [(None, False), (None, True), ("reference", False)])
@pytest.mark.parametrize("case", FIRST_WITH_OUT, ids=str)
def test_compile_out(case: Case, dynamic: bool, backend: str | None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(into_slices, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    arguments = case.arguments()
    torch.testing.assert_close(compiled(case, arguments, backend=backend), into_slices(case, arguments))


@pytest.mark.parametrize("case", FIRST_WITH_OUT, ids=str)
def test_compile_out_of_the_caller(case: Case) -> None:
    """Eager and compiled, what is outside of the slices stays."""
    torch._dynamo.reset()
    arguments = case.arguments()
    results = run(case.op, arguments)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    joined = Concatenation.of(results, 3, "channels_last")
    compiled(case.op, arguments, out=joined.argument(case.op))
    joined.check_the_rest()
    torch.testing.assert_close(joined.slices, results)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST_WITH_OUT, ids=str)
def test_compile_out_with_inductor(case: Case) -> None:
    torch._dynamo.reset()
    arguments = case.arguments()
    compiled = torch.compile(into_slices, fullgraph=True)
    torch.testing.assert_close(compiled(case, arguments), into_slices(case, arguments))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", FIRST_WITH_OUT, ids=str)
def test_out_counts_versions(case: Case, backend: str) -> None:
    """Autograd notices that a tensor that it kept was overwritten; inference mode counts, too."""
    arguments = case.arguments()
    out = run(case.op, arguments)
    factors = [torch.ones_like(tensor, requires_grad=True) for tensor in out]
    products = [tensor * factor for tensor, factor in zip(out, factors, strict=True)]
    given = out if case.op.endswith("group") else out[0]
    run(case.op, arguments, out=given, backend=backend)
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
    versions = [tensor._version for tensor in out]
    with torch.inference_mode():
        run(case.op, arguments, out=given, backend=backend)
    assert all(tensor._version > version for tensor, version in zip(out, versions, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", FIRST_WITH_OUT, ids=str)
def test_autocast_out(case: Case, backend: str) -> None:
    """The result's dtype is that of the context, `out` must have it."""
    arguments = case.arguments()
    results = run(case.op, arguments)
    arguments |= {"residual": arguments["residual"].bfloat16()} if "residual" in arguments else {}
    with autocast(arguments, torch.bfloat16):
        expected = run(case.op, arguments, backend=backend)
        assert expected[0].dtype == torch.bfloat16
        kind = expected[0].device.type
        for dtype in (torch.bfloat16, torch.float32):
            joined = Concatenation.of([result.to(dtype) for result in results], 3, "channels_last")
            if dtype == torch.bfloat16:
                run(case.op, arguments, out=joined.argument(case.op), backend=backend)
                torch.testing.assert_close(joined.slices, expected)
            else:
                refusal = rf"float32 on {kind}.*, needed .+ bfloat16 on {kind}.*, as the result is"
                with pytest.raises(RuntimeError, match=refusal):
                    run(case.op, arguments, out=joined.argument(case.op), backend=backend)
            joined.check_the_rest()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", ["conv2d_add_relu", "pointwise_conv2d"])
def test_autocast_out_with_a_wider_residual(op: str, backend: str) -> None:
    arguments = named(op)[0].arguments()
    with autocast(arguments, torch.bfloat16):
        (expected,) = run(op, arguments, backend=backend)
        out = torch.zeros_like(expected)
        run(op, arguments, out=out, backend=backend)
        torch.testing.assert_close(out, expected)
        with pytest.raises(RuntimeError, match="got out beside an argument that requires grad"):
            run(op, {**arguments, "weight": arguments["weight"].requires_grad_()}, out=out, backend=backend)


@pytest.mark.parametrize("case", FIRST_WITH_OUT, ids=str)
def test_transforms_refuse_out(case: Case) -> None:
    arguments = case.arguments()
    out = [torch.zeros_like(result) for result in run(case.op, arguments)]
    given = out if case.op.endswith("group") else out[0]

    def total(input: Tensor) -> Tensor:
        return sum(result.sum() for result in run(case.op, {**arguments, "input": input}, out=given))

    with pytest.raises(RuntimeError, match="got out beside an argument that requires grad"):
        torch.func.grad(total)(arguments["input"])
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(total)(arguments["input"][None])


@pytest.mark.parametrize("case", FIRST_WITH_OUT, ids=str)
def test_export_out(case: Case) -> None:
    class Joined(torch.nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return into_slices(case, {**arguments, "input": input})

    arguments = case.arguments()
    program = torch.export.export(Joined(), (arguments["input"],))
    assert f"fastconv.{case.op}.out" in [str(n.target) for n in program.graph.nodes]
    expected = into_slices(case, arguments)
    torch.testing.assert_close(program.module()(arguments["input"]), expected)
    torch.testing.assert_close(program.run_decompositions().module()(arguments["input"]), expected)


# -------------------------------------------------------------------------------------------
# autocast


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_autocast_dtypes_are_eagers(case: Case, dtype: torch.dtype, cast_to: torch.dtype, backend: str) -> None:
    arguments = case.arguments(dtype, requires_grad=True)
    with autocast(arguments, cast_to):
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
    with autocast(arguments, torch.bfloat16):
        (output,) = run(op, arguments)
        (expected,) = eager(op, arguments)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_autocast_under_compile(case: Case) -> None:
    torch._dynamo.reset()
    arguments = case.arguments()
    kind = tensors(arguments)[0].device.type

    def step() -> list[Tensor]:
        with torch.autocast(kind, dtype=torch.bfloat16):
            return run(case.op, arguments)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(), step(), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


# -----------------------------------------------------------------------------------------------
# vmap


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared weight"])
def test_vmap_over_nothing(shared: bool) -> None:
    images, weights = torch.empty(0, 2, 3, 8, 8), torch.empty(0, 4, 3, 3, 3)
    if shared:
        found = torch.vmap(lambda image: ops.conv2d_relu(image, torch.ones(4, 3, 3, 3)))(images)
    else:
        found = torch.vmap(ops.conv2d_relu)(images, weights)
    assert found.shape == (0, 2, 4, 6, 6)


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

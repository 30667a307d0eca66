"""The ops as torch sees them: checks that the operators of the library and those of Triton's kernels share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastconv.operators.schemas import WITH_OUT
from support.cases import FIRST, Case, Concatenation, run, tensors
from support.eager import eager

FIRST_WITH_OUT = [case for case in FIRST.values() if case.op in WITH_OUT]


def autocast(arguments: dict[str, Any], dtype: torch.dtype) -> torch.autocast:
    """On the device of the arguments: where other tests call these, that may be a GPU."""
    return torch.autocast(tensors(arguments)[0].device.type, dtype=dtype)


class Recorder(TorchDispatchMode):
    """The calls of a namespace's operators below autograd, forward and backward."""

    def __init__(self, namespace: str = "fastconv") -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == self.namespace:
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def check_opcheck(case: Case, namespace: str) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch of op and backward op."""
    arguments = case.arguments(requires_grad=True)
    with Recorder(namespace) as recorder:
        outputs = run(case.op, arguments)
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    names = [function.name() for function, _ in recorder.calls]
    assert names[0] == f"{namespace}::{case.op}"
    no_backward = case.op == "add_relu" and case.options.get("activation") == "none"
    assert [name.endswith("_backward") for name in names[1:]] == [True] * (not no_backward)

    def leaf(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(leaf(v) for v in value)
        return value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value

    for function, args in recorder.calls:
        torch.library.opcheck(function, leaf(args))


def check_compile_fullgraph(case: Case, dynamic: bool) -> None:
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


class Call(nn.Module):
    """The op with its weights as parameters, as a model holds it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        arguments = case.arguments()
        self.op = case.op
        self.input = arguments.pop("input")
        self.rest = arguments

    def forward(self, input: Tensor) -> list[Tensor]:
        return run(self.op, {"input": input, **self.rest})


def into_slices(case: Case, arguments: dict[str, Any], **more: Any) -> Tensor:
    """The results, written side by side into one tensor, after some arithmetic on it."""
    with torch.no_grad():
        results = run(case.op, arguments, **more)
    joined = Concatenation.of(results, 3, "channels_last")
    joined.whole.mul_(2)
    run(case.op, arguments, out=joined.argument(case.op), **more)
    return joined.whole + 1


def check_opcheck_out(case: Case, namespace: str) -> None:
    with Recorder(namespace) as recorder:
        into_slices(case, case.arguments())
    function, args = recorder.calls[1]
    assert function.name() == f"{namespace}::{case.op}.out"
    torch.library.opcheck(function, args)


def check_compile_out(case: Case, dynamic: bool, backend: str | None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(into_slices, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    arguments = case.arguments()
    torch.testing.assert_close(compiled(case, arguments, backend=backend), into_slices(case, arguments))


def check_out_counts_versions(case: Case, backend: str) -> None:
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


def check_autocast_out(case: Case, backend: str) -> None:
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


def check_autocast_dtypes_are_eagers(case: Case, dtype: torch.dtype, cast_to: torch.dtype, backend: str) -> None:
    arguments = case.arguments(dtype, requires_grad=True)
    with autocast(arguments, cast_to):
        outputs = run(case.op, arguments, backend=backend)
        expected = eager(case.op, arguments)
    assert [o.dtype for o in outputs] == [o.dtype for o in expected]
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    for tensor in tensors(arguments):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype


def check_autocast_under_compile(case: Case) -> None:
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


def check_vmap(case: Case, which: str) -> None:
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

"""The ops as citizens of torch: opcheck, compile, export, autocast, vmap, backends."""

from __future__ import annotations

import ctypes
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv
from fastconv import ops
from fastconv.operators import backends, library
from fastconv.operators.schemas import WITH_OUT
from support import dispatching
from support.cases import CASES, FIRST, Case, Concatenation, named, run
from support.dispatching import FIRST_WITH_OUT, Call, Recorder, autocast, into_slices
from support.eager import eager

# Those whose arguments a fake kernel treats in a way of its own.
OF_THEIR_OWN = ("unbatched", "empty_batch", "empty", "same", "broadcast", "one_bias")


def is_quick(case: Case) -> bool:
    return case in FIRST.values() or case.name in OF_THEIR_OWN


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if is_quick(c) else pytest.mark.slow, id=str(c)) for c in CASES]
)
def test_opcheck(case: Case) -> None:
    dispatching.check_opcheck(case, "fastconv")


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
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_compile_fullgraph(case: Case, dynamic: bool) -> None:
    dispatching.check_compile_fullgraph(case, dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_compile_with_inductor(case: Case) -> None:
    torch._dynamo.reset()
    arguments = case.arguments()
    compiled = torch.compile(lambda: [o + 1 for o in run(case.op, arguments)], fullgraph=True)
    torch.testing.assert_close(compiled(), [o + 1 for o in run(case.op, arguments)])


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
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


@pytest.mark.parametrize("case", named(*WITH_OUT), ids=str)
def test_opcheck_out(case: Case) -> None:
    dispatching.check_opcheck_out(case, "fastconv")


@pytest.mark.parametrize(("backend", "dynamic"), [(None, False), (None, True), ("reference", False)])
@pytest.mark.parametrize("case", FIRST_WITH_OUT, ids=str)
def test_compile_out(case: Case, dynamic: bool, backend: str | None) -> None:
    dispatching.check_compile_out(case, dynamic, backend)


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
    dispatching.check_out_counts_versions(case, backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", FIRST_WITH_OUT, ids=str)
def test_autocast_out(case: Case, backend: str) -> None:
    dispatching.check_autocast_out(case, backend)


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
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_autocast_dtypes_are_eagers(case: Case, dtype: torch.dtype, cast_to: torch.dtype, backend: str) -> None:
    dispatching.check_autocast_dtypes_are_eagers(case, dtype, cast_to, backend)


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


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_autocast_under_compile(case: Case) -> None:
    dispatching.check_autocast_under_compile(case)


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
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_vmap(case: Case, which: str) -> None:
    dispatching.check_vmap(case, which)


# -------------------------------------------------------------------------------------------
# backends


def test_use_backend_reaches_every_op() -> None:
    for case in FIRST.values():
        with fastconv.use_backend("reference"), Recorder() as recorder:
            run(case.op, case.arguments())
        assert not recorder.calls
        with Recorder() as recorder:
            run(case.op, case.arguments())
        assert recorder.calls


def test_backend_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="needed one of auto, cpu, cuda, triton, cudnn, reference"):
        ops.add_relu(x, x, backend="mps")
    with pytest.raises(RuntimeError, match=r"'cuda', which cannot run here: .+; leave the backend"):
        ops.add_relu(x, x, backend="cuda")
    with pytest.raises(RuntimeError, match="cannot run here"), fastconv.use_backend("triton"):
        pass


@pytest.mark.parametrize(
    ("version", "built", "message"),
    [
        (
            12080,
            "conv2d for sm_80+PTX, by nvcc 13.0",
            "the NVIDIA driver is for CUDA 12, and the library was built with",
        ),
        (13000, "conv2d for sm_80+PTX, by nvcc 13.2", None),
        (13010, "conv2d for sm_80+PTX, by nvcc 12.9", None),
        (None, "conv2d for sm_80+PTX, by nvcc 13.0", None),
    ],
)
def test_a_driver_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, version: int | None, built: str, message: str | None
) -> None:
    """Torch may come with an older CUDA, and so run where the library's own runtime cannot."""

    class Driver:
        def __init__(self, name: str) -> None:
            if version is None:
                raise OSError(name)

        def cuDriverGetVersion(self, found: Any) -> int:
            found._obj.value = version
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    backends.old_driver.cache_clear()
    monkeypatch.setattr(backends, "no_gpu", lambda: None)
    monkeypatch.setattr(library, "LOADED", True)
    monkeypatch.setattr(library, "has_cuda", lambda: True)
    monkeypatch.setattr(library, "build_info", lambda: {"cuda": built})
    reason = backends.problem("cuda")
    backends.old_driver.cache_clear()
    if message is None:
        assert reason is None
    else:
        assert str(reason).startswith(message)


def test_use_backend_is_undone_after_an_error() -> None:
    with pytest.raises(KeyError), fastconv.use_backend("reference"):
        raise KeyError
    with Recorder() as recorder:
        ops.add_relu(torch.ones(2), torch.ones(2))
    assert recorder.calls


def test_meta_tensors() -> None:
    for case in FIRST.values():
        arguments = case.arguments()
        found = run(case.op, torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments))
        expected = run(case.op, arguments)
        assert [(o.shape, o.stride(), o.dtype) for o in found] == [(o.shape, o.stride(), o.dtype) for o in expected]

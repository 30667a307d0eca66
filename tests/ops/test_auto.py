"""What `auto` runs where a table is in force: each pass its own candidate; as before what the table does not hold."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastconv import ops, use_backend
from fastconv.operators import kernels, measured, table_files
from fastconv.operators.fingerprint import fingerprint
from fastconv.operators.shape_classes import ShapeClass, shape_class
from fastconv.operators.tables import Candidate, Entry, Key, Table
from support import liars  # noqa: F401  # the backends

CPU = torch.device("cpu")
FORWARD = "conv2d_relu"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    measured.forget()


def call(batch: int = 2, side: int = 6, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(batch, 3, side, side, generator=generator).to(dtype)
    weight = torch.randn(4, 3, 3, 3, generator=generator).to(dtype)
    return input.requires_grad_(grad), weight.requires_grad_(grad), None, [1, 1], [1, 1], [1, 1], 1, "relu"


def run(args: tuple[Any, ...], **more: Any) -> Tensor:
    input, weight, bias, stride, padding, dilation, groups, _ = args
    return ops.conv2d_relu(input, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups, **more)


def expected(args: tuple[Any, ...]) -> Tensor:
    return run(args, backend="reference")


def entry(key: ShapeClass | Key, *backends: str, backward: tuple[Key, ...] = (), **more: Any) -> Entry:
    found = tuple(Candidate(name, outcome="ok", **more) for name in backends)
    return Entry(*key, candidates=found, backward=backward)


def backward_class(args: tuple[Any, ...]) -> ShapeClass:
    input, weight, _, *geometry = args
    output = expected(args).detach()
    mask = [True, True, False, False]
    return shape_class("conv2d_backward", (output, output, input, weight, *geometry, mask))


@contextlib.contextmanager
def table(*entries: Entry, **more: Any) -> Iterator[None]:
    measured.use(CPU, Table({"device": "this"}, entries={one.key: one for one in entries}, **more))
    yield
    measured.forget()


def who_ran(out: Tensor, args: tuple[Any, ...]) -> str:
    """ "marks" adds 1, all others are right."""
    truth = expected(args)
    if torch.allclose(out, truth + 1):
        return "marks"
    torch.testing.assert_close(out, truth)
    return "others"


def test_the_first_that_can_run_is_taken() -> None:
    args = call()
    key = shape_class(FORWARD, args)
    assert who_ran(run(args), args) == "others"
    with table(entry(key, "marks", "cpu")):
        assert who_ran(run(args), args) == "marks"
        with use_backend("cpu"):
            assert who_ran(run(args), args) == "others"
        assert who_ran(run(args, backend="reference"), args) == "others"
    for backends in (("onednn", "marks"), ("no-such-backend", "marks"), ("cuda", "marks")):
        with table(entry(key, *backends)):
            assert who_ran(run(args), args) == "marks"
    with table(entry(key, "reference", "marks")):
        assert who_ran(run(args), args) == "others"


def test_what_a_table_does_not_hold() -> None:
    """Nearest sizes of the family serve, if they are near and nothing of the family was wrong."""
    args = call()
    key = shape_class(FORWARD, args)
    with table(entry(key, "marks")):
        assert who_ran(run(call(side=8)), call(side=8)) == "marks"
        assert who_ran(run(call(batch=4)), call(batch=4)) == "marks"
        assert who_ran(run(call(side=64)), call(side=64)) == "others"
        assert who_ran(run(call(dtype=torch.float64)), call(dtype=torch.float64)) == "others"
        channels_last = (args[0].to(memory_format=torch.channels_last), *args[1:])
        assert who_ran(run(channels_last), channels_last) == "others"
    wrong = Entry(
        *shape_class(FORWARD, call(side=12)),
        candidates=(Candidate("reference", outcome="ok"), Candidate("marks", outcome="refused", reason="wrong")),
    )
    with table(entry(key, "marks"), wrong):
        assert who_ran(run(call(side=8)), call(side=8)) == "others"
        assert who_ran(run(args), args) == "marks"


def test_an_interrupted_entry_chooses_nothing() -> None:
    args = call()
    key = shape_class(FORWARD, args)
    with table(Entry(*key, candidates=(Candidate("marks", outcome="ok"),), complete=False)):
        assert who_ran(run(args), args) == "others"


def test_each_pass_has_its_own() -> None:
    args = call(grad=True)
    key, back = shape_class(FORWARD, args), backward_class(args)
    grad = torch.randn(expected(args).shape)
    truth = torch.autograd.grad(expected(args), args[:2], grad)
    for forward, backward in (("marks", "reference"), ("reference", "marks"), ("cpu", "marks"), ("marks", "marks")):
        with table(entry(key, forward, backward=(tuple(back),)), entry(back, backward)):
            out = run(args)
            assert who_ran(out.detach(), args) == ("marks" if forward == "marks" else "others")
            grad_input, grad_weight = torch.autograd.grad(out, args[:2], grad)
            # the mask is read from the output, which is above zero everywhere where it was marked
            if forward != "marks":
                torch.testing.assert_close(grad_weight, truth[1])
                torch.testing.assert_close(grad_input, truth[0] + (backward == "marks"))
            else:
                plain = torch.ops.aten.convolution_backward(
                    grad, *args[:2], None, *args[3:6], False, [0, 0], 1, [True, True, False]
                )
                torch.testing.assert_close(grad_input, plain[0] + (backward == "marks"))


def test_aten_for_both_passes_is_plain_aten() -> None:
    args = call(grad=True)
    back = backward_class(args)
    with table(entry(shape_class(FORWARD, args), "reference", backward=(tuple(back),)), entry(back, "reference")):
        assert type(run(args).grad_fn).__name__ == type(expected(args).grad_fn).__name__ == "ReluBackward0"


def test_a_variant_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the call of its class alone."""
    from fastconv import auto_kernels

    seen: list[tuple[str, Any]] = []

    def applied(backend: str, variant: Any) -> contextlib.AbstractContextManager[None]:
        seen.append((backend, dict(variant)))
        return contextlib.nullcontext()

    monkeypatch.setattr(auto_kernels, "applied", applied)
    monkeypatch.setattr(kernels, "library_of", lambda backend: object() if backend == "marks" else None)
    args = call()
    with table(entry(shape_class(FORWARD, args), "marks", variant={"family": "kernel"})):
        assert who_ran(run(args), args) == "marks"
        run(call(side=64))
    assert seen == [("marks", {"family": "kernel"})]


def test_a_variant_of_a_backend_without_any() -> None:
    """As a table may have that somebody wrote."""
    args = call()
    key = shape_class(FORWARD, args)
    with table(entry(key, "cpu", "marks", variant={"family": "kernel"})):
        assert who_ran(run(args), args) == "others"


def test_the_number_of_threads_counts() -> None:
    """Each has a table of its own."""
    args = call()
    before = torch.get_num_threads()
    with table(entry(shape_class(FORWARD, args), "marks")):
        assert who_ran(run(args), args) == "marks"
        torch.set_num_threads(before + 1)
        try:
            assert who_ran(run(args), args) == "others"
        finally:
            torch.set_num_threads(before)
        assert who_ran(run(args), args) == "marks"


def test_no_images_are_a_class_of_their_own() -> None:
    args = call()
    empty = (args[0][:0], *args[1:])
    with table(entry(shape_class(FORWARD, args), "marks")):
        assert shape_class(FORWARD, empty).size == (0, 6, 6)
        assert measured.choice(FORWARD, empty).candidate is None


def test_out() -> None:
    args = call()
    out = torch.empty(2, 4, 6, 6)
    with table(entry(shape_class(FORWARD, args), "marks")), torch.no_grad():
        assert run(args, out=out) is out
    assert who_ran(out, args) == "marks"


def test_out_under_autocast() -> None:
    """What counts is the dtype in which it runs."""
    args, low = call(), call(dtype=torch.bfloat16)
    out = torch.empty(2, 4, 6, 6, dtype=torch.bfloat16)
    entries = entry(shape_class(FORWARD, args), "marks"), entry(shape_class(FORWARD, low), "reference")
    with table(*entries), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run(args, out=out)
    torch.testing.assert_close(out, expected(low))
    with table(entries[1], entry(shape_class(FORWARD, low), "marks")), torch.no_grad(), torch.autocast("cpu"):
        run(args, out=out)
    torch.testing.assert_close(out, expected(low) + 1)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled(grad: bool) -> None:
    """The choice is a constant of the graph; aten stays aten, for Inductor to see."""
    args = call(grad=grad)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    for name, called in (("marks", "fastconv_"), ("reference", "aten.")):
        torch.compiler.reset()
        graphs.clear()
        with table(entry(shape_class(FORWARD, args), name)):
            compiled = torch.compile(run, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
            out = compiled(args)
        assert who_ran(out.detach(), args) == ("marks" if name == "marks" else "others")
        targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
        assert any(target.startswith(called) for target in targets)
        assert name == "marks" or not any("fastconv" in target for target in targets)
    torch.compiler.reset()


def test_compiled_for_any_size() -> None:
    args = call()
    torch.compiler.reset()
    with table(entry(shape_class(FORWARD, args), "marks")):
        input = args[0].clone()
        torch._dynamo.mark_dynamic(input, 0)
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        assert who_ran(compiled((input, *args[1:])), args) == "others"
    torch.compiler.reset()


def test_exported_programs_are_for_other_machines() -> None:
    args = call()

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.conv2d_relu(x, args[1], padding=1)

    for strict in (False, True):
        with table(entry(shape_class(FORWARD, args), "marks")):
            program = torch.export.export(Model(), (args[0],), strict=strict)
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert "fastconv.conv2d_relu.default" in targets
        assert who_ran(program.module()(args[0]), args) == "others"


def test_autocast() -> None:
    """The class is that of the dtype in which it runs."""
    args = call()
    low = call(dtype=torch.bfloat16)
    with table(entry(shape_class(FORWARD, low), "marks")), torch.autocast("cpu", torch.bfloat16):
        out = run(args)
    assert out.dtype is torch.bfloat16
    assert torch.allclose(out, expected(low) + 1)


def test_transforms() -> None:
    args = call()
    input, weight = args[:2]
    with table(entry(shape_class(FORWARD, args), "marks")):
        mapped = torch.vmap(lambda x: ops.conv2d_relu(x, weight, padding=1))(input[None])
        assert who_ran(mapped[0], args) == "others"  # of a size that is known only once the loop is one call
        _, tangent = torch.func.jvp(lambda x: ops.conv2d_relu(x, weight, padding=1), (input,), (input,))
        assert tangent.isfinite().all()


def test_determinism_and_lost_nan() -> None:
    args = call()
    key = shape_class(FORWARD, args)
    with table(entry(key, "marks", deterministic=False)):
        assert who_ran(run(args), args) == "marks"
        torch.use_deterministic_algorithms(True)
        try:
            assert who_ran(run(args), args) == "others"
        finally:
            torch.use_deterministic_algorithms(False)
    with table(entry(key, "marks", keeps_nan=False)):
        assert who_ran(run(args), args) == "others"
    with table(entry(key, "marks", keeps_nan=False), allow_lost_nan=True):
        assert who_ran(run(args), args) == "marks"


def test_a_file_that_cannot_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning that names file and remedy, and right results by what there was before."""
    monkeypatch.setenv("FASTCONV_TABLES", str(tmp_path))
    path = table_files.path_of(fingerprint(CPU), tmp_path)
    path.write_text('{"format": "fastconv table 1", "entries": [')
    measured.forget()
    args = call()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert who_ran(run(args), args) == who_ran(run(args), args) == "others"
        measured.forget()
        assert who_ran(run(args), args) == "others"
    (warning,) = said
    assert str(path) in str(warning.message)
    assert "run `python -m fastconv qualify` once more, or remove the file" in str(warning.message)


def test_bad_input_has_the_same_error() -> None:
    """From the op, before a table is asked."""
    input, weight = call()[:2]
    bad = [(input[0, 0], weight), (input, weight[:, :2]), (input.to_sparse(), weight), (input.int(), weight)]
    for args in bad:
        with pytest.raises(RuntimeError) as plain:
            ops.conv2d_relu(*args)
        with table(entry(shape_class(FORWARD, call()), "marks")), pytest.raises(RuntimeError) as by_table:
            ops.conv2d_relu(*args)
        assert str(by_table.value) == str(plain.value)


def test_every_op() -> None:
    """With a gradient, through the operators that hand each pass on."""
    from support.cases import CASES

    seen = set()
    for case in CASES:
        if case.op in seen:
            continue
        seen.add(case.op)
        arguments = case.arguments(torch.float32, requires_grad=True)
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        from fastconv.measure.calls import run as run_op

        truth = run_op(case.op, arguments, backend="reference")
        with measured_everywhere("cpu"):
            found = run_op(case.op, arguments)
            grads = torch.autograd.grad([out.sum() for out in found], tensors, allow_unused=True)
        torch.testing.assert_close(found, truth)
        wanted = torch.autograd.grad([out.sum() for out in truth], tensors, allow_unused=True)
        torch.testing.assert_close(grads, wanted)
    assert seen == set(ops.__all__)


@contextlib.contextmanager
def measured_everywhere(backend: str) -> Iterator[None]:
    """Every call is known, with this backend as the winner of each pass."""

    class All(dict):  # type: ignore[type-arg]
        def get(self, key: Any, default: Any = None) -> Entry:
            return entry(key, backend, backward=(("conv2d_backward", "any", (1,)),))

        def values(self) -> Any:
            return []

    measured.use(CPU, Table({"device": "this"}, entries=All()))
    yield
    measured.forget()

"""``python -m fastconv verify`` covers every op, and says no when an op is wrong."""

import pytest
import torch

from fastconv import ops
from fastconv.__main__ import main
from fastconv.measure.calls import DTYPES
from fastconv.measure.layers import LAYERS

COMMAND = ["verify", "--op", "local_response_norm", "--dtype", "fp32"]


def test_every_op_is_verified():
    assert {layer.op for layer in LAYERS if layer.verified} == set(ops.__all__)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(dtype, marks=pytest.mark.slow if dtype != "fp32" else ()) for dtype in DTYPES],
)
@pytest.mark.parametrize("op", ops.__all__)
def test_passes(op, dtype, capsys):
    assert main(["verify", "--op", op, "--dtype", dtype]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}, cpu, backend" in printed
    layers = [layer for layer in LAYERS if layer.op == op and layer.verified]
    for layer in layers:
        assert f"{op}: {layer.name}\n" in printed
    assert printed.count("  ok\n") == 2 * len(layers)  # the output's line and the gradients' line
    assert printed.endswith("all within the policy's bounds\n")


class Wrong(torch.autograd.Function):
    """The right operator, but for one element of its output or of its gradient."""

    @staticmethod
    def forward(ctx, input, where):
        ctx.where = where
        output = input.clone()
        if where == "output":
            output[0, 1, 2, 3] += 1e-3
        return output

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        if ctx.where == "grad input":
            grad[0, 1, 2, 3] += 1e-3
        return grad, None


@pytest.mark.parametrize("where", ["output", "grad input"])
def test_one_wrong_element_fails(where, capsys, monkeypatch):
    right = ops.local_response_norm

    def wrong(input, *args, backend, **options):
        output = right(input, *args, **options, backend="reference")
        return output if backend == "reference" else Wrong.apply(output, where)

    monkeypatch.setattr(ops, "local_response_norm", wrong)
    assert main([*COMMAND, "--seed", "3"]) == 1  # with which the ReLU before the LRN lets that element pass
    printed = capsys.readouterr().out
    assert "seed 3" in printed
    failures = printed[printed.index("\nFAILED") :]
    assert f"FAILED local_response_norm, alexnet2012/features.2+relu, fp32, contiguous, {where}: all:" in failures
    assert "at (0, 1, 2, 3): 1 of 290400 elements beyond the bound" in failures
    assert failures.endswith("4 comparisons failed\n")  # two layers in two layouts


def test_unwritten_output_fails(capsys, monkeypatch):
    right = ops.local_response_norm

    def wrong(input, *args, backend, **options):
        output = right(input, *args, **options, backend="reference")
        return output if backend == "reference" else output + torch.empty_like(input).detach()

    monkeypatch.setattr(ops, "local_response_norm", wrong)
    assert main(COMMAND) == 1
    assert "290400 of 290400 elements" in capsys.readouterr().out


def test_backend_that_cannot_run_here(capsys):
    assert main([*COMMAND, "--backend", "cuda"]) == 2
    assert "backend 'cuda', which cannot run here" in capsys.readouterr().out

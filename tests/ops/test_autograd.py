"""First and second derivatives against finite differences, and the rules around them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastconv import ops
from support.autograd import check_gradgradcheck, function_of_tensors
from support.cases import CASES, Case, run, tensors

SMALL = [case for case in CASES if case.small and 0 not in case.shapes["input"]]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case) -> None:
    arguments = case.arguments(torch.float64, seed=1, requires_grad=True)
    function = function_of_tensors(case, arguments)
    # check_batched_grad runs the backward under the vmap of old, which knows no lists of tensors
    batched = case.op != "pointwise_conv2d_group"
    torch.autograd.gradcheck(function, tensors(arguments), check_batched_grad=batched)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradgradcheck(case: Case) -> None:
    check_gradgradcheck(case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_each_gradient_alone(case: Case) -> None:
    """A frozen argument gets no gradient, and the others get the same one as with all of them."""
    arguments = case.arguments(requires_grad=True)
    inputs = tensors(arguments)
    everything = torch.autograd.grad(sum(output.square().sum() for output in run(case.op, arguments)), inputs)
    for chosen, expected in zip(inputs, everything, strict=True):
        for tensor in inputs:
            tensor.requires_grad_(tensor is chosen)
            tensor.grad = None
        sum(output.square().sum() for output in run(case.op, arguments)).backward()
        assert chosen.grad is not None
        torch.testing.assert_close(chosen.grad, expected)
        assert all(tensor.grad is None for tensor in inputs if tensor is not chosen)


def test_third_derivative() -> None:
    """The second derivative is made of differentiable ops, too."""
    x = torch.tensor([[[1.5, -0.5, 2.0]]], dtype=torch.float64).mT.requires_grad_()

    def value(backend: str) -> Tensor:
        y = ops.local_response_norm(x, 2, 0.9, 0.75, 2.0, backend=backend)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.square().sum(), x)
        return third

    torch.testing.assert_close(value("cpu"), value("reference"))


@pytest.mark.parametrize("case", [c for c in SMALL if c.name == "small"], ids=str)
def test_torch_func_and_forward_mode(case: Case) -> None:
    """Per-sample gradients and directional derivatives, as of aten's own ops."""
    arguments = case.arguments(torch.float64)
    values = tuple(tensors(arguments))
    positions = tuple(range(len(values)))

    def loss(*values: Tensor) -> Tensor:
        return sum(o.square().sum() for o in function_of_tensors(case, arguments)(*values))

    leaves = [value.clone().requires_grad_() for value in values]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, positions)(*values), expected)
    stacked = tuple(value.expand(3, *value.shape) for value in values)
    per_sample = torch.func.vmap(torch.func.grad(loss, positions))(*stacked)
    torch.testing.assert_close([g[2] for g in per_sample], list(expected))

    directions = tuple(torch.randn_like(value) for value in values)
    _, slope = torch.func.jvp(loss, values, directions)
    along = sum((g * d).sum() for g, d in zip(expected, directions, strict=True))
    torch.testing.assert_close(slope, along)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, d) for v, d in zip(values, directions, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(loss(*duals)).tangent, along)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_saves_no_more_than_eager(case: Case) -> None:
    """Bytes kept for the backward, against eager with its ReLU in place."""

    def saved(backend: str) -> int:
        arguments = case.arguments(requires_grad=True)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run(case.op, arguments, backend=backend)
        del outputs
        return sum(kept.values())

    assert saved("cpu") <= saved("reference")

"""First and second derivatives against finite differences, in float64, and the rules around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, run, tensors
from torch import Tensor

SMALL = [case for case in CASES if case.small and 0 not in case.shapes["input"]]


def function_of_tensors(case: Case, arguments: dict[str, Any]) -> Any:
    """The op as a function of its tensor arguments, in the order of `tensors`."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        rest = iter(values)

        def fill(value: Any) -> Any:
            if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
                return [fill(v) for v in value]
            return next(rest) if isinstance(value, Tensor) else value

        return tuple(run(case.op, {name: fill(value) for name, value in arguments.items()}))

    return function


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case) -> None:
    arguments = case.arguments(torch.float64, seed=1, requires_grad=True)
    function = function_of_tensors(case, arguments)
    # check_batched_grad runs the backward under the vmap of old, which knows no lists of tensors
    batched = case.op != "pointwise_conv2d_group"
    torch.autograd.gradcheck(function, tensors(arguments), check_batched_grad=batched)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradgradcheck(case: Case) -> None:
    arguments = case.arguments(torch.float64, seed=1, requires_grad=True)
    function = function_of_tensors(case, arguments)
    torch.autograd.gradgradcheck(function, tensors(arguments), fast_mode=True)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_each_gradient_alone(case: Case) -> None:
    """A frozen argument gets no gradient, and the others get the same one as with all of them."""
    arguments = case.arguments(requires_grad=True)
    inputs = tensors(arguments)
    everything = torch.autograd.grad(
        sum(output.square().sum() for output in run(case.op, arguments)), inputs
    )
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
    from fastconv import ops

    x = torch.tensor([[[1.5, -0.5, 2.0]]], dtype=torch.float64).mT.requires_grad_()

    def value(backend: str) -> Tensor:
        y = ops.local_response_norm(x, 2, 0.9, 0.75, 2.0, backend=backend)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.square().sum(), x)
        return third

    torch.testing.assert_close(value("cpu"), value("reference"))


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

"""The forward operators in plain aten, with the argument checks: the reference of the public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..operators import checks, convolution_operators, depthwise_separable, destinations
from ..operators import local_response_norm as lrn
from ..operators.activations import activate
from ..operators.convolution import POINTWISE, FusedConvolution
from ..operators.schemas import WITH_OUT

Operators = dict[str, Callable[..., Any]]
Convolve = Callable[[FusedConvolution], Tensor]


def of_convolutions(convolve: Convolve) -> Operators:
    """The operators that are made of convolutions, from what computes one whose arguments were checked."""

    def one(op: str) -> Callable[..., Tensor]:
        def operator(*args: Any) -> Tensor:
            conv = convolution_operators.read(op, args)
            checks.conv2d(op, conv)
            return convolve(conv)

        return operator

    def group(input: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str) -> list[Tensor]:
        checks.pointwise_group("pointwise_conv2d_group", input, weights, biases, activation)
        given: Sequence[Tensor | None] = biases or [None] * len(weights)
        return [
            convolve(FusedConvolution(input, weight, bias, None, POINTWISE, activation))
            for weight, bias in zip(weights, given, strict=True)
        ]

    def separable(*args: Any) -> Tensor:
        depthwise, pointwise = depthwise_separable.read("depthwise_separable_conv2d", args)
        return convolve(pointwise._replace(input=convolve(depthwise)))

    of_one = {op: one(op) for op in convolution_operators.NAMES}
    return {**of_one, "pointwise_conv2d_group": group, "depthwise_separable_conv2d": separable}


def add_relu(input: Tensor, other: Tensor, activation: str) -> Tensor:
    checks.elementwise("add_relu", input, "other", other, activation)
    return activate(input + other, activation)


def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float, activation: str) -> Tensor:
    checks.local_response_norm("local_response_norm", input, size, activation)
    return lrn.by_aten(input, size, alpha, beta, k, activation)


def with_out(operators: Operators) -> Operators:
    """With the overloads that take ``out``: the result is copied there."""

    def into_the_last(op: str) -> Callable[..., None]:
        def operator(*args: Any) -> None:
            *given, out = args
            destinations.store(op, operators[op](*given), given, out)

        return operator

    return {**operators, **{f"{op}.out": into_the_last(op) for op in WITH_OUT}}

"""Local response normalization across channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..aten_kernels import OPERATORS
from ..operators import arguments, autocast, checks
from ..operators.activations import activate, mask
from ..operators.local_response_norm import window_sum
from ..operators.registration import Operator, PublicOperator

_NAME = "local_response_norm"
_BACKWARD = f"{_NAME}_backward"


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.local_response_norm`` of ``activation(input)`` in one pass each way,
    with nothing saved but the input.

    b_c = a_c / (k + alpha / size * sum over j of a_j^2) ^ beta, where a is activation(input) and j
    runs over the `size` channels from c - size // 2 to c + (size - 1) // 2, as far as they exist.
    Differentiable twice.

    Args:
        input: [N, C, ...], at least 3 dimensions; float32, float64, bfloat16 or float16, in any
            memory layout.
        size: number of channels to sum over, at least 1; may be even, and larger than C.
        alpha: weight of the mean square. The paper's alpha is not divided by the size: pass
            ``alpha=size * paper``.
        beta: exponent.
        k: additive constant.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``. Between a convolution and its LRN the
            activation costs least here: the values are read anyway, and the convolution's backward
            needs no mask.
        backend: see :func:`fastconv.use_backend`.

    Returns:
        The shape, dtype and memory layout of `input`. 16-bit types are squared and summed in
        float32, so float16 does not overflow at 256; under autocast the result is float32, as
        eager's.

    Raises:
        RuntimeError: an argument does not fit; the message names what arrived and what was needed.

    Source: Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural
    Networks", section 3.3.
    """
    arguments.tensors(_NAME, input=input)
    checks.activation(_NAME, activation)
    size = arguments.count(_NAME, "size", size, checks.CHANNELS)
    alpha, beta = arguments.real(_NAME, "alpha", alpha), arguments.real(_NAME, "beta", beta)
    return _operator.run(backend, input, size, alpha, beta, arguments.real(_NAME, "k", k), activation)


def _fake(input: Tensor, size: int, alpha: float, beta: float, k: float, activation: str) -> Tensor:
    checks.local_response_norm(_NAME, input, size, activation)
    # What is contiguous, whatever else it may be, gets plain strides.
    layout = torch.contiguous_format if input.is_contiguous() else torch.preserve_format
    return torch.empty_like(input, memory_format=layout)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is not None:
        grad = _backward_operator(ctx.namespace, grad, *ctx.saved_tensors, *ctx.options)
    return grad, *[None] * 5


# ----------------------------------------------------------------------------------------- backward


def _fake_backward(
    grad_output: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float, activation: str
) -> Tensor:
    checks.local_response_norm(_BACKWARD, input, size, activation, grad_output)
    return torch.empty_like(input)


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, *ctx.options = inputs
    ctx.save_for_backward(grad_output, input)


def _double_backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    """Derivatives of  g d^-b - 2 a b x S'(g x d^-(b+1))  with  d = k + a S(x^2),  contracted with
    gg.

    S sums over the window of a channel, S' over the channels whose window holds it; a is alpha /
    size. Here x is the activation's output, whose mask lets gg in and the input's derivative out.
    """
    g, input = ctx.saved_tensors
    size, alpha, beta, k, activation = ctx.options
    x = activate(input, activation)
    gg = mask(gg, x, activation)
    a = alpha / size
    c = 2 * a * beta
    d = k + a * window_sum(x * x, size)
    p, q = d**-beta, d ** -(beta + 1)
    u = window_sum(g * x * q, size, adjoint=True)
    v = window_sum(gg * x, size)
    for_grad = gg * p - c * x * q * v
    for_d = c * (beta + 1) * g * x * v * q / d - beta * gg * g * q
    for_input = 2 * a * x * window_sum(for_d, size, adjoint=True) - c * (gg * u + g * q * v)
    return for_grad, mask(for_input, x, activation), *[None] * 5


_backward_operator = Operator(
    _BACKWARD,
    fake=_fake_backward,
    setup_context=_setup_double,
    backward=_double_backward,
    fold_batch=(0, 1),
)
_operator = PublicOperator(
    _NAME,
    reference=OPERATORS[_NAME],
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast.to_float32,
    fold_batch=(0,),
)

"""Addition + ReLU in one op: the end of a residual block whose convolution has been run already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..aten_kernels import OPERATORS
from ..operators import arguments, checks
from ..operators.registration import Operator, PublicOperator

_NAME = "add_relu"


def add_relu(input: Tensor, other: Tensor, *, activation: str = "relu", backend: str | None = None) -> Tensor:
    """``relu(input + other)`` in one pass; broadcasts and promotes dtypes as ``input + other``
    does: a tensor without dimensions gives way to one that has some, whichever is wider.

    The backward keeps the output alone, whose sign is the ReLU's mask. Differentiable twice.

    Args:
        input: any shape; float32, float64, bfloat16 or float16, in any memory layout.
        other: a shape that broadcasts with that of `input`, on the same device. One of the two may
            hold integers or bools.
        activation: ``"relu"``, ``"relu6"`` for min(max(v, 0), 6), or ``"none"`` for the sum alone.
        backend: see :func:`fastconv.use_backend`.

    Returns:
        The broadcast shape, in the promoted dtype.

    Raises:
        RuntimeError: an argument does not fit; the message names what arrived and what was needed.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", equation 1 with the ReLU
    after it.
    """
    checks.activation(_NAME, activation)
    arguments.summands(_NAME, input, other)
    if input.dtype != other.dtype or input.shape != other.shape:
        checks.storage(_NAME, "input", input)
        checks.storage(_NAME, "other", other)
        dtype = _promoted(input, other)  # before they are broadcast: it asks for their dimensions
        input, other = input.to(dtype), other.to(dtype)
        if _broadcast(input, other):
            input, other = torch.broadcast_tensors(input, other)
    return _operator.run(backend, input, other, activation)


def _promoted(input: Tensor, other: Tensor) -> torch.dtype:
    """torch.result_type, in a way that torch.compile follows."""
    if input.dtype == other.dtype:
        return input.dtype
    one, two = (torch.empty((1,) * min(t.dim(), 1), dtype=t.dtype, device="meta") for t in (input, other))
    return (one + two).dtype


def _broadcast(input: Tensor, other: Tensor) -> bool:
    pairs = zip(reversed(input.shape), reversed(other.shape), strict=False)
    return all(a == b or a == 1 or b == 1 for a, b in pairs)


def _fake(input: Tensor, other: Tensor, activation: str) -> Tensor:
    checks.elementwise(_NAME, input, "other", other, activation)
    return _new_sum(input, other)


def _new_sum(input: Tensor, other: Tensor) -> Tensor:
    """What ``input + other`` allocates for two tensors of one shape.

    torch's own fake kernels differ from the real ones where one operand is expanded. csrc/cuda/elementwise/add_relu.cpp
    has the same.
    """
    if input.is_contiguous() and other.is_contiguous():
        return torch.empty_like(input, memory_format=torch.contiguous_format)
    like = torch.empty_like(input)
    if input.stride() == other.stride() == like.stride():
        return like
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if input.dim() == dims and all(tensor.is_contiguous(memory_format=layout) for tensor in (input, other)):
            return torch.empty_like(input, memory_format=layout)
    order = list(reversed(range(input.dim())))  # from the innermost
    for i in range(1, len(order)):
        at = i
        for before in reversed(range(i)):
            found = _compare(input, other, order[before], order[at])
            if found > 0:
                order[before], order[at] = order[at], order[before]
                at = before
            elif found < 0:
                break
    order.reverse()
    return input.new_empty([input.shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])


def _compare(input: Tensor, other: Tensor, a: int, b: int) -> int:
    """1: dimension `a` belongs outside of `b`; -1: inside; 0: no operand tells."""
    for operand in (input, other):
        stride_a, stride_b = operand.stride(a), operand.stride(b)
        if stride_a == 0 or stride_b == 0:
            continue
        if stride_a != stride_b:
            return -1 if stride_a < stride_b else 1
        if input.shape[a] > input.shape[b]:
            return 1
    return 0


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    if ctx.activation != "none":
        ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is not None and ctx.activation != "none":
        (output,) = ctx.saved_tensors
        grad = add_relu_backward(ctx.namespace, grad, output, ctx.activation)
    return grad, grad, None


def _autocast_promote(function: Callable[..., Any], device: str, args: tuple[Any, ...]) -> Tensor:
    """As autocast leaves ``input + other``: in the wider of their dtypes."""
    input, other, activation = args
    dtype = torch.promote_types(input.dtype, other.dtype)
    return function(input.to(dtype), other.to(dtype), activation)


# ----------------------------------------------------------------------------------------- backward


def _fake_backward(grad_output: Tensor, output: Tensor, activation: str) -> Tensor:
    checks.elementwise("add_relu_backward", output, "grad_output", grad_output, activation)
    return torch.empty_like(output)


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, forward_output, ctx.activation = inputs
    ctx.save_for_backward(forward_output)


def _double_backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    """The mask is linear in the gradient, and constant in the output almost everywhere."""
    (output,) = ctx.saved_tensors
    return add_relu_backward(ctx.namespace, gg, output, ctx.activation), None, None


add_relu_backward = Operator(
    "add_relu_backward",
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
    autocast=_autocast_promote,
    fold_batch=(0, 1),
)

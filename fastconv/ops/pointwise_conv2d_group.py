"""Several 1x1 convolutions that share one input: the branches of an Inception module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..aten_kernels import OPERATORS
from ..operators import arguments, autocast, checks
from ..operators.activations import mask
from ..operators.conv2d_backward import LinearMaps, empty_gradient, fake_gradients, per_channel, total
from ..operators.convolution import POINTWISE
from ..operators.registration import Operator, OutOperator

_NAME = "pointwise_conv2d_group"
_BACKWARD = f"{_NAME}_backward"


def pointwise_conv2d_group(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activation: str = "none",
    backend: str | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """``[activation(conv2d(input, weight, bias)) for weight, bias in zip(weights, biases)]`` for
    1x1 filters.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16, in any memory
            layout.
        weights: one [K_i, C, 1, 1] for each branch, dtype and device of `input`.
        biases: [K_i] or None for each branch; or None for no bias at all.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``, the same for all branches.
        backend: see :func:`fastconv.use_backend`.
        out: one tensor for each branch, where its result goes, see :func:`conv2d_relu`.

    Returns:
        One [N, K_i, H, W] for each branch, as :func:`pointwise_conv2d` gives it; the tensors of
        `out`, if they were given.

    Raises:
        RuntimeError: an argument does not fit, or one requires grad beside `out`; the message names
            what arrived and what was needed.

    Source: Szegedy et al. 2015, "Going Deeper with Convolutions", figure 2b.
    """
    arguments.tensors(_NAME, input=input)
    checks.activation(_NAME, activation)
    weights = arguments.tensor_list(_NAME, "weights", weights)
    given = None if out is None else arguments.tensor_list(_NAME, "out", out)
    input, unbatch = arguments.batch(_NAME, input)
    destinations = (
        None
        if given is None
        else [arguments.batch_like(_NAME, unbatch, f"out[{i}]", tensor) for i, tensor in enumerate(given)]
    )
    found = _operator.run(backend, input, weights, _tensors(weights, biases), activation, out=destinations)
    return [unbatch(output) for output in found] if given is None else given


def _tensors(weights: list[Tensor], biases: Sequence[Tensor | None] | None) -> list[Tensor]:
    """The operator takes a bias for every branch or for none."""
    given = [] if biases is None else arguments.tensor_list(_NAME, "biases", biases, optional=True)
    checks.group(_NAME, weights, given)
    if all(bias is None for bias in given):
        return []
    for i, weight in enumerate(weights):
        checks.pointwise_weight(_NAME, f"weights[{i}]", weight)
    return [
        weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in zip(weights, given, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, weights, biases, ctx.activation = inputs
    ctx.branches, ctx.has_biases = len(weights), bool(biases)
    ctx.save_for_backward(input, *weights, *_for_the_mask(output, ctx.activation))


def _for_the_mask(outputs: list[Tensor], activation: str) -> list[Tensor]:
    return [] if activation == "none" else outputs


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    input, *rest = ctx.saved_tensors
    weights, outputs = rest[: ctx.branches], rest[ctx.branches :]
    # an entry of needs_input_grad is a list for a list of tensors
    wanted = [any(pytree.tree_leaves(needed)) for needed in ctx.needs_input_grad[:3]]
    found = _backward_operator(ctx.namespace, grads, outputs, input, weights, ctx.activation, wanted)
    nothing = (None, [None] * ctx.branches, [None] * ctx.branches if ctx.has_biases else [])
    passed_on = (g if want else none for g, none, want in zip(found, nothing, wanted, strict=True))
    return *passed_on, None


# ----------------------------------------------------------------------------------------- backward


def _fake_backward(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad_outputs, outputs, input, weights, activation, output_mask = args
    checks.pointwise_group_backward(_BACKWARD, *args[:-1])
    grad = torch.cat(grad_outputs if activation == "none" else outputs, 1)
    weight = torch.cat(weights)
    grad_input, *joined, _ = fake_gradients(grad, input, weight, POINTWISE)
    sizes = [weight.shape[0] for weight in weights]
    split = [
        [part.clone() for part in grad.split(sizes)] if wanted else [empty_gradient(input) for _ in sizes]
        for grad, wanted in zip(joined, output_mask[1:], strict=True)
    ]
    grad_weights, grad_biases = split
    if 0 in input.shape and output_mask[1]:
        grad_weights = [torch.empty_like(part) for part in weights]
    grad_input = grad_input if output_mask[0] else empty_gradient(input)
    return grad_input, grad_weights, grad_biases


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grads, outputs, input, weights, ctx.activation, ctx.output_mask = inputs
    ctx.branches = len(weights)
    ctx.save_for_backward(input, *grads, *weights, *outputs)


def _double_backward(ctx: Any, gg_input: Tensor, gg_weights: list[Tensor], gg_biases: list[Tensor]) -> tuple[Any, ...]:
    """The gradient of the gradients; each branch adds its own terms."""
    input, *rest = ctx.saved_tensors
    n = ctx.branches
    conv = LinearMaps(POINTWISE)
    want_input, want_weights, want_biases = ctx.output_mask
    for_grads, for_weights, for_input = [], [], []
    grads, weights, outputs = rest[:n], rest[n : 2 * n], rest[2 * n :]
    for grad_output, output, weight, gg_weight, gg_bias in zip(
        grads, outputs or [None] * n, weights, gg_weights, gg_biases, strict=True
    ):
        grad = mask(grad_output, output, ctx.activation)
        terms = total(
            [
                conv.fprop(gg_input, weight) if want_input else None,
                conv.fprop(input, gg_weight) if want_weights else None,
                per_channel(gg_bias).expand_as(grad) if want_biases else None,
            ]
        )
        for_grads.append(None if terms is None else mask(terms, output, ctx.activation))
        for_weights.append(conv.wgrad(grad, gg_input, weight) if want_input else None)
        for_input.append(conv.dgrad(grad, input, gg_weight) if want_weights else None)
    nothing = [None] * len(_for_the_mask(outputs, ctx.activation))
    return for_grads, nothing, total(for_input), for_weights, None, None


_backward_operator = Operator(
    _BACKWARD,
    fake=_fake_backward,
    setup_context=_setup_double,
    backward=_double_backward,
)
_operator = OutOperator(
    _NAME,
    reference=OPERATORS[_NAME],
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast.to_low_precision,
    fold_batch=(0,),
)

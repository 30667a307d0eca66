"""Depthwise convolution followed by a 1x1 convolution, in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..aten_kernels import OPERATORS
from ..operators import arguments, autocast, checks, depthwise_separable
from ..operators.activations import activate, mask
from ..operators.conv2d_backward import LinearMaps, fake_gradients, masked_like, per_channel, total, where_wanted
from ..operators.convolution import POINTWISE, Geometry, by_aten
from ..operators.registration import Operator, PublicOperator

_NAME = "depthwise_separable_conv2d"


def depthwise_separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: arguments.Size2 = 1,
    padding: arguments.Padding = 0,
    dilation: arguments.Size2 = 1,
    *,
    depthwise_activation: str = "none",
    pointwise_activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """A depthwise convolution and the 1x1 convolution that mixes its channels, each with bias and
    activation.

    The backward keeps neither the depthwise result nor its mask; it computes them again.
    Differentiable twice.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16, in any memory
            layout.
        depthwise_weight: [C * M, 1, R, S] with the channel multiplier M, dtype and device of
            `input`.
        pointwise_weight: [K, C * M, 1, 1], likewise.
        depthwise_bias: [C * M] or None.
        pointwise_bias: [K] or None.
        stride: of the depthwise convolution; int or (height, width), at least 1.
        padding: int or (height, width), at least 0; or ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: int or (height, width), at least 1.
        depthwise_activation: between the two; ``"none"``, ``"relu"`` or ``"relu6"``.
        pointwise_activation: after them, likewise.
        backend: see :func:`fastconv.use_backend`.

    Returns:
        [N, K, P, Q] with P = (H + 2 * padding - dilation * (R - 1) - 1) // stride + 1, Q likewise;
        the memory layout is that of two calls of ``torch.nn.functional.conv2d``.

    Raises:
        RuntimeError: an argument does not fit; the message names what arrived and what was needed.

    Source: Chollet 2017, "Xception: Deep Learning with Depthwise Separable Convolutions"; Howard et
    al. 2017, "MobileNets", section 3.1.
    """
    arguments.tensors(_NAME, input=input, depthwise_weight=depthwise_weight, pointwise_weight=pointwise_weight)
    arguments.optional_tensors(_NAME, depthwise_bias=depthwise_bias, pointwise_bias=pointwise_bias)
    checks.activation(_NAME, depthwise_activation)
    checks.activation(_NAME, pointwise_activation)
    input, unbatch, stride, padding, dilation = arguments.geometry(
        _NAME, input, depthwise_weight, stride, padding, dilation
    )
    found = unbatch(
        _operator.run(
            backend,
            input,
            depthwise_weight,
            pointwise_weight,
            depthwise_bias,
            pointwise_bias,
            stride,
            padding,
            dilation,
            depthwise_activation,
            pointwise_activation,
        )
    )
    # What lies between two calls for [C, H, W] has no batch, hence no layout that the second could take over.
    if unbatch is not arguments.as_it_is and suggest_memory_format(pointwise_weight) != torch.channels_last:
        return found.contiguous()
    return found


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (
        input,
        depthwise_weight,
        pointwise_weight,
        depthwise_bias,
        _,
        *ctx.geometry,
        ctx.depthwise_activation,
        ctx.pointwise_activation,
    ) = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        None if ctx.pointwise_activation == "none" else output,
        input,
        depthwise_weight,
        pointwise_weight,
        depthwise_bias,
    )


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:5])
    if grad is None or not any(wanted):
        return (None,) * 10
    found = _backward_operator(
        ctx.namespace,
        grad,
        *ctx.saved_tensors,
        *ctx.geometry,
        ctx.depthwise_activation,
        ctx.pointwise_activation,
        wanted,
    )
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), *[None] * 5


# ----------------------------------------------------------------------------------------- backward


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    grad_output, output, depthwise, pointwise, output_mask = depthwise_separable.read_backward(args)
    hidden = by_aten(depthwise._replace(activation="none"))
    grad = masked_like(grad_output, output)
    grad_hidden, grad_pointwise, grad_pointwise_bias, _ = fake_gradients(grad, hidden, pointwise.weight, POINTWISE)
    if depthwise.activation != "none":
        grad_hidden = torch.empty_like(hidden)
    grad_input, grad_depthwise, grad_depthwise_bias, _ = fake_gradients(
        grad_hidden, depthwise.input, depthwise.weight, depthwise.geometry
    )
    found = (grad_input, grad_depthwise, grad_pointwise, grad_depthwise_bias, grad_pointwise_bias)
    return where_wanted(found, output_mask, depthwise.input)


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, stride, padding, dilation, _, _, ctx.output_mask = inputs
    ctx.activations = inputs[-3:-1]
    ctx.depthwise = LinearMaps(Geometry(stride, padding, dilation, tensors[2].shape[1]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *ggs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradient of the five gradients.

    With h = act(D x + b) and y = act(P h): every gradient is a product of linear maps of the masked
    gradients of y and h, written z and t here; each map's adjoint carries the incoming second
    gradients (gg) back.
    """
    grad_output, output, input, depthwise_weight, pointwise_weight, depthwise_bias = ctx.saved_tensors
    inner, outer = ctx.activations
    gg_input, gg_depthwise, gg_pointwise, gg_depthwise_bias, gg_pointwise_bias = (
        gg if wanted else None for gg, wanted in zip(ggs, ctx.output_mask, strict=True)
    )
    dw, pw = ctx.depthwise, LinearMaps(POINTWISE)

    hidden = dw.fprop(input, depthwise_weight)
    if depthwise_bias is not None:
        hidden = hidden + per_channel(depthwise_bias)
    hidden = activate(hidden, inner)
    z = mask(grad_output, output, outer)
    t = mask(pw.dgrad(z, hidden, pointwise_weight), hidden, inner)

    for_t = total(
        [
            None if gg_input is None else dw.fprop(gg_input, depthwise_weight),
            None if gg_depthwise is None else dw.fprop(input, gg_depthwise),
            None if gg_depthwise_bias is None else per_channel(gg_depthwise_bias).expand_as(t),
        ]
    )
    masked = None if for_t is None else mask(for_t, hidden, inner)
    # gg_pointwise also meets the recomputed h, and through it input, depthwise weight and bias
    for_hidden = None if gg_pointwise is None else mask(pw.dgrad(z, hidden, gg_pointwise), hidden, inner)
    for_z = total(
        [
            None if masked is None else pw.fprop(masked, pointwise_weight),
            None if gg_pointwise is None else pw.fprop(hidden, gg_pointwise),
            None if gg_pointwise_bias is None else per_channel(gg_pointwise_bias).expand_as(z),
        ]
    )
    for_input = total(
        [
            None if gg_depthwise is None else dw.dgrad(t, input, gg_depthwise),
            None if for_hidden is None else dw.dgrad(for_hidden, input, depthwise_weight),
        ]
    )
    for_depthwise = total(
        [
            None if gg_input is None else dw.wgrad(t, gg_input, depthwise_weight),
            None if for_hidden is None else dw.wgrad(for_hidden, input, depthwise_weight),
        ]
    )
    return (
        None if for_z is None else mask(for_z, output, outer),
        None,
        for_input,
        for_depthwise,
        None if masked is None else pw.wgrad(z, masked, pointwise_weight),
        None if for_hidden is None or depthwise_bias is None else for_hidden.sum((0, 2, 3)),
        *[None] * 6,
    )


_backward_operator = Operator(
    "depthwise_separable_conv2d_backward",
    fake=_fake_backward,
    setup_context=_setup_double,
    backward=_double_backward,
)
_operator = PublicOperator(
    _NAME,
    reference=OPERATORS[_NAME],
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast.to_low_precision,
    fold_batch=(0,),
)

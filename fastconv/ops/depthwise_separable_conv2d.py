"""Depthwise convolution followed by a 1x1 convolution, in one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..operators import checks, convolution
from ..operators.registration import Operator, PublicOperator, autocast_to_low_precision

_NAME = "depthwise_separable_conv2d"


def depthwise_separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: convolution.Size2 = 1,
    padding: convolution.Padding = 0,
    dilation: convolution.Size2 = 1,
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
    checks.tensors(_NAME, input=input, depthwise_weight=depthwise_weight, pointwise_weight=pointwise_weight)
    checks.optional_tensors(_NAME, depthwise_bias=depthwise_bias, pointwise_bias=pointwise_bias)
    checks.activation(_NAME, depthwise_activation)
    checks.activation(_NAME, pointwise_activation)
    input, unbatch, stride, padding, dilation = convolution.geometry(
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
    if unbatch is not convolution.as_it_is and suggest_memory_format(pointwise_weight) != torch.channels_last:
        return found.contiguous()
    return found


def _reference(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    depthwise_activation: str,
    pointwise_activation: str,
) -> Tensor:
    checks.activation(_NAME, depthwise_activation)
    checks.activation(_NAME, pointwise_activation)
    groups = checks.depthwise_weight(_NAME, "depthwise_weight", input, depthwise_weight)
    checks.pointwise_weight(_NAME, "pointwise_weight", pointwise_weight)
    geometry = (stride, padding, dilation, groups)
    checks.conv2d(_NAME, input, depthwise_weight, depthwise_bias, None, *geometry, checks.OF_DEPTHWISE)
    hidden = convolution.activate(F.conv2d(input, depthwise_weight, depthwise_bias, *geometry), depthwise_activation)
    pointwise = ([1, 1], [0, 0], [1, 1], 1)
    checks.conv2d(_NAME, hidden, pointwise_weight, pointwise_bias, None, *pointwise, checks.OF_POINTWISE)
    return convolution.activate(F.conv2d(hidden, pointwise_weight, pointwise_bias), pointwise_activation)


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


def _fake_backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    depthwise_activation: str,
    pointwise_activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    checks.activation("depthwise_separable_conv2d_backward", depthwise_activation)
    checks.activation("depthwise_separable_conv2d_backward", pointwise_activation)
    depthwise = (stride, padding, dilation, input.shape[1])
    hidden = F.conv2d(input, depthwise_weight, depthwise_bias, *depthwise)
    grad = convolution.masked_like(grad_output, output)
    grad_hidden, grad_pointwise, grad_pointwise_bias, _ = convolution.fake_gradients(
        grad, hidden, pointwise_weight, [1, 1], [0, 0], [1, 1], 1
    )
    if depthwise_activation != "none":
        grad_hidden = torch.empty_like(hidden)
    grad_input, grad_depthwise, grad_depthwise_bias, _ = convolution.fake_gradients(
        grad_hidden, input, depthwise_weight, *depthwise
    )
    found = (
        grad_input,
        grad_depthwise,
        grad_pointwise,
        grad_depthwise_bias,
        grad_pointwise_bias,
    )
    return convolution.where_wanted(found, output_mask, input)


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, stride, padding, dilation, _, _, ctx.output_mask = inputs
    ctx.activations = inputs[-3:-1]
    ctx.depthwise = convolution.Convolution(stride, padding, dilation, tensors[2].shape[1])
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
    dw, pw = ctx.depthwise, convolution.Convolution([1, 1], [0, 0], [1, 1], 1)

    hidden = dw.fprop(input, depthwise_weight)
    if depthwise_bias is not None:
        hidden = hidden + convolution.per_channel(depthwise_bias)
    hidden = convolution.activate(hidden, inner)
    z = convolution.mask(grad_output, output, outer)
    t = convolution.mask(pw.dgrad(z, hidden, pointwise_weight), hidden, inner)

    for_t = convolution.total(
        [
            None if gg_input is None else dw.fprop(gg_input, depthwise_weight),
            None if gg_depthwise is None else dw.fprop(input, gg_depthwise),
            None if gg_depthwise_bias is None else convolution.per_channel(gg_depthwise_bias).expand_as(t),
        ]
    )
    masked = None if for_t is None else convolution.mask(for_t, hidden, inner)
    # gg_pointwise also meets the recomputed h, and through it input, depthwise weight and bias
    for_hidden = None if gg_pointwise is None else convolution.mask(pw.dgrad(z, hidden, gg_pointwise), hidden, inner)
    for_z = convolution.total(
        [
            None if masked is None else pw.fprop(masked, pointwise_weight),
            None if gg_pointwise is None else pw.fprop(hidden, gg_pointwise),
            None if gg_pointwise_bias is None else convolution.per_channel(gg_pointwise_bias).expand_as(z),
        ]
    )
    for_input = convolution.total(
        [
            None if gg_depthwise is None else dw.dgrad(t, input, gg_depthwise),
            None if for_hidden is None else dw.dgrad(for_hidden, input, depthwise_weight),
        ]
    )
    for_depthwise = convolution.total(
        [
            None if gg_input is None else dw.wgrad(t, gg_input, depthwise_weight),
            None if for_hidden is None else dw.wgrad(for_hidden, input, depthwise_weight),
        ]
    )
    return (
        None if for_z is None else convolution.mask(for_z, output, outer),
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
    reference=_reference,
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast_to_low_precision,
    fold_batch=(0,),
)

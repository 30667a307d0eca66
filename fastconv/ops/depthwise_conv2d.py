"""Depthwise convolution + bias + activation in one op."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..operators import checks, convolution
from ..operators.registration import PublicOperator, autocast_to_low_precision

_NAME = "depthwise_conv2d"


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: convolution.Size2 = 1,
    padding: convolution.Padding = 0,
    dilation: convolution.Size2 = 1,
    *,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """``activation(conv2d(input, weight, bias, groups=C))``: every channel has filters of its own.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16, in any memory
            layout.
        weight: [C * M, 1, R, S] with the channel multiplier M, dtype and device of `input`. Filters
            c * M to c * M + M - 1 read channel c.
        bias: [C * M] or None.
        stride: int or (height, width), at least 1.
        padding: int or (height, width), at least 0; or ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: int or (height, width), at least 1.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        backend: see :func:`fastconv.use_backend`.

    Returns:
        [N, C * M, P, Q] with P = (H + 2 * padding - dilation * (R - 1) - 1) // stride + 1, Q
        likewise; the memory layout is that of ``torch.nn.functional.conv2d``. 16-bit types are
        accumulated in float32.

    Raises:
        RuntimeError: an argument does not fit; the message names what arrived and what was needed.

    Source: Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile
    Vision Applications", equation 3; Chollet 2017, "Xception" (channel multiplier 1).
    """
    checks.tensors(_NAME, input=input, weight=weight)
    checks.optional_tensors(_NAME, bias=bias)
    checks.activation(_NAME, activation)
    input, unbatch, stride, padding, dilation = convolution.geometry(_NAME, input, weight, stride, padding, dilation)
    return unbatch(_operator.run(backend, input, weight, bias, stride, padding, dilation, activation))


def _reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
) -> Tensor:
    checks.activation(_NAME, activation)
    groups = checks.depthwise_weight(_NAME, "weight", input, weight)
    checks.conv2d(_NAME, input, weight, bias, None, stride, padding, dilation, groups)
    return convolution.activate(F.conv2d(input, weight, bias, stride, padding, dilation, groups), activation)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *geometry, activation = inputs
    ctx.geometry = (*geometry, input.shape[1])
    convolution.save_for_backward(ctx, activation, output, input, weight)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    found = convolution.gradients(ctx, grad, ctx.geometry, (*ctx.needs_input_grad[:3], False))
    return *found[:3], *[None] * 4


_operator = PublicOperator(
    _NAME,
    reference=_reference,
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast_to_low_precision,
    fold_batch=(0,),
)

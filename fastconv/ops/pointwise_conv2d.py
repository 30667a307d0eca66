"""1x1 convolution with bias, residual and activation in one op: the bottleneck's."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..operators import checks, convolution
from ..operators.registration import OutOperator

_NAME = "pointwise_conv2d"
_RESIDUAL = 3


def pointwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: convolution.Size2 = 1,
    *,
    activation: str = "none",
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``activation(conv2d(input, weight, bias) + residual)`` with a 1x1 filter: a matrix product
    over pixels.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16, in any memory
            layout.
        weight: [K, C, 1, 1], dtype and device of `input`.
        bias: [K] or None.
        residual: the shape of the result, dtype and device of `input`, or None; it is not
            broadcast.
        stride: int or (height, width), at least 1.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        backend: see :func:`fastconv.use_backend`.
        out: where the result goes, see :func:`conv2d_relu`.

    Returns:
        [N, K, P, Q] with P = (H - 1) // stride + 1, Q likewise; the memory layout is that of
        ``torch.nn.functional.conv2d``. 16-bit types are accumulated in float32 and rounded once.
        `out` itself, if it was given.

    Raises:
        RuntimeError: an argument does not fit, or one requires grad beside `out`; the message names
            what arrived and what was needed.

    Source: Lin et al. 2013, "Network In Network"; He et al. 2016, "Deep Residual Learning for Image
    Recognition", figure 5 (bottleneck).
    """
    checks.tensors(_NAME, input=input, weight=weight)
    checks.optional_tensors(_NAME, bias=bias, residual=residual, out=out)
    checks.activation(_NAME, activation)
    input, unbatch = convolution.batch(_NAME, input)
    stride = convolution.within(input, checks.pair(_NAME, "stride", stride, 1), [0, 0])
    added, destination = (
        convolution.batch_like(_NAME, unbatch, "residual", residual),
        convolution.batch_like(_NAME, unbatch, "out", out),
    )
    found = _operator.run(backend, input, weight, bias, added, stride, activation, out=destination)
    return unbatch(found) if out is None else out


def _reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    activation: str,
) -> Tensor:
    checks.activation(_NAME, activation)
    checks.pointwise_weight(_NAME, "weight", weight)
    checks.conv2d(_NAME, input, weight, bias, residual, stride, [0, 0], [1, 1], 1)
    output = _convolve(input, weight, bias, residual, stride, activation)
    if residual is not None:
        output = convolution.with_plain_strides(output + residual)
    return convolution.activate(output, activation)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    activation: str,
) -> Tensor:
    return F.conv2d(input, weight, bias, stride)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, _, ctx.stride, activation = inputs
    convolution.save_for_backward(ctx, activation, output, input, weight)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    geometry = (ctx.stride, [0, 0], [1, 1], 1)
    return *convolution.gradients(ctx, grad, geometry, ctx.needs_input_grad[:4]), None, None


_operator = OutOperator(
    _NAME,
    reference=_reference,
    setup_context=_setup_context,
    backward=_backward,
    autocast=convolution.autocast_with_residual(_RESIDUAL, _convolve),
    fold_batch=(0, _RESIDUAL),
)

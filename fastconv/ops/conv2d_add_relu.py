"""Convolution + bias + residual + ReLU in one op: the end of a residual block."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..operators import checks, convolution
from ..operators.registration import OutOperator

_NAME = "conv2d_add_relu"
_RESIDUAL = 3


def conv2d_add_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: convolution.Size2 = 1,
    padding: convolution.Padding = 0,
    dilation: convolution.Size2 = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``relu(conv2d(input, weight, bias) + residual)``: the residual is added in the convolution's
    epilogue.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16, in any memory
            layout.
        weight: [K, C / groups, R, S], dtype and device of `input`.
        bias: [K] or None.
        residual: the shape of the result, dtype and device of `input`; it is not broadcast.
        stride, padding, dilation, groups: as for :func:`conv2d_relu`.
        activation: ``"relu"``, ``"relu6"``, or ``"none"`` for the sum alone.
        backend: see :func:`fastconv.use_backend`.
        out: where the result goes, see :func:`conv2d_relu`.

    Returns:
        [N, K, P, Q] as for :func:`conv2d_relu`. In 16-bit types the sum is rounded once, where
        eager rounds the convolution and then the sum. `out` itself, if it was given.

    Raises:
        RuntimeError: an argument does not fit, or one requires grad beside `out`; the message names
            what arrived and what was needed.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", equation 1 with the ReLU
    after it.
    """
    checks.tensors(_NAME, input=input, weight=weight, residual=residual)
    checks.optional_tensors(_NAME, bias=bias, out=out)
    checks.activation(_NAME, activation)
    groups = checks.count(_NAME, "groups", groups, checks.DENSE)
    input, unbatch, stride, padding, dilation = convolution.geometry(_NAME, input, weight, stride, padding, dilation)
    added, destination = (
        convolution.batch_like(_NAME, unbatch, "residual", residual),
        convolution.batch_like(_NAME, unbatch, "out", out),
    )
    found = _operator.run(
        backend, input, weight, bias, added, stride, padding, dilation, groups, activation, out=destination
    )
    return unbatch(found) if out is None else out


def _reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    checks.activation(_NAME, activation)
    checks.conv2d(_NAME, input, weight, bias, residual, stride, padding, dilation, groups)
    output = _convolve(input, weight, bias, residual, stride, padding, dilation, groups, activation)
    return convolution.activate(convolution.with_plain_strides(output + residual), activation)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, _, *ctx.geometry, activation = inputs
    convolution.save_for_backward(ctx, activation, output, input, weight)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    found = convolution.gradients(ctx, grad, ctx.geometry, ctx.needs_input_grad[:4])
    return *found, *[None] * 5


_operator = OutOperator(
    _NAME,
    reference=_reference,
    setup_context=_setup_context,
    backward=_backward,
    autocast=convolution.autocast_with_residual(_RESIDUAL, _convolve),
    fold_batch=(0, _RESIDUAL),
)

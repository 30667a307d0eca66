"""What the convolution ops share: choosing the kernel, and `conv2d_backward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import activations, checks, convolution_operators, destinations
from ..operators import conv2d_backward as operator
from ..operators.conv2d_backward import empty_gradient
from ..operators.convolution import FusedConvolution, by_aten
from . import conv2d_dgrad, conv2d_fprop, conv2d_wgrad, depthwise, launch
from ._reduce import mask_and_sum
from .operands import form, image


def is_depthwise(conv: FusedConvolution) -> bool:
    return conv.weight.shape[1] == 1 and conv.geometry.groups == conv.input.shape[1] > 1


def forward(op: str, args: tuple[Any, ...], out: Tensor | None = None) -> Tensor:
    """An operator of `fastconv.operators.convolution_operators`; into `out`, if there is one."""
    conv = convolution_operators.read(op, args)
    shape = checks.conv2d(op, conv)
    if out is not None:
        destinations.check(op, "out", out, shape, conv.input, conv[:4])
    return convolve(conv, out)


def convolve(conv: FusedConvolution, out: Tensor | None = None) -> Tensor:
    """The convolution after the checks; float64 by aten.

    `out` may be a slice of the channels of a wider tensor, which is then written in place; the input may be one, too.
    """
    input, weight, bias, residual, geometry, activation = conv
    if input.dtype == torch.float64:
        found = by_aten(conv)
        return found if out is None else out.copy_(found)
    plain = residual is not None or activation == "relu"
    output = launch.new_output(input, weight, geometry, plain) if out is None else out
    fprop = depthwise.fprop if is_depthwise(conv) else conv2d_fprop.fprop
    fprop(conv._replace(bias=None if bias is None else bias.contiguous()), output)
    return output


def gradients(grad: Tensor, conv: FusedConvolution, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight from that before the activation; [0]-sized where not wanted."""
    input, weight, geometry = conv.input, conv.weight, conv.geometry
    grad_input = grad_weight = empty_gradient(input)
    if input.numel() == 0:  # in eager's layout, which is another one then
        return (
            torch.zeros_like(input) if wanted[0] else grad_input,
            torch.zeros_like(weight) if wanted[1] else grad_weight,
        )
    by_channel = is_depthwise(conv)
    layout = launch.convolution_layout(input, weight, geometry)
    if not by_channel and wanted[0] and wanted[1]:  # what would be copied is so once
        grad = image(form(grad), geometry.groups).of(grad)
    if wanted[0]:
        grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=layout)
        dgrad = depthwise.dgrad if by_channel else conv2d_dgrad.dgrad
        dgrad(grad, weight, grad_input, geometry)
    if wanted[1]:
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device, memory_format=layout)
        if grad.numel():
            wgrad = depthwise.wgrad if by_channel else conv2d_wgrad.wgrad
            wgrad(grad, input, grad_weight, geometry)
        else:
            grad_weight.zero_()
    return grad_input, grad_weight


def before_activation(
    grad_output: Tensor, output: Tensor | None, activation: str, *, want_bias: bool, want_masked: bool
) -> tuple[Tensor, Tensor]:
    """(gradient before the activation, gradient of the bias) in one pass; what is not wanted is left out of it.

    Without an activation the first is grad_output itself.
    """
    grad, mask = grad_output, None if activation == "none" else output
    if mask is not None and want_masked:
        grad = torch.empty_like(mask)
    bias = grad_output.new_empty(grad_output.shape[1] if want_bias else 0)
    mask_and_sum(grad_output, mask, activation, bias if want_bias else None, None if grad is grad_output else grad)
    return grad, bias


def conv2d_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias and residual of the four convolution ops.

    float16, bfloat16 and float32; float64 by the aten composition. The same bits every time: where pixels are split
    among programs, each writes a partial sum of its own.
    """
    given = operator.read(args)
    operator.check(given)
    return backward(*given)


def backward(
    grad_output: Tensor, output: Tensor | None, conv: FusedConvolution, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`conv2d_backward` after the checks."""
    empty = empty_gradient(conv.input)
    if conv.input.dtype == torch.float64:
        grad = activations.mask(grad_output, output, conv.activation)
        found = operator.by_aten(grad, conv.input, conv.weight, conv.geometry, wanted[:3])
        masked = grad.clone() if output is None else launch.with_strides_of(torch.empty_like(output), grad)
        first, second, third, fourth = (g if want else empty for g, want in zip((*found, masked), wanted, strict=True))
        return first, second, third, fourth
    want_masked = wanted[0] or wanted[1] or wanted[3]
    grad, grad_bias = before_activation(
        grad_output, output, conv.activation, want_bias=wanted[2], want_masked=want_masked
    )
    grad_input, grad_weight = gradients(grad, conv, wanted[:2])
    # an operator's results share no memory with its arguments
    grad_residual = (grad.clone() if conv.activation == "none" else grad) if wanted[3] else empty
    return grad_input, grad_weight, grad_bias, grad_residual

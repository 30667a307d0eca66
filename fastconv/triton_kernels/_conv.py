"""What the convolution ops share: choosing the kernel, and `conv2d_backward`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import checks, convolution
from . import _depthwise, _implicit_gemm, launch
from ._reduce import mask_and_sum

aten = torch.ops.aten

Geometry = tuple[list[int], list[int], list[int], int]
POINTWISE: Geometry = ([1, 1], [0, 0], [1, 1], 1)


def is_depthwise(input: Tensor, weight: Tensor, groups: int) -> bool:
    return weight.shape[1] == 1 and groups == input.shape[1] > 1


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
    out: Tensor | None = None,
) -> Tensor:
    """activation(conv2d(input, weight) + bias + residual), after the checks; float64 by aten.

    `out` may be a slice of the channels of a wider tensor, which is then written in place; `input` may be one, too.
    """
    if input.dtype == torch.float64:
        found = aten.convolution(input, weight, bias, *geometry[:3], False, [0, 0], geometry[3])
        found = convolution.activate(found if residual is None else found + residual, activation)
        return found if out is None else out.copy_(found)
    plain = residual is not None or activation == "relu"
    output = launch.new_output(input, weight, geometry, plain) if out is None else out
    kernel = _depthwise if is_depthwise(input, weight, geometry[3]) else _implicit_gemm
    bias = None if bias is None else bias.contiguous()
    kernel.fprop(input, weight, bias, residual, output, geometry, activation)
    return output


def gradients(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight from that before the activation; [0]-sized where not wanted."""
    grad_input = grad_weight = convolution.empty_gradient(input)
    if input.numel() == 0:  # in eager's layout, which is another one then
        return (
            torch.zeros_like(input) if wanted[0] else grad_input,
            torch.zeros_like(weight) if wanted[1] else grad_weight,
        )
    kernel = _depthwise if is_depthwise(input, weight, geometry[3]) else _implicit_gemm
    layout = launch.convolution_layout(input, weight, geometry)
    if wanted[0]:
        grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=layout)
        kernel.dgrad(grad, weight, grad_input, geometry)
    if wanted[1]:
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device, memory_format=layout)
        if grad.numel():
            kernel.wgrad(grad, input, grad_weight, geometry)
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


def conv2d_backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias and residual of the four convolution ops.

    float16, bfloat16 and float32; float64 by the aten composition. The same bits every time: where pixels are split
    among programs, each writes a partial sum of its own.
    """
    op = "conv2d_backward"
    geometry: Geometry = (stride, padding, dilation, groups)
    checks.conv2d(op, input, weight, None, grad_output, *geometry, ("weight", "bias", "grad_output"))
    checks.activation(op, activation)
    needs_output(op, output, activation)
    empty = convolution.empty_gradient(input)
    if input.dtype == torch.float64:
        grad = convolution.mask(grad_output, output, activation)
        found = aten.convolution_backward(
            grad, input, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, output_mask[:3]
        )
        found = [*found, grad.clone() if output is None else launch.with_strides_of(torch.empty_like(output), grad)]
        first, second, third, fourth = (g if want else empty for g, want in zip(found, output_mask, strict=True))
        return first, second, third, fourth
    want_masked = output_mask[0] or output_mask[1] or output_mask[3]
    grad, grad_bias = before_activation(
        grad_output, output, activation, want_bias=output_mask[2], want_masked=want_masked
    )
    grad_input, grad_weight = gradients(grad, input, weight, geometry, output_mask[:2])
    # an operator's results share no memory with its arguments
    grad_residual = (grad.clone() if activation == "none" else grad) if output_mask[3] else empty
    return grad_input, grad_weight, grad_bias, grad_residual


def needs_output(op: str, output: Tensor | None, activation: str) -> None:
    if output is None and activation != "none":
        checks.fail(op, "no output", "it for the activation's mask", "pass the forward's output")

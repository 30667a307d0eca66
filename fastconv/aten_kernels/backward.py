"""The backward operators in plain aten: what eager's autograd would run, from what the operators are given.

Gradients outside of an output mask are empty tensors, and no result shares memory with an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import checks, conv2d_backward, depthwise_separable
from ..operators import local_response_norm as lrn
from ..operators.activations import activate, mask
from ..operators.conv2d_backward import empty_gradient, total, where_wanted
from ..operators.convolution import POINTWISE, FusedConvolution, by_aten

aten = torch.ops.aten


def _convolution(
    grad_output: Tensor, output: Tensor | None, conv: FusedConvolution, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias and residual."""
    grad = _before_activation(grad_output, output, conv.activation)
    found: Sequence[Any] = (None, None, None)
    if any(wanted[:3]):
        found = conv2d_backward.by_aten(grad, conv.input, conv.weight, conv.geometry, wanted[:3])
    residual = grad.clone() if wanted[3] and grad is grad_output else grad
    first, second, third, fourth = where_wanted((*found, residual), wanted, conv.input)
    return first, second, third, fourth


def _before_activation(grad: Tensor, output: Tensor | None, activation: str) -> Tensor:
    """`mask`, laid out as the output is, whatever the layout of the gradient."""
    if output is None or activation == "none":
        return grad
    masked = torch.empty_like(output)
    if activation == "relu":
        return aten.threshold_backward.grad_input(grad, output, 0, grad_input=masked)
    return aten.hardtanh_backward.grad_input(grad, output, 0, 6, grad_input=masked)


def _conv2d_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _convolution(*conv2d_backward.read(args))


def _pointwise_conv2d_group_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    input: Tensor,
    weights: list[Tensor],
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    masks: Sequence[Tensor | None] = outputs or [None] * len(weights)
    branches = [
        _convolution(
            *(grad, output, FusedConvolution(input, weight, None, None, POINTWISE, activation)), [*output_mask, False]
        )
        for grad, output, weight in zip(grad_outputs, masks, weights, strict=True)
    ]
    inputs, of_weights, of_biases, _ = zip(*branches, strict=True)
    grad_input = total(inputs) if output_mask[0] else None
    return empty_gradient(input) if grad_input is None else grad_input, list(of_weights), list(of_biases)


def _depthwise_separable_conv2d_backward(*args: Any) -> tuple[Tensor, ...]:
    """The hidden result is computed again."""
    grad_output, output, depthwise, pointwise, wanted = depthwise_separable.read_backward(args)
    of_depthwise = [wanted[0], wanted[1], wanted[3], False]
    hidden = by_aten(depthwise)
    grad_hidden, grad_pointwise, grad_pointwise_bias, _ = _convolution(
        grad_output, output, pointwise._replace(input=hidden), [any(of_depthwise), wanted[2], wanted[4], False]
    )
    if any(of_depthwise):
        grad_input, grad_depthwise, grad_depthwise_bias, _ = _convolution(grad_hidden, hidden, depthwise, of_depthwise)
    else:
        grad_input, grad_depthwise, grad_depthwise_bias = (empty_gradient(hidden) for _ in range(3))
    return grad_input, grad_depthwise, grad_pointwise, grad_depthwise_bias, grad_pointwise_bias


def _add_relu_backward(grad_output: Tensor, output: Tensor, activation: str) -> Tensor:
    checks.elementwise("add_relu_backward", output, "grad_output", grad_output, activation)
    if activation == "none":
        return torch.empty_like(output).copy_(grad_output)
    return _before_activation(grad_output, output, activation)


def _local_response_norm_backward(
    grad_output: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float, activation: str
) -> Tensor:
    """g d^-b - 2 a b x S'(g x d^-(b+1))  with  d = k + a S(x^2): see `fastconv.ops.local_response_norm`, whose
    derivative has the same letters.

    The closed form: autograd does not record what runs below it. 16-bit types are computed in float32.
    """
    x = lrn.at_least_32_bits(activate(input, activation))
    g = lrn.at_least_32_bits(grad_output)
    a = alpha / size
    d = lrn.window_sum(x * x, size).mul_(a).add_(k)
    p = d**-beta
    through_window = lrn.window_sum(x * (p / d) * g, size, adjoint=True)
    found = mask(torch.addcmul(p * g, x, through_window, value=-2 * a * beta), x, activation)
    as_input = torch.empty_like(input)
    is_already = (found.dtype, found.stride()) == (as_input.dtype, as_input.stride())
    return found if is_already else as_input.copy_(found)


OPERATORS: dict[str, Callable[..., Any]] = {
    "conv2d_backward": _conv2d_backward,
    "pointwise_conv2d_group_backward": _pointwise_conv2d_group_backward,
    "depthwise_separable_conv2d_backward": _depthwise_separable_conv2d_backward,
    "add_relu_backward": _add_relu_backward,
    "local_response_norm_backward": _local_response_norm_backward,
}

"""activation(bn(convolution) + residual) as one op, on weights that are read when it is called."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...operators import auto, backends
from .addition import add_activation
from .call import Call, OperatorCall


class FusedConv(Call):
    """activation(bn(conv(input)) + residual) as one op.

    Args:
        conv, bn, activation, has_residual: what to compute; `bn`, if any, is in evaluation mode and folded into
            the weights.
        pool: a max pool to apply to the result.
    """

    __name__ = "fused_conv"

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None = None,
        activation: str = "none",
        has_residual: bool = False,
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.conv = conv
        self.bn = bn
        self.activation = activation
        self.has_residual = has_residual
        self.pool = pool

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.unprepared(input, residual)

    def unprepared(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """On the modules' own weights, as they are now."""
        return self.pooled(self.compute(input, *self.weights(), residual))

    def pooled(self, output: Tensor) -> Tensor:
        return output if self.pool is None else self.pool(output)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, with the batch norm folded in."""
        weight, bias = self.conv.weight, self.conv.bias
        return (weight, bias) if self.bn is None else fold(weight, bias, self.bn)

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """The op with these weights in place of the modules' own, before the pool."""
        conv, activation = self.conv, self.activation
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if residual is None:
            if activation == "none" and not auto.is_on(None, input.device) and _is_aten(input):
                # What the op would call; this way torch.compile sees it.
                return F.conv2d(input, weight, bias, *geometry)
            if is_pointwise(conv):
                return ops.pointwise_conv2d(input, weight, bias, None, conv.stride, activation=activation)
            if is_depthwise(conv):
                return ops.depthwise_conv2d(input, weight, bias, *geometry[:3], activation=activation)
            return ops.conv2d_relu(input, weight, bias, *geometry, activation=activation)
        if not self._is_plain(input, residual):  # a broadcast or promoting addition
            return add_activation(F.conv2d(input, weight, bias, *geometry), residual, activation)
        if is_pointwise(conv):
            return ops.pointwise_conv2d(input, weight, bias, residual, conv.stride, activation=activation)
        return ops.conv2d_add_relu(input, weight, bias, residual, *geometry, activation=activation)

    def _is_plain(self, input: Tensor, residual: Tensor | None) -> bool:
        """Whether the residual, if there is one, is of the result's shape and dtype."""
        return residual is None or (
            isinstance(residual, Tensor)
            and residual.dtype == input.dtype
            and residual.shape == shape_of_output(self.conv, input)
        )

    def operator_call(self, input: Tensor, residual: Tensor | None = None) -> OperatorCall | None:
        conv, padding = self.conv, numeric_padding(self.conv)
        if padding is None or input.dim() != 4 or not self._is_plain(input, residual):
            return None
        tensors = (input, *self.weights())
        stride, dilation = list(conv.stride), list(conv.dilation)
        if is_pointwise(conv):
            return "pointwise_conv2d", (*tensors, residual, stride, self.activation)
        if residual is not None:
            return "conv2d_add_relu", (*tensors, residual, stride, padding, dilation, conv.groups, self.activation)
        if is_depthwise(conv):
            return "depthwise_conv2d", (*tensors, stride, padding, dilation, self.activation)
        return "conv2d_relu", (*tensors, stride, padding, dilation, conv.groups, self.activation)

    def op(self) -> str:
        if self.activation == "none" and not self.has_residual:
            return "conv2d"
        if is_pointwise(self.conv):
            return "pointwise_conv2d"
        if self.has_residual:
            return "conv2d_add_relu"
        return "depthwise_conv2d" if is_depthwise(self.conv) else "conv2d_relu"


def fold(weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that computes bn(conv2d(input, weight, bias)), `bn` in evaluation mode.

    The factor of each channel is computed in float64; the products are rounded once to the weight's dtype.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 3.2.
    """
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -bn.running_mean.double() if bias is None else bias.double() - bn.running_mean.double()
    shift = shift * scale
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    folded = weight.to(wide) * scale.to(wide)[:, None, None, None]
    return folded.to(weight.dtype), shift.to(weight.dtype)


def numeric_padding(conv: nn.Conv2d) -> list[int] | None:
    """The padding in numbers; None for a "same" that pads one side more than the other."""
    if conv.padding == "valid":
        return [0, 0]
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else [t // 2 for t in total]
    return list(conv.padding)


def _is_aten(input: Tensor) -> bool:
    return backends.choose(None, input) in ("cpu", "reference")


def is_pointwise(conv: nn.Conv2d) -> bool:
    return tuple(conv.kernel_size) == (1, 1) and conv.padding in ("valid", "same", (0, 0)) and conv.groups == 1


def is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels > 1


def shape_of_output(conv: nn.Conv2d, input: Tensor) -> tuple[int, ...]:
    """The shape of conv(input), with or without a batch, for any padding."""
    size = []
    for i, pixels in enumerate(input.shape[-2:]):
        span = conv.dilation[i] * (conv.kernel_size[i] - 1)
        named = {"same": span, "valid": 0}
        padding = named[conv.padding] if isinstance(conv.padding, str) else 2 * conv.padding[i]
        size.append((pixels + padding - span - 1) // conv.stride[i] + 1)
    return (*input.shape[:-3], conv.out_channels, *size)

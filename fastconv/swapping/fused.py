"""The calls that replace groups of nodes. Each refers to the user's modules and reads them when it is called.

They hold no tensors of their own: what they compute follows every change of the parameters, is differentiable, and
can be compiled and exported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..operators import backends


class FusedConv:
    """activation(bn(conv(input)) + residual) as one op.

    Args:
        conv, bn, activation, has_residual: what to compute; `bn`, if any, is in evaluation mode and folded into
            the weights.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None = None,
        activation: str = "none",
        has_residual: bool = False,
    ) -> None:
        self.conv = conv
        self.bn = bn
        self.activation = activation
        self.has_residual = has_residual
        self.__name__ = "fused_conv"  # as generated code calls it

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.call(input, *self.weights(), residual)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, with the batch norm folded in."""
        weight, bias = self.conv.weight, self.conv.bias
        return (weight, bias) if self.bn is None else fold(weight, bias, self.bn)

    def call(self, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """The op with these weights in place of the modules' own."""
        conv, activation = self.conv, self.activation
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if residual is None:
            if activation == "none" and backends.choose(None, input) in ("cpu", "reference"):
                # What the op would call; this way torch.compile sees it.
                return F.conv2d(input, weight, bias, *geometry)
            if is_pointwise(conv):
                return ops.pointwise_conv2d(input, weight, bias, None, conv.stride, activation=activation)
            if is_depthwise(conv):
                return ops.depthwise_conv2d(input, weight, bias, *geometry[:3], activation=activation)
            return ops.conv2d_relu(input, weight, bias, *geometry, activation=activation)
        if not (
            isinstance(residual, Tensor)
            and residual.dtype == input.dtype
            and residual.shape == output_shape(conv, input)
        ):  # a broadcast or promoting addition
            return add_activation(F.conv2d(input, weight, bias, *geometry), residual, activation)
        if is_pointwise(conv):
            return ops.pointwise_conv2d(input, weight, bias, residual, conv.stride, activation=activation)
        return ops.conv2d_add_relu(input, weight, bias, residual, *geometry, activation=activation)

    def op(self) -> str:
        """The name of the op that `call` runs, for explanations."""
        if self.activation == "none" and not self.has_residual:
            return "conv2d"
        if is_pointwise(self.conv):
            return "pointwise_conv2d"
        if self.has_residual:
            return "conv2d_add_relu"
        return "depthwise_conv2d" if is_depthwise(self.conv) else "conv2d_relu"

    def kernel(self, input: Tensor) -> str:
        return _kernel(self.op(), input)


class FusedSeparable:
    """A depthwise convolution and the 1x1 convolution after it as one op."""

    def __init__(self, depthwise: FusedConv, pointwise: FusedConv) -> None:
        self.depthwise = depthwise
        self.pointwise = pointwise
        self.__name__ = "fused_separable"

    def __call__(self, input: Tensor) -> Tensor:
        return self.call(input, self.depthwise.weights(), self.pointwise.weights())

    def call(
        self,
        input: Tensor,
        depthwise: tuple[Tensor, Tensor | None],
        pointwise: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """The op with these weights and biases in place of the modules' own."""
        conv = self.depthwise.conv
        return ops.depthwise_separable_conv2d(
            input,
            depthwise[0],
            pointwise[0],
            depthwise[1],
            pointwise[1],
            conv.stride,
            conv.padding,
            conv.dilation,
            depthwise_activation=self.depthwise.activation,
            pointwise_activation=self.pointwise.activation,
        )

    def op(self) -> str:
        return "depthwise_separable_conv2d"

    def kernel(self, input: Tensor) -> str:
        return _kernel(self.op(), input)


class FusedAdd:
    """activation(input + other)"""

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.__name__ = "fused_add"

    def __call__(self, input: Any, other: Any) -> Any:
        return add_activation(input, other, self.activation)

    def op(self) -> str:
        return "add_relu"

    def kernel(self, input: Tensor) -> str:
        return _kernel(self.op(), input)


class FusedLRN:
    """local_response_norm of activation(input).

    Args:
        module: the layer, or None for a call of the function.
        settings, named: that call's arguments beside the input.
        activation: what comes before it.
    """

    def __init__(
        self, module: nn.LocalResponseNorm | None, settings: Any, named: dict[str, Any], activation: str
    ) -> None:
        self.module = module
        self.settings = settings
        self.named = named
        self.activation = activation
        self.__name__ = "fused_lrn"

    def __call__(self, input: Tensor) -> Tensor:
        module, settings = self.module, self.settings
        if module is not None:
            settings = (module.size, module.alpha, module.beta, module.k)
        return ops.local_response_norm(input, *settings, **self.named, activation=self.activation)

    def op(self) -> str:
        return "local_response_norm"

    def kernel(self, input: Tensor) -> str:
        return _kernel(self.op(), input)


class Attribute:
    """A parameter, buffer or other tensor of a module, as it is at the time of the call."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self.__name__ = "attribute"

    def __call__(self) -> Any:
        return getattr(self.module, self.name)


def _kernel(op: str, input: Tensor) -> str:
    """What runs for an op, in words."""
    return f"{op} {str(input.dtype).removeprefix('torch.')}, {backends.choose(None, input)}"


def add_activation(input: Any, other: Any, activation: str) -> Any:
    if (
        activation != "none"
        and isinstance(input, Tensor)
        and isinstance(other, Tensor)
        and input.is_floating_point()
        and other.is_floating_point()
    ):
        return ops.add_relu(input, other, activation=activation)
    total = input + other
    return {"none": lambda value: value, "relu": F.relu, "relu6": F.relu6}[activation](total)


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


def is_pointwise(conv: nn.Conv2d) -> bool:
    return tuple(conv.kernel_size) == (1, 1) and conv.padding in ("valid", "same", (0, 0)) and conv.groups == 1


def is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels > 1


def output_shape(conv: nn.Conv2d, input: Tensor) -> tuple[int, ...]:
    """The shape of conv(input)."""
    size = []
    for i, pixels in enumerate(input.shape[-2:]):
        span = conv.dilation[i] * (conv.kernel_size[i] - 1)
        named = {"same": span, "valid": 0}
        padding = named[conv.padding] if isinstance(conv.padding, str) else 2 * conv.padding[i]
        size.append((pixels + padding - span - 1) // conv.stride[i] + 1)
    return (*input.shape[:-3], conv.out_channels, *size)

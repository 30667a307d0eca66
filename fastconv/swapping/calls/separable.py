"""A depthwise convolution and the 1x1 convolution after it as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .call import Call
from .convolution import FusedConv
from .prepared import Folded, PreparedConv

_CACHED_WEIGHTS = 2**16  # float32: 256 KiB, half of a usual second-level cache


class FusedSeparable(Call):
    """A depthwise convolution and the 1x1 convolution after it as one op."""

    __name__ = "fused_separable"

    def __init__(self, depthwise: FusedConv, pointwise: FusedConv) -> None:
        self.depthwise = depthwise
        self.pointwise = pointwise

    def __call__(self, input: Tensor) -> Tensor:
        return self.compute(input, self.depthwise.weights(), self.pointwise.weights())

    def compute(
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


class PreparedSeparable(FusedSeparable):
    """A `FusedSeparable` for inference: one kernel where that is faster than two prepared ones."""

    depthwise: PreparedConv
    pointwise: PreparedConv

    @property
    def prepared(self) -> tuple[PreparedConv, PreparedConv]:
        return self.depthwise, self.pointwise

    def __call__(self, input: Tensor) -> Tensor:
        depthwise, pointwise = self.depthwise.ready, self.pointwise.ready
        if depthwise is None or pointwise is None or torch.compiler.is_compiling():
            return super().__call__(input)
        if isinstance(depthwise, Folded) or self._pays(input):
            return self.compute(input, depthwise.weights, pointwise.weights)
        return pointwise(depthwise(input, None), None)

    def _pays(self, input: Tensor) -> bool:
        """Whether the CPU's kernel is faster than oneDNN's convolutions.

        It is for channels_last, packs the 1x1 weight on every call, and wants to keep it in the cache.

        Measured on Zen 3 with two threads, MobileNet-v2's and Xception's layers: 1.2 to 1.4 times as fast as
        oneDNN's two convolutions and the activation between them while it fits, 0.9 times when it does not.
        """
        return (
            input.dtype is torch.float32
            and self.pointwise.conv.weight.dtype is torch.float32
            and self.pointwise.conv.weight.numel() <= _CACHED_WEIGHTS
            and input.dim() == 4
            and input.is_contiguous(memory_format=torch.channels_last)
            and not torch.is_autocast_enabled("cpu")
        )

    def kernel(self, input: Tensor) -> str:
        if isinstance(self.depthwise.ready, Folded) or self._pays(input):
            return super().kernel(input)
        return f"{self.depthwise.kernel(input)}; then 1x1 likewise"

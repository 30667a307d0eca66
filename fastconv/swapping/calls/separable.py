"""A depthwise convolution and the 1x1 convolution after it as one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...operators import measured
from .call import Call, OperatorCall
from .convolution import FusedConv, numeric_padding
from .prepared import Folded, PreparedConv

_SHAPES_KEPT = 32
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

    def operator_call(self, input: Tensor) -> OperatorCall | None:
        depthwise, pointwise, conv = self.depthwise.weights(), self.pointwise.weights(), self.depthwise.conv
        padding = numeric_padding(conv)
        if padding is None or input.dim() != 4:
            return None
        tensors = (input, depthwise[0], pointwise[0], depthwise[1], pointwise[1])
        geometry = (list(conv.stride), padding, list(conv.dilation))
        return self.op(), (*tensors, *geometry, self.depthwise.activation, self.pointwise.activation)


class PreparedSeparable(FusedSeparable):
    """A `FusedSeparable` for inference: one kernel where that is faster than two prepared ones."""

    depthwise: PreparedConv
    pointwise: PreparedConv

    def __init__(self, depthwise: PreparedConv, pointwise: PreparedConv) -> None:
        super().__init__(depthwise, pointwise)
        self._measured: dict[Any, bool | None] = {}

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
        oneDNN's two convolutions and the activation between them while it fits, 0.9 times when it does not. What was
        measured on this machine goes before that.
        """
        was_slower = self._was_slower(input)
        if was_slower is not None:
            return was_slower
        return (
            input.dtype is torch.float32
            and self.pointwise.conv.weight.dtype is torch.float32
            and self.pointwise.conv.weight.numel() <= _CACHED_WEIGHTS
            and input.dim() == 4
            and input.is_contiguous(memory_format=torch.channels_last)
            and not torch.is_autocast_enabled("cpu")
        )

    def _was_slower(self, input: Tensor) -> bool | None:
        """Whether the two were measured not to be the best; None if that was not measured."""
        if not measured.in_force(input.device):
            return None
        key = input.shape, input.dtype, input.stride(), measured.generation()
        if key not in self._measured:
            if len(self._measured) >= _SHAPES_KEPT:
                self._measured.clear()
            found = self.operator_call(input)
            pays = None if found is None else measured.prepared_pays(*found)
            self._measured[key] = None if pays is None else not pays
        return self._measured[key]

    def kernel(self, *inputs: Any) -> str:
        (input,) = inputs
        if isinstance(self.depthwise.ready, Folded) or self._pays(input):
            return super().kernel(input)
        return f"{self.depthwise.kernel(input)}; then 1x1 likewise"

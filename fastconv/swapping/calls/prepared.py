"""Convolutions made ready for inference: batch norm folded, weights packed, arguments parsed, all of it once.

What is prepared is a cached view of the parameters and never stale: `fastconv.swapping.staleness.PreparedWeights`
compares their present state with the one that was prepared, before every forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import kernel_of
from .convolution import FusedConv, fold
from .onednn import OneDNN, onednn_for


class PreparedConv(FusedConv):
    """A `FusedConv` for inference, which runs on prepared weights where there are any.

    Args: as for `FusedConv`.
    """

    ready: Folded | OneDNN | None = None

    @property
    def prepared(self) -> tuple[PreparedConv]:
        return (self,)

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        ready = self.ready
        if ready is None or torch.compiler.is_compiling():
            return self.unprepared(input, residual)
        return ready(input, residual)

    def sources(self) -> list[tuple[dict[str, Tensor | None], str]]:
        """Where the tensors that are prepared live; that they are there at all is watched with the trace."""
        conv, bn = self.conv, self.bn
        found = [(conv._parameters, "weight"), (conv._parameters, "bias")]
        if bn is not None:
            found += [(bn._parameters, "weight"), (bn._parameters, "bias")]
            found += [(bn._buffers, "running_mean"), (bn._buffers, "running_var")]
        return [(store, name) for store, name in found if store.get(name) is not None]

    def settings(self) -> tuple[Any, ...]:
        """What else the prepared weights depend on."""
        conv = self.conv
        eps = None if self.bn is None else self.bn.eps
        return conv.stride, conv.padding, conv.dilation, conv.groups, eps

    def prepare(self) -> None:
        self.ready = onednn_for(self, instead=lambda: Folded(self)) or Folded(self)

    def kernel(self, *inputs: Any) -> str:
        ready = self.ready
        return super().kernel(*inputs) if ready is None else ready.kernel(*inputs)


class Folded:
    """Prepared for the public ops: batch norm folded."""

    def __init__(self, source: FusedConv) -> None:
        conv, bn = source.conv, source.bn
        self._source = source
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        self.weights = (weight, bias) if bn is None else fold(weight, bias, bn)

    def __call__(self, input: Tensor, residual: Tensor | None) -> Tensor:
        return self._source.pooled(self._source.compute(input, *self.weights, residual))

    def kernel(self, input: Tensor, residual: Tensor | None = None) -> str:
        call = self._source.operator_call(input, residual)
        return f"{kernel_of(self._source.op(), input, call)}, batch norm folded"

"""local_response_norm of activation(input) as one op."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import ops
from .call import Call


class FusedLRN(Call):
    """local_response_norm of activation(input).

    Args:
        module: the layer, or None for a call of the function.
        settings, named: that call's arguments beside the input.
        activation: what comes before it.
    """

    __name__ = "fused_lrn"

    def __init__(
        self, module: nn.LocalResponseNorm | None, settings: Any, named: dict[str, Any], activation: str
    ) -> None:
        self.module = module
        self.settings = settings
        self.named = named
        self.activation = activation

    def __call__(self, input: Tensor) -> Tensor:
        module, settings = self.module, self.settings
        if module is not None:
            settings = (module.size, module.alpha, module.beta, module.k)
        return ops.local_response_norm(input, *settings, **self.named, activation=self.activation)

    def op(self) -> str:
        return "local_response_norm"

"""local_response_norm of activation(input) as one op."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from .call import Call, OperatorCall


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
        return ops.local_response_norm(input, *self._settings(), **self.named, activation=self.activation)

    def op(self) -> str:
        return "local_response_norm"

    def operator_call(self, input: Tensor) -> OperatorCall:
        given = inspect.signature(F.local_response_norm).bind(input, *self._settings(), **self.named)
        given.apply_defaults()
        _, size, *reals = given.args
        return self.op(), (input, size, *map(float, reals), self.activation)

    def _settings(self) -> Any:
        module = self.module
        return self.settings if module is None else (module.size, module.alpha, module.beta, module.k)

"""activation(input + other) as one op."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ... import ops
from .call import Call, OperatorCall


class FusedAdd(Call):
    """activation(input + other)"""

    __name__ = "fused_add"

    def __init__(self, activation: str) -> None:
        self.activation = activation

    def __call__(self, input: Any, other: Any) -> Any:
        return add_activation(input, other, self.activation)

    def op(self) -> str:
        return "add_relu"

    def operator_call(self, input: Any, other: Any) -> OperatorCall | None:
        is_one = _has_op(input, other, self.activation) and (input.shape, input.dtype) == (other.shape, other.dtype)
        return (self.op(), (input, other, self.activation)) if is_one else None


def add_activation(input: Any, other: Any, activation: str) -> Any:
    """What `FusedAdd` computes; where there is no op for it, as for integers, the sum and the activation.

    Args:
        input, other: tensors, or one of them a number, as for ``+``.
        activation: "none", "relu" or "relu6".
    """
    if _has_op(input, other, activation):
        return ops.add_relu(input, other, activation=activation)
    total = input + other
    return {"none": lambda value: value, "relu": F.relu, "relu6": F.relu6}[activation](total)


def _has_op(input: Any, other: Any, activation: str) -> bool:
    return (
        activation != "none"
        and isinstance(input, Tensor)
        and isinstance(other, Tensor)
        and input.is_floating_point()
        and other.is_floating_point()
    )

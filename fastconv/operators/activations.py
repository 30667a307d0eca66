"""The activations that ops end with, as aten has them; and how their gradients are masked."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for

aten = torch.ops.aten

ACTIVATIONS = ("none", "relu", "relu6")


def is_activation(name: Any) -> bool:
    return isinstance(name, str) and name in ACTIVATIONS


def activate(value: Tensor, activation: str) -> Tensor:
    """The activation as aten has it."""
    if activation == "relu":
        return with_plain_strides(F.relu(value))
    if activation == "relu6":
        return F.relu6(value)
    return value


def mask(grad: Tensor, output: Tensor | None, activation: str) -> Tensor:
    """The gradient before the activation, from the one after it and the activation's output."""
    if activation == "relu":
        return aten.threshold_backward(grad, output, 0)
    if activation == "relu6":
        return aten.hardtanh_backward(grad, output, 0, 6)
    return grad


def with_plain_strides(value: Tensor) -> Tensor:
    """Contiguous in dimensions of one element, too, if it is contiguous at all.

    So eager's ReLU and its sums leave what is both contiguous and channels_last; torch's fake kernels of them do not.
    """
    if value.is_contiguous() and value.stride() != make_contiguous_strides_for(value.shape):
        return value.view(-1).view(value.shape)
    return value

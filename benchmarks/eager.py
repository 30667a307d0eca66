"""What networks run today, spelled as they spell it: torch.nn.functional, in place where they are.

The arguments have the names of those of fastconv.ops; torch.compile gets the same functions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d_relu(input: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "relu", **geometry: Any) -> Tensor:
    return _activate_(F.conv2d(input, weight, bias, **geometry), activation)


def conv2d_add_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    *,
    activation: str = "relu",
    **geometry: Any,
) -> Tensor:
    output = F.conv2d(input, weight, bias, **geometry)
    output += residual
    return _activate_(output, activation)


def pointwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    **geometry: Any,
) -> Tensor:
    if residual is None:
        return conv2d_relu(input, weight, bias, activation=activation, **geometry)
    return conv2d_add_relu(input, weight, bias, residual, activation=activation, **geometry)


def pointwise_conv2d_group(
    input: Tensor, weights: list[Tensor], biases: list[Tensor], *, activation: str
) -> list[Tensor]:
    return [_activate_(F.conv2d(input, weight, bias), activation) for weight, bias in zip(weights, biases, strict=True)]


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    **geometry: Any,
) -> Tensor:
    return _activate_(F.conv2d(input, weight, bias, groups=input.shape[1], **geometry), activation)


def depthwise_separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    *,
    depthwise_activation: str = "none",
    pointwise_activation: str = "none",
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    **geometry: Any,
) -> Tensor:
    hidden = depthwise_conv2d(input, depthwise_weight, depthwise_bias, activation=depthwise_activation, **geometry)
    return _activate_(F.conv2d(hidden, pointwise_weight, pointwise_bias), pointwise_activation)


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    return F.relu_(input + other)


def local_response_norm(input: Tensor, *, activation: str = "none", **options: Any) -> Tensor:
    input = {"none": lambda value: value, "relu": F.relu}[activation](input)
    if input.device.type == "cpu" and input.dtype in (torch.bfloat16, torch.float16):
        # aten has no such kernel; this is what the users of one write.
        return F.local_response_norm(input.float(), **options).to(input.dtype)
    return F.local_response_norm(input, **options)


def _activate_(value: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu_(value)
    if activation == "relu6":
        return F.relu6(value, inplace=True)
    return value

"""What the convolution modules share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import checks


def pad(op: str, module: torch.nn.Conv2d, input: Tensor) -> tuple[Tensor, int | str | tuple[int, ...]]:
    """The input and the padding left for the op, which itself pads with zeros alone."""
    if module.padding_mode == "zeros":
        return input, module.padding
    checks.tensors(op, input=input)
    checks.padded(op, input, module._reversed_padding_repeated_twice, module.padding_mode)
    return F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0


def require(module: torch.nn.Module, met: bool, got: str, needed: str, remedy: str) -> None:
    if not met:
        raise ValueError(f"fastconv.nn.{type(module).__name__}: got {got}, needed {needed}; {remedy}")


def checked_activation(module: torch.nn.Module, activation: str) -> str:
    require(
        module,
        checks.is_activation(activation),
        checks.given("activation", activation),
        "'none', 'relu' or 'relu6'",
        "apply other activations after the module",
    )
    return activation

"""What the modules share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import activations, arguments, messages


def pad(op: str, module: torch.nn.Conv2d, input: Tensor) -> tuple[Tensor, int | str | tuple[int, ...]]:
    """The input and the padding left for the op, which itself pads with zeros alone."""
    if module.padding_mode == "zeros":
        return input, module.padding
    arguments.tensors(op, input=input)
    arguments.padded(op, input, module._reversed_padding_repeated_twice, module.padding_mode)
    return F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0


def require(module: torch.nn.Module, met: bool, got: str, needed: str, remedy: str) -> None:
    if not met:
        raise ValueError(f"fastconv.nn.{type(module).__name__}: got {got}, needed {needed}; {remedy}")


def checked_activation(module: torch.nn.Module, activation: str) -> str:
    require(
        module,
        activations.is_activation(activation),
        messages.given("activation", activation),
        "'none', 'relu' or 'relu6'",
        "apply other activations after the module",
    )
    return activation


class ActivatedConv2d(torch.nn.Conv2d):
    """A ``torch.nn.Conv2d`` with an activation, which its op applies, too."""

    def __init__(self, *args: Any, activation: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = checked_activation(self, activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"

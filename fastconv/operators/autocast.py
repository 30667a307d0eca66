"""What autocast does to an operator's arguments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

DEVICES = ("cpu", "cuda")

# A rule gets the function to call (the dispatcher's overload, or the reference), the device type
# and the arguments.
AutocastRule = Callable[[Callable[..., Any], str, tuple[Any, ...]], Any]


def dispatch_key(device: str) -> str:
    """The dispatch key of a device's autocast."""
    return f"Autocast{device.upper()}"


def below_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside, the dispatcher skips autocast."""
    return torch._C._ExcludeDispatchKeyGuard(
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key(device)))
    )


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Casts what autocast casts: floating tensors other than float64, in lists too."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype is not torch.float64:
            return leaf.to(dtype)
        return leaf

    return pytree.tree_map(one, value)


def to_low_precision(function: Callable[..., Any], device: str, args: tuple[Any, ...]) -> Any:
    """The rule for convolutions: all tensors in the dtype of the autocast context."""
    return function(*cast(args, torch.get_autocast_dtype(device)))


def to_float32(function: Callable[..., Any], device: str, args: tuple[Any, ...]) -> Any:
    """The rule for powers: all tensors in float32."""
    return function(*cast(args, torch.float32))

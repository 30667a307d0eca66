"""Calls that must be refused, where they are made, and what the one error says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from support.kernel_backends import device_of

BACKENDS = ["cpu", "cuda-emulated", "triton", "reference"]


@dataclass(frozen=True)
class Bad:
    """The first case of an op with some arguments changed, and the message that must come."""

    op: str
    changes: dict[str, Any]
    message: str

    def __str__(self) -> str:
        return f"{self.op}-{'-'.join(self.changes)}-{self.message[:40]}"


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of ones."""
    return torch.ones(shape, dtype=dtype)


def on_place(where: str, arguments: Any) -> tuple[str | None, Any]:
    """The backend to ask for, and the arguments as it takes them."""
    if where == "meta":
        move = partial(torch.empty_strided, device="meta")
        return None, tree_map_only(Tensor, lambda x: move(x.shape, x.stride(), dtype=x.dtype), arguments)
    if where == "fake":
        return None, tree_map_only(Tensor, FakeTensorMode().from_tensor, arguments)
    device_of(where)
    return where, arguments


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        call()
    return str(caught.value)


def check_words(op: str, found: str) -> None:
    """One error: the op, what arrived, what was needed and the remedy, in few words."""
    assert re.match(rf"fastconv::{op}: got .+, needed .+; .+", found), found
    assert len(found) <= 400, found


def in_fake(arguments: dict[str, Any]) -> dict[str, Any]:
    mode = FakeTensorMode()

    def fake(x: Tensor) -> Tensor:
        return mode.from_tensor(x) if (x.layout, x.is_nested, x.is_quantized) == (torch.strided, False, False) else x

    return tree_map_only(Tensor, fake, arguments)

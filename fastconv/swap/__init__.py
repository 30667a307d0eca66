"""`swap`: the same network, run by fused ops."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from . import regions

__all__ = ["swap"]


def swap(model: nn.Module) -> nn.Module:
    """TODO"""
    fast = regions.clone(model)
    regions.install(fast)
    regions.prepare(fast)
    return fast

"""What can be asked of a module: whose class it is, what a graph calls as a whole, and whose code then runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

REGION = "_fastconv_region"  # where a swapped module keeps its programs, in its __dict__
BOOKKEEPING = {*vars(nn.Module()), REGION}  # attributes of every module that no forward reads


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the user wrote, bound."""
    return functools.partial(plain_class(module).forward, module)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The user's class of a module."""
    cls = type(module)
    return getattr(cls, "fastconv_plain_class", cls)


def is_region(module: nn.Module) -> bool:
    """Whether the module's class is one that `fastconv.swap` made."""
    return hasattr(type(module), "fastconv_plain_class")


def has_hooks(module: nn.Module) -> bool:
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls this module as a whole, as opposed to what its forward calls."""
    cls = type(module)
    return (
        has_hooks(module)
        or "forward" in vars(module)
        or isinstance(module, torch.jit.ScriptModule)
        or runs_forward_of(module, nn.Conv2d)
        or runs_forward_of(module, nn.BatchNorm2d)
        or (
            cls.__module__.startswith(("torch.nn.", "torch.ao.", "fastconv.nn"))
            and not isinstance(module, nn.Sequential)
        )
    )


def runs_forward_of(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether the module computes what `cls` does: `cls` itself, or a subclass that overrides no computation."""
    return (
        isinstance(module, cls)
        and all(getattr(type(module), name, None) is getattr(cls, name, None) for name in _COMPUTATIONS)
        and not any(name in vars(module) for name in _COMPUTATIONS)
    )


_COMPUTATIONS = (
    "forward",
    "_conv_forward",
    "_check_input_dim",
    "__call__",
)  # methods of torch's convolutions and norms


def runs_foreign_code(module: nn.Module) -> bool:
    """Whether a call of a leaf runs code of the user's, which may do anything to what the forward around it reads."""
    hooks = [hook for hooks in hooks_of(module) for hook in hooks.values()]
    if any(not _is_of_torch(hook) for hook in hooks):
        return True
    return not isinstance(module, torch.jit.ScriptModule) and (
        "forward" in vars(module) or any(runs_foreign_code(child) for child in module.children() if is_leaf(child))
    )


def _is_of_torch(hook: Any) -> bool:
    """Such as those of pruning, of weight norms and of lazy layers."""
    return str(getattr(hook, "__module__", "")).startswith("torch.")

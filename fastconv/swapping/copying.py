"""A copy of a tree of modules that is one set of weights with the original."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.hooks import RemovableHandle

from .tracing.modules import REGION, plain_class


def clone(model: nn.Module) -> nn.Module:
    """A copy of a tree of modules that shares all tensors with it, and the dictionaries that hold them.

    Sharing the dictionaries keeps the two models one set of weights for good: a buffer that ``model.half()`` replaces,
    or a Parameter that ``load_state_dict(assign=True)`` replaces, is replaced in both.
    """
    copies: dict[int, nn.Module] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def visit(module: nn.Module) -> None:
        if id(module) in copies:
            return
        if isinstance(module, torch.jit.ScriptModule):
            copies[id(module)] = copy.copy(module)
            return
        copies[id(module)] = object.__new__(plain_class(module))
        pairs.append((module, copies[id(module)]))
        for child in module._modules.values():
            if child is not None:
                visit(child)

    visit(model)
    for module, duplicate in pairs:
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                vars(duplicate)[name] = value
            elif name != REGION:
                vars(duplicate)[name] = _with_copies(value, copies)
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            # The handle removes the hook that sets the parameters up, once that has run.
            duplicate._initialize_hook.hooks_dict_ref = weakref.ref(duplicate._forward_pre_hooks)
    return copies[id(model)]


def _with_copies(value: Any, copies: dict[int, nn.Module]) -> Any:
    """An attribute's value, in which copies stand for the modules."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if type(value) is functools.partial:
        function, args = _with_copies(value.func, copies), _with_copies(value.args, copies)
        return functools.partial(function, *args, **_with_copies(value.keywords, copies))
    if isinstance(value, RemovableHandle):
        return copy.copy(value)
    if type(value) in (list, tuple, set):
        return type(value)(_with_copies(item, copies) for item in value)
    if type(value) is deque:
        return deque((_with_copies(item, copies) for item in value), value.maxlen)
    if type(value) in (dict, OrderedDict, defaultdict):
        duplicate = copy.copy(value)
        duplicate.update((key, _with_copies(item, copies)) for key, item in value.items())
        return duplicate
    return value

"""What a value holds, down to what cannot change: to see later whether it is still so, and to put it back."""

from __future__ import annotations

import enum
import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_MISSING = object()
_MOST = 1000  # entries of one value; comparing more before every call would cost more than fusion saves

# Told apart by value.
_CONSTANTS = {bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice}
_CONSTANT_PACKAGES = {"datetime", "decimal", "fractions", "pathlib", "uuid"}
# Told apart by identity. What functions and classes refer to is looked at where they run.
_ATOMS = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, functools.partial),
    *(property, classmethod, staticmethod, enum.Enum, torch.Tensor, torch.dtype, torch.device, torch.layout),
)


class Unwatchable(Exception):
    """The message completes "its forward reads NAME, "."""


class Place:
    """Where a value can be found again: an entry of a dictionary, or of whatever has `get`.

    Args:
        store, name: the dictionary and the key.
        words: what a user calls it.
        modules: the ids of those nn.Modules that somebody else watches.
    """

    def __init__(self, store: Any, name: str, words: str, modules: frozenset[int]) -> None:
        self._store = store
        self._name = name
        self._modules = modules
        self.words = words
        self._original = self._value()
        self._containers: list[tuple[Any, Any]] = []
        self._facts = self._look(self._containers)
        self.is_fixed = is_fixed(self._value(), modules)

    def holds(self) -> bool:
        """Whether the value, and all that it holds, is what it was."""
        if self.is_fixed:
            return _same(self._value(), self._facts[0])
        try:
            facts = self._look([])
        except Unwatchable:
            return False
        return len(facts) == len(self._facts) and all(map(_same, facts, self._facts))

    def holds_compiled(self) -> bool:
        """As `holds`, while torch.compile looks on, which guards what is compared here and nothing else.

        False for a value whose content counts. Functions and classes are taken to stay.
        """
        if not self.is_fixed:
            return False
        value = self._facts[0]
        if isinstance(value, _ATOMS) or self._name.startswith("__"):
            return True
        return type(self._store) is dict and self._store.get(self._name, None) is value

    def restore(self) -> None:
        """Puts the value back, and what the containers in it held."""
        if self._value() is not self._original:
            self._store[self._name] = self._original
        for container, content in self._containers:
            if isinstance(container, dict):
                dict.clear(container)
                dict.update(container, content)
            elif isinstance(container, list):
                list.__setitem__(container, slice(None), content)
            else:
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(content)

    def _value(self) -> Any:
        value = self._store.get(self._name, _MISSING)
        if isinstance(value, types.FunctionType) and value.__globals__.get("__name__") == "torch.fx._symbolic_trace":
            return getattr(value, "__wrapped__", value)  # a leaf function, while torch.fx traces
        return value

    def _look(self, containers: list[tuple[Any, Any]]) -> list[Any]:
        facts: list[Any] = []
        waiting, seen = [self._value()], set()
        while waiting:
            value = waiting.pop()
            fixed = is_fixed(value, self._modules)
            facts.append(value if fixed or type(value) not in (tuple, frozenset) else type(value))  # made anew at will
            if len(facts) > _MOST:
                raise Unwatchable("which holds too much to be compared before every call")
            if fixed or id(value) in seen:
                continue
            seen.add(id(value))
            waiting += _parts(value, containers)
        return facts


def is_fixed(value: Any, modules: frozenset[int] = frozenset()) -> bool:
    """Whether the value holds nothing that can change."""
    kind = type(value)
    if kind in _CONSTANTS or value is _MISSING or isinstance(value, _ATOMS):
        return True
    if isinstance(value, nn.Module):
        return id(value) in modules
    if kind is tuple:
        return all(is_fixed(item, modules) for item in value)
    package = kind.__module__.partition(".")[0]
    return package in _CONSTANT_PACKAGES or (
        package in ("torch", "fastconv") and not isinstance(value, (list, dict, set, tuple))
    )


def _same(one: Any, two: Any) -> bool:
    if one is two:
        return True
    kind = type(one)
    if kind is tuple is type(two):
        return len(one) == len(two) and all(map(_same, one, two))
    constant = kind in _CONSTANTS or kind.__module__.partition(".")[0] in _CONSTANT_PACKAGES
    return constant and kind is type(two) and bool(one == two)


def _parts(value: Any, containers: list[tuple[Any, Any]]) -> Iterator[Any]:
    """What the value holds, keys included; the containers among it, with copies, are added to the list."""
    opaque = True
    if isinstance(value, dict):
        opaque = False
        containers.append((value, dict(value)))
        yield from dict.keys(value)
        yield from dict.values(value)
    elif isinstance(value, (list, deque, set)):
        opaque = False
        containers.append((value, list(value)))
        yield from value
    elif isinstance(value, (tuple, frozenset)):
        opaque = False
        yield from value
    elif isinstance(value, (types.CellType, types.MappingProxyType)):
        raise Unwatchable(f"a {type(value).__name__}, whose content cannot be compared")
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        opaque = False
        containers.append((attributes, dict(attributes)))
        yield from attributes.keys()
        yield from attributes.values()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            opaque = False
            yield getattr(value, name, _MISSING)
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and value.nbytes <= 8 * _MOST:
        opaque = False
        yield from (value.shape, str(value.dtype), value.tobytes())
    if opaque:
        raise Unwatchable(f"a {type(value).__name__}, whose content cannot be compared")

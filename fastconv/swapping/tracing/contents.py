"""What a value holds, down to what cannot change: to see later whether it is still so, and to put it back."""

from __future__ import annotations

import enum
import functools
import operator
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

MISSING = object()
_MOST = 1000  # entries of one value; comparing more before every call would cost more than fusion saves

# Told apart by value.
_CONSTANTS = {bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice}
_CONSTANT_PACKAGES = {"datetime", "decimal", "fractions", "pathlib", "uuid"}
# Told apart by identity. What functions and classes refer to is looked at where they run.
_ATOMS = (
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type),
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

    Attributes:
        classes: of the objects in it.
        containers: those in it, each with what puts its content back; until `settle`.
    """

    def __init__(self, store: Any, name: str, words: str, modules: frozenset[int]) -> None:
        self._store = store
        self._name = name
        self._modules = modules
        self.words = words
        self._original = self._value()
        self.containers: list[tuple[Any, Callable[[], None]]] = []
        self.classes: set[type] = set()
        self._facts = self._look(self.containers, self.classes)
        self.is_fixed = is_fixed(self._value(), modules)

    def holds(self) -> bool:
        """Whether the value, and all that it holds, is what it was."""
        if self.is_fixed:
            return _same(self._value(), self._facts[0])
        try:
            facts = self._look([], set())
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
        if isinstance(self._store, dict) and self._value() is not self._original:  # else a class or a closure
            self._store[self._name] = self._original
        for _, put_back in self.containers:
            put_back()

    def settle(self) -> None:
        """From now on the content is compared and no longer put back."""
        self._original = None
        self.containers = []

    def _value(self) -> Any:
        value = self._store.get(self._name, MISSING)
        if isinstance(value, types.FunctionType) and value.__globals__.get("__name__") == "torch.fx._symbolic_trace":
            return getattr(value, "__wrapped__", value)  # a leaf function, while torch.fx traces
        return value

    def _look(self, containers: list[tuple[Any, Callable[[], None]]], classes: set[type]) -> list[Any]:
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
            classes.add(type(value))
            waiting += _parts(value, containers)
        return facts


def is_fixed(value: Any, modules: frozenset[int] = frozenset()) -> bool:
    """Whether the value holds nothing that can change."""
    kind = type(value)
    if kind is types.BuiltinMethodType:  # or a function, of a module
        return is_fixed(value.__self__, modules)
    if kind in _CONSTANTS or value is MISSING or isinstance(value, _ATOMS):
        return True
    if isinstance(value, nn.Module):
        return id(value) in modules
    if kind is tuple:
        return all(is_fixed(item, modules) for item in value)
    package = _package(kind)
    return package in _CONSTANT_PACKAGES or (
        package in ("torch", "fastconv") and not isinstance(value, (list, dict, set, tuple))
    )


def _package(kind: type) -> str:
    return str(kind.__module__).partition(".")[0]


def _same(one: Any, two: Any) -> bool:
    if one is two:
        return True
    kind = type(one)
    if kind is tuple is type(two):
        return len(one) == len(two) and all(map(_same, one, two))
    constant = kind in _CONSTANTS or _package(kind) in _CONSTANT_PACKAGES
    return constant and kind is type(two) and bool(one == two)


def _parts(value: Any, containers: list[tuple[Any, Callable[[], None]]]) -> Iterator[Any]:
    """What the value holds, keys included; the containers among it are added to the list."""
    opaque = True

    def hold(container: Any, put_back: Callable[..., None], *content: Any) -> None:
        nonlocal opaque
        opaque = False
        containers.append((container, functools.partial(put_back, container, *content)))

    if isinstance(value, dict):
        methods = OrderedDict if isinstance(value, OrderedDict) else dict  # each keeps an order of its own
        items = list(methods.items(value))
        hold(value, _fill_dict, methods, items)
        for item in items:
            yield from item
    elif isinstance(value, (list, deque, set)):
        hold(value, _fill, list(value))
        yield from value
    elif isinstance(value, (tuple, frozenset)):
        opaque = False
        yield from value
    elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        yield value.__self__
        yield getattr(value, "__func__", value.__name__)
        return
    elif isinstance(value, functools.partial):
        of_torch = str(getattr(value.func, "__module__", None)).partition(".")[0] == "torch"
        if (
            isinstance(value.func, types.BuiltinFunctionType)
            and not of_torch
            and value.func.__self__ is not torch._C._VariableFunctions
        ):
            raise Unwatchable(f"a partial {value.func.__name__}, whose call cannot be observed")
        yield from (value.func, value.args, value.keywords)
        return
    elif isinstance(value, (types.CellType, types.MappingProxyType)):
        raise Unwatchable(f"a {type(value).__name__}, whose content cannot be compared")
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        hold(attributes, _fill_dict, dict, list(attributes.items()))
        for item in list(attributes.items()):
            yield from item
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in ("__dict__", "__weakref__"):
                continue
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{cls.__name__.lstrip('_')}{name}"
            found = getattr(value, name, MISSING)
            hold(value, _fill_slot, name, found)
            yield found
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and value.nbytes <= 8 * _MOST:
        hold(value, _fill_array, value.copy())
        yield from (value.shape, str(value.dtype), value.tobytes())
    if opaque:
        raise Unwatchable(f"a {type(value).__name__}, whose content cannot be compared")


def _fill_dict(container: Any, methods: Any, items: list[tuple[Any, Any]]) -> None:
    methods.clear(container)
    for key, value in items:
        methods.__setitem__(container, key, value)


def _fill(container: Any, items: list[Any]) -> None:
    kind = next(kind for kind in (list, deque, set) if isinstance(container, kind))
    kind.clear(container)
    (kind.update if kind is set else kind.extend)(container, items)


def _fill_slot(value: Any, name: str, content: Any) -> None:
    if content is not MISSING:
        object.__setattr__(value, name, content)
    elif hasattr(value, name):
        object.__delattr__(value, name)


def _fill_array(array: Any, content: Any) -> None:
    if array.flags.writeable:
        array[...] = content


# Python itself adds these to a class, when somebody asks for them.
_OF_PYTHON = ("__slotnames__", "__annotations__")


class ClassPlace:
    """A class, whose methods and attributes can be replaced.

    Args:
        cls: the class; its base classes are others' business.
    """

    classes: frozenset[type] = frozenset()
    containers: tuple[Any, ...] = ()

    def __init__(self, cls: type) -> None:
        self._cls = cls
        content = {name: value for name, value in vars(cls).items() if name not in _OF_PYTHON}
        self._names, self._values = list(content), list(content.values())
        self.words = f"the class {cls.__name__}"

    def holds(self) -> bool:
        """Whether all that it has is the very thing that it was."""
        now = vars(self._cls)
        count = len(now) - sum(name in now for name in _OF_PYTHON)
        return count == len(self._names) and all(map(operator.is_, map(now.get, self._names), self._values))

    def holds_compiled(self) -> bool:
        """Taken to be so, as torch.compile does."""
        return True

    def restore(self) -> None:
        """Puts back what was replaced or deleted, and takes away what was added."""
        content = dict(zip(self._names, self._values, strict=True))
        for name, value in dict(vars(self._cls)).items():
            if name not in content and name not in _OF_PYTHON:
                delattr(self._cls, name)
            elif name in content and content[name] is not value:
                setattr(self._cls, name, content[name])
        for name in content.keys() - vars(self._cls).keys():
            setattr(self._cls, name, content[name])

    def settle(self) -> None:
        """There is nothing to forget."""

"""What the code of a forward reads by name, and where that can be found again: to be compared before every call."""

from __future__ import annotations

import functools
import gc
import types
from dataclasses import dataclass
from typing import Any

from torch import nn

from .contents import MISSING, ClassPlace, Place, Unwatchable, is_fixed
from .harmless import Code, is_of_python, is_trusted
from .modules import BOOKKEEPING, is_leaf
from .refusal import Refusal


class _Variables:
    """The variables of enclosing functions, or the default arguments, of a function."""

    def __init__(self, function: types.FunctionType) -> None:
        self._function = function

    def get(self, name: str, missing: Any = None) -> Any:
        function = self._function
        if name == "__defaults__":
            return function.__defaults__
        if name == "__kwdefaults__":
            return function.__kwdefaults__
        try:
            return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
        except (TypeError, ValueError, IndexError):
            return missing


@dataclass(frozen=True)
class _OfClass:
    """The attributes of a class."""

    cls: type

    def get(self, name: str, missing: Any = None) -> Any:
        return vars(self.cls).get(name, missing)


class _Index:
    """The attributes of a tree of modules, and of classes, by name: where they are.

    Attributes:
        attributes: those whose content may change.
        of_leaves: the others of modules that a graph calls as a whole.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.modules())
        self.ids = frozenset(map(id, self.modules))
        self.attributes: dict[str, list[Any]] = {}
        self.of_leaves: dict[str, list[dict[str, Any]]] = {}
        self.functions: dict[int, list[types.FunctionType]] = {}  # that are attributes, by the id of their code
        for module in self.modules:
            leaves = module is not root and is_leaf(module)
            for name, value in vars(module).items():
                if isinstance(value, types.FunctionType):
                    self.functions.setdefault(id(value.__code__), []).append(value)
                if name in BOOKKEEPING:
                    continue
                if not is_fixed(value, self.ids):
                    self.attributes.setdefault(name, []).append(vars(module))
                elif leaves:
                    self.of_leaves.setdefault(name, []).append(vars(module))

    def add_class(self, cls: type) -> None:
        for name, value in vars(cls).items():
            caches = isinstance(value, functools._lru_cache_wrapper)
            if caches or not (name.startswith("__") or hasattr(value, "__get__") or is_fixed(value, self.ids)):
                self.attributes.setdefault(name, []).append(_OfClass(cls))


class _Functions:
    """The functions of the process: Python does not tell which of them a frame runs.

    To look through all objects takes long, so it is done once for all functions with the same globals. Later functions
    are young: the garbage collector, by which they would age, is off while a forward is traced.
    """

    def __init__(self) -> None:
        self._found: dict[int, list[types.FunctionType]] = {}  # by the id of their globals

    def of(self, frame: types.FrameType) -> list[types.FunctionType]:
        """Those with the code and the globals of a frame."""
        code, scope = frame.f_code, frame.f_globals
        if id(scope) not in self._found:
            self._found[id(scope)] = _functions_among(gc.get_referrers(scope))
        functions = dict.fromkeys(self._found[id(scope)] + _functions_among(gc.get_objects(generation=0)))
        return [function for function in functions if function.__code__ is code and function.__globals__ is scope]


def _functions_among(objects: list[Any]) -> list[types.FunctionType]:
    # Not isinstance(), which may run code of an object's class.
    return [value for value in objects if type(value) is types.FunctionType]


class Reads:
    """What a forward reads and may change, noted while it runs.

    Args:
        root: the module whose forward is going to run.

    Attributes:
        places: where that is, beside attributes of the modules whose forwards are traced.
        of_leaves: attributes of the other modules that it may have read: dictionary, name and value.
        modules: the tree of modules.
        ids: theirs.
    """

    def __init__(self, root: nn.Module) -> None:
        self.places: list[Place | ClassPlace] = []
        self.of_leaves: list[tuple[dict[str, Any], str, Any]] = []
        self._index = _Index(root)
        self._functions = _Functions()
        self.modules, self.ids = self._index.modules, self._index.ids
        self._classes: set[type] = set()
        self._known: set[tuple[Any, str]] = set()

    def note_call(self, frame: types.FrameType, names: frozenset[str]) -> None:
        """The attributes that a function reads by these names, its first argument's class being known."""
        if frame.f_code.co_argcount:
            self.see_class(_class_of_first(frame))
        count = -1
        while count != len(self.places):  # which may have led to further classes
            count = len(self.places)
            self.note_attributes(names)

    def note_all_attributes(self) -> None:
        self.note_attributes(frozenset(self._index.attributes.keys() | self._index.of_leaves.keys()))

    def note_attributes(self, names: frozenset[str]) -> None:
        """Attributes of the modules, and of classes, by these names."""
        for name in names & self._index.attributes.keys():
            for store in self._index.attributes[name]:
                self._note(store, name, f"the attribute {name}", frozenset())
        for name in names & self._index.of_leaves.keys():
            self.of_leaves += [(store, name, store[name]) for store in self._index.of_leaves.pop(name)]

    def see_class(self, cls: type) -> None:
        """Notes a class of the user's that may have been met, its bases, and classes in it."""
        for base in type.mro(cls):
            module = str(base.__module__)
            is_written_in_python = base.__flags__ & 1 << 9
            if base in self._classes or not is_written_in_python or is_trusted(module) or is_of_python(module):
                continue
            self._classes.add(base)
            self.places.append(ClassPlace(base))
            self._index.add_class(base)
            for value in list(vars(base).values()):
                if isinstance(value, type):
                    self.see_class(value)

    def note_globals(self, frame: types.FrameType, facts: Code) -> None:
        for name in sorted(facts.globals):
            self._note(frame.f_globals, name, f"the global {name}", facts.names)

    def note_function(self, frame: types.FrameType, names: frozenset[str]) -> None:
        """The variables of enclosing functions, and the default arguments."""
        code = frame.f_code
        for function, store in self._functions_of(frame):
            self._note(store, code.co_name, code.co_name, frozenset())
            variables = _Variables(function)
            for name in code.co_freevars:
                if name != "__class__":
                    self._note(variables, name, f"{name}, a variable of an enclosing function", names)
            for name in ("__defaults__", "__kwdefaults__"):
                self._note(variables, name, f"a default argument of {code.co_name}", frozenset())

    def _functions_of(self, frame: types.FrameType) -> list[tuple[types.FunctionType, Any]]:
        """The functions with the code of a frame, each with what has it by its name, if that is known."""
        code = frame.f_code
        if not set(code.co_freevars) - {"__class__"}:  # there may be several, each with variables of its own
            places: list[Any] = [frame.f_globals]
            if code.co_argcount:
                places += map(_OfClass, type.mro(_class_of_first(frame)))
            for place in places:
                found = place.get(code.co_name)
                found = getattr(found, "__func__", found)
                if isinstance(found, types.FunctionType) and found.__code__ is code:
                    return [(found, place)]
            if id(code) in self._index.functions:
                return [(function, {}) for function in self._index.functions[id(code)]]
        return [(function, {}) for function in self._functions.of(frame)]

    def settle(self) -> None:
        """The forward has run: functions that it has not read need not stay alive."""
        self._functions = _Functions()

    def _note(self, store: Any, name: str, words: str, names: frozenset[str]) -> None:
        """Notes a value; of Python modules, whose content is not their own, and functions what the names tell."""
        value = store.get(name, MISSING)
        key = store if isinstance(store, _OfClass) else id(store), name
        if value is MISSING or key in self._known:
            return
        self._known.add(key)
        if isinstance(value, functools._lru_cache_wrapper):
            raise Refusal(f"its forward reads {words}, a function that keeps its results")
        home = str(value.__module__) if isinstance(value, type) else "builtins"
        if home != "builtins" and is_of_python(home) and not is_trusted(home):
            raise Refusal(f"its forward uses {home}.{value.__name__}")
        try:
            place = Place(store, name, words, self.ids)
        except Unwatchable as error:
            raise Refusal(f"its forward reads {words}, {error}") from None
        self.places.append(place)
        for cls in [*place.classes, *([value] if isinstance(value, type) else [])]:
            self.see_class(cls)
        is_module = isinstance(value, types.ModuleType)
        if (is_module and not is_trusted(value.__name__)) or isinstance(value, types.FunctionType):
            for attribute in sorted(names & vars(value).keys()):
                self._note(vars(value), attribute, f"{name}.{attribute}", names)


def _class_of_first(frame: types.FrameType) -> type:
    """The class that a function's first argument is, or is of."""
    first = frame.f_locals.get(frame.f_code.co_varnames[0])
    return first if issubclass(type(first), type) else type(first)

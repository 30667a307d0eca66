"""Watches a stranger's forward while torch.fx traces it, and refuses what a graph would freeze or lose.

A graph repeats what the forward did with its tensors, and nothing else. So a forward may only be traced if it does
nothing else, and if what it read besides can be looked at again before every call. `Observer` sees every function that
the forward enters, before it runs: Python functions by their code, functions of C by a list of those that are known to
compute from their arguments alone. What a function reads by name (attributes, globals, variables of enclosing
functions) is kept in `reads`. Torch's own functions are trusted; what they do to real tensors, a mode of the dispatcher
sees. What is noticed too late is put back.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import importlib
import itertools
import random
import re
import sys
import types
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .contents import Place, Unwatchable, is_fixed


class Untraceable(Exception):
    """The message completes "not traced: "."""


class Refusal(BaseException):
    """As `Untraceable`, from inside of the user's code, which is not meant to catch it."""


# ------------------------------------------------------------------------------------------ what is harmless


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TRUSTED = _words(
    """torch fastconv abc collections _collections_abc contextlib copy copyreg dataclasses enum functools importlib
    inspect dis opcode keyword numbers operator re sre_parse sre_compile sre_constants reprlib string types typing
    typing_extensions weakref _weakrefset"""
)
# Of torch: what reads or sets the state of the process. And networks of our own are like any other's.
_NOT_TRUSTED = (
    *("torch.backends", "torch.random", "torch.cuda.random", "torch.serialization", "torch.hub", "torch._dynamo"),
    *("torch.distributed", "torch.utils.data", "torch.utils.tensorboard", "fastconv.models"),
)
# Functions of Python code that is trusted else.
_REFUSED = {
    contextlib.suppress.__init__.__code__: "its forward handles exceptions",
    torch.typename.__code__: "its forward tests the type of a value",
}
# Methods of these read and write their own content alone.
_VALUES: tuple[type, ...] = (
    *(str, bytes, bytearray, int, float, complex, bool, range, slice, tuple, list, dict, set, frozenset, deque),
    *(types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()), re.Pattern, re.Match),
)
# Functions of C, by their modules; and modules of which all are harmless, but for two.
_FUNCTIONS = {
    "builtins": _words(
        """abs all any ascii callable chr delattr divmod format getattr hasattr isinstance issubclass iter len max min
        ord pow repr round setattr sorted sum __build_class__ __import__"""
    ),
    "torch._C": {"_log_api_usage_once", "_get_tracing_state", "_is_tracing", "_are_functorch_transforms_active"},
}
_MODULES = _words(
    """math cmath _operator operator _functools _collections _abc _typing _sre itertools torch._C._nn torch._C._linalg
    torch._C._special torch._C._fft torch._C._sparse"""
)
_NOT_FOR_TENSORS = {"concat", "iconcat"}  # which an object with + takes for its own
# Methods by which a tensor's numbers leave torch.
_READERS = _words("numpy tolist item data_ptr __array__ __dlpack__ untyped_storage storage share_memory_")
_MOST_EVENTS = 5_000_000  # calls and returns of the user's functions, and of C functions there


def _is_harmless(function: Any) -> bool:
    """Whether a function of C depends on its arguments alone, and changes nothing but those."""
    owner, name = getattr(function, "__self__", None), function.__name__
    if owner is None and function == getattr(torch._C._VariableFunctions, name, None):
        return True
    if name in _FUNCTIONS.get(function.__module__, ()):
        return True
    if isinstance(owner, types.ModuleType):
        return owner.__name__ in _MODULES and name not in _NOT_FOR_TENSORS
    if isinstance(owner, type):
        return name == "__new__" or issubclass(owner, _VALUES) or owner.__module__.partition(".")[0] == "torch"
    if isinstance(owner, (torch.Tensor, torch.dtype, torch.device)):
        return name not in _READERS
    return isinstance(owner, _VALUES)


def _name_of(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__qualname__", function.__name__)
    module = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(function, "__module__", None)
    return name if module in (None, "builtins") else f"{module}.{name}"


# ------------------------------------------------------------------------------------------ what code reads


class _Code:
    """What can be said of a function's code before it runs."""

    def __init__(self, code: types.CodeType) -> None:
        self.names = frozenset(code.co_names)
        self.globals: set[str] = set()
        self.refusal = ""
        steps = list(dis.get_instructions(code))
        names = [step.opname for step in steps]
        ends = sum(one == "POP_EXCEPT" and two != "RERAISE" for one, two in itertools.pairwise(names))
        if ends > names.count("WITH_EXCEPT_START"):  # an "except:" without a type
            self.refusal = "its forward handles exceptions"
        for step in steps:
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.globals.add(step.argval)
            elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                self.refusal = f"its forward writes the global {step.argval}"
            elif step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in code.co_freevars:
                self.refusal = f"its forward writes {step.argval}, a variable of an enclosing function"
            elif step.opname == "MATCH_CLASS":
                self.refusal = "its forward tests the type of a value"
            elif step.opname in ("CHECK_EXC_MATCH", "CHECK_EG_MATCH", "JUMP_IF_NOT_EXC_MATCH"):
                self.refusal = "its forward handles exceptions"


_facts_of = functools.lru_cache(maxsize=4096)(_Code)


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

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.cls, name, value)


class _Index:
    """The attributes of a tree of modules, by name: those whose content may change, and where they are."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.modules())
        self.ids = frozenset(map(id, self.modules))
        self.attributes: dict[str, list[Any]] = {}
        self.functions: dict[types.CodeType, list[types.FunctionType]] = {}  # that are attributes, by their code
        for module in self.modules:
            for name, value in vars(module).items():
                if isinstance(value, types.FunctionType):
                    self.functions.setdefault(value.__code__, []).append(value)
                if not (name in BOOKKEEPING or is_fixed(value, self.ids)):
                    self.attributes.setdefault(name, []).append(vars(module))
        for cls in {base for module in self.modules for base in type(module).__mro__}:
            if not _is_trusted(cls.__module__):
                for name, value in vars(cls).items():
                    if not (name.startswith("__") or callable(value) or hasattr(value, "__get__")):
                        self.attributes.setdefault(name, []).append(_OfClass(cls))


_IMPORT = importlib._bootstrap._find_and_load.__code__  # type: ignore[attr-defined]
REGION = "_fastconv_region"  # where a swapped module keeps its programs, in its __dict__
BOOKKEEPING = {*vars(nn.Module()), REGION}  # attributes of every module that no forward reads


@functools.lru_cache(maxsize=4096)
def _is_trusted(module: str) -> bool:
    if module.startswith("namedtuple_"):
        return True  # what collections has made
    return module.partition(".")[0] in _TRUSTED and not f"{module}.".startswith(tuple(f"{n}." for n in _NOT_TRUSTED))


def _is_of_python(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names and module != "__main__"


# ---------------------------------------------------------------------------------------------- the observer


def is_possible() -> bool:
    """Whether the thread can be observed: a profiler written in C, once replaced, cannot be put back from Python."""
    profiler = sys.getprofile()
    return profiler is None or callable(profiler)


class Observer:
    """Within it, the thread's Python code is observed.

    Args:
        root: the module whose forward is going to run.

    Attributes:
        reads: what the forward read and may change.
    """

    def __init__(self, root: nn.Module) -> None:
        self.reads: list[Place] = []
        self._index = _Index(root)
        self._codes: dict[types.CodeType, bool] = {}  # those that ran: whether they are trusted
        self._inner: set[types.CodeType] = set()  # defined by functions that ran
        self._known: set[tuple[Any, str]] = set()
        self._calls: list[Any] = []  # functions of C that user code is in
        self._failed = ""
        self._events = 0
        self._importing: types.FrameType | None = None
        self._injected: list[dict[str, Any]] = []
        self._mode = _RealTensors()

    # What a proxy may ask

    def asks_for_type(self) -> bool | None:
        """Whether it is the user's isinstance() that wants to know; None where no function of C is under way."""
        return self._calls[-1] is isinstance if self._calls else None

    def is_probing(self) -> bool:
        """Whether the user's code tries if there is an attribute."""
        return bool(self._calls) and self._calls[-1] in (hasattr, getattr)

    # The block

    def __enter__(self) -> Observer:
        self._attributes = [(values, dict(values)) for m in self._index.modules for values in _attributes(m)]
        self._random = _RandomState()
        self._profiler = sys.getprofile()
        self._collects = gc.isenabled()
        gc.disable()  # what it calls would be taken for the forward's own
        self._mode.__enter__()
        sys.setprofile(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and sys.getprofile() is not self:
            self._failed = self._failed or "what observes it"
        sys.setprofile(None)
        if self._collects:
            gc.enable()
        self._mode.__exit__(None, None, None)
        for namespace in self._injected:
            del namespace["type"]
        problem = self._undo()
        sys.setprofile(self._profiler)
        if problem and kind is None:
            raise Untraceable(problem)

    def _undo(self) -> str:
        """Puts everything back; what had to be, in words."""
        changed = sorted(
            {
                str(name)
                for values, old in self._attributes
                for name in values.keys() | old.keys()
                if values.get(name) is not old.get(name)
            }
        )
        for values, old in self._attributes:
            if values.keys() != old.keys() or any(values[k] is not old[k] for k in old):
                values.clear()
                values.update(old)
        written = [place for place in self.reads if not place.holds()]
        for place in reversed(written):
            place.restore()
        drawn = self._random.is_used()
        if drawn:
            self._random.restore()
        if changed:
            return f"its forward changes attributes of the modules: {', '.join(changed)}"
        if written:
            return f"its forward changes {written[0].words}"
        if drawn:
            return "its forward draws random numbers"
        return self._failed and f"its forward handles a failure of {self._failed}"

    # What the interpreter reports

    def __call__(self, frame: types.FrameType, event: str, function: Any) -> None:
        if self._importing is not None:  # what a module does when it is first imported, it does once in a process
            if event == "return" and frame is self._importing:
                self._importing = None
            return
        if event == "call" and frame.f_code is _IMPORT:
            self._importing = frame
            return
        trusted = self._codes.get(frame.f_code)
        if trusted is None:
            trusted = self._meet(frame)
        if trusted:
            return
        self._events += 1
        if self._events > _MOST_EVENTS:
            raise Refusal("its forward takes too long")
        if event == "c_call":
            if not _is_harmless(function):
                drawn = "random" in type(getattr(function, "__self__", None)).__module__
                raise Refusal(f"its forward {'draws random numbers with' if drawn else 'calls'} {_name_of(function)}")
            self._calls.append(function)
            if function is getattr or function is setattr:
                self._read_attributes(self._index.attributes)
        elif event == "c_return":
            self._calls.pop()
        elif event == "c_exception":
            self._failed = _name_of(self._calls.pop())

    def _meet(self, frame: types.FrameType) -> bool:
        """Looks at a function that runs for the first time; whether it is trusted."""
        code, module = frame.f_code, frame.f_globals.get("__name__") or ""
        if code in _REFUSED:
            raise Refusal(_REFUSED[code])
        if _is_trusted(module):
            self._codes[code] = True
            return True
        if _is_of_python(module) or module.startswith("torch."):
            if self._is_for_torch(frame):
                return True
            raise Refusal(f"its forward uses {module}.{code.co_name}")
        self._codes[code] = False
        facts = _facts_of(code)
        if facts.refusal:
            raise Refusal(facts.refusal)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._inner.add(constant)
        self._read_attributes(facts.names & self._index.attributes.keys())
        for name in sorted(facts.globals):
            self._read(frame.f_globals, name, f"the global {name}", facts.names)
        if "type" in facts.globals and "type" not in frame.f_globals:
            frame.f_globals["type"] = _TypeOfProxies
            self._injected.append(frame.f_globals)
        if code not in self._inner:
            self._read_function(frame, facts.names)
        return False

    def _is_for_torch(self, frame: types.FrameType) -> bool:
        """Whether it was torch that called the function, and not the user."""
        caller = frame.f_back
        while caller is not None and self._codes.get(caller.f_code) is not False:
            if caller.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fastconv"):
                return True
            caller = caller.f_back
        return False

    def _read_attributes(self, names: Any) -> None:
        for name in names:
            for store in self._index.attributes[name]:
                self._read(store, name, f"the attribute {name}", frozenset())

    def _read_function(self, frame: types.FrameType, names: frozenset[str]) -> None:
        """The variables of enclosing functions, and the default arguments."""
        code = frame.f_code
        for function, store in self._functions_of(frame):
            self._read(store, code.co_name, code.co_name, frozenset())
            variables = _Variables(function)
            for name in code.co_freevars:
                if name != "__class__":
                    self._read(variables, name, f"{name}, a variable of an enclosing function", names)
            for name in ("__defaults__", "__kwdefaults__"):
                self._read(variables, name, f"a default argument of {code.co_name}", frozenset())

    def _functions_of(self, frame: types.FrameType) -> list[tuple[types.FunctionType, Any]]:
        """The functions with the code of a frame, each with what has it by its name, if that is known."""
        code = frame.f_code
        if not set(code.co_freevars) - {"__class__"}:  # there may be several, each with variables of its own
            places: list[Any] = [frame.f_globals]
            if code.co_argcount:
                first = frame.f_locals.get(code.co_varnames[0])
                places += map(_OfClass, type.mro(first if issubclass(type(first), type) else type(first)))
            for place in places:
                found = place.get(code.co_name)
                found = getattr(found, "__func__", found)
                if isinstance(found, types.FunctionType) and found.__code__ is code:
                    return [(found, place)]
            if code in self._index.functions:
                return [(function, {}) for function in self._index.functions[code]]
        return [(found, {}) for found in gc.get_referrers(code) if isinstance(found, types.FunctionType)]

    def _read(self, store: Any, name: str, words: str, names: frozenset[str]) -> None:
        """Notes a value; of Python modules and classes, whose content is not their own, what the names tell."""
        value = store.get(name, _MISSING)
        key = store if isinstance(store, _OfClass) else id(store), name
        if value is _MISSING or key in self._known:
            return
        self._known.add(key)
        try:
            self.reads.append(Place(store, name, words, self._index.ids))
        except Unwatchable as error:
            raise Refusal(f"its forward reads {words}, {error}") from None
        is_module = isinstance(value, types.ModuleType)
        if not (is_module or isinstance(value, type)) or _is_trusted(value.__name__ if is_module else value.__module__):
            return
        for attribute in sorted(names & vars(value).keys()):
            found = vars(value)[attribute]
            if is_module or not (callable(found) or hasattr(found, "__get__")):
                inner = vars(value) if is_module else _OfClass(value)
                self._read(inner, attribute, f"{name}.{attribute}", names)


_MISSING = object()


def _attributes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return vars(module), module._parameters, module._buffers, module._modules


class _RandomState:
    """Of Python's, torch's and NumPy's own generators."""

    def __init__(self) -> None:
        self._numpy = getattr(sys.modules.get("numpy"), "random", None)
        self._state = self._now()

    def is_used(self) -> bool:
        python, of_torch, numpy = self._now()
        before = self._state
        return python != before[0] or not torch.equal(of_torch, before[1]) or repr(numpy) != repr(before[2])

    def restore(self) -> None:
        random.setstate(self._state[0])
        torch.set_rng_state(self._state[1])
        if self._numpy:
            self._numpy.set_state(self._state[2])

    def _now(self) -> tuple[Any, ...]:
        return random.getstate(), torch.get_rng_state(), self._numpy and self._numpy.get_state(legacy=False)


class _AsType(type):
    def __call__(cls, *args: Any, **named: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.fx.Proxy):
            raise Refusal("its forward tests the type of a value")
        return type(*args, **named)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)


class _TypeOfProxies(type, metaclass=_AsType):
    """Stands for `type` in the user's code: a proxy's type is nothing to go by."""


class _RealTensors(TorchDispatchMode):
    """Refuses what would change the tensors that are there, read their numbers, or draw random ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise Refusal(f"its forward writes a tensor that is not computed in it ({func.name()})")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refusal("its forward draws random numbers")
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.equal.default:
            raise Refusal("its forward reads a tensor's numbers")
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------- functions of autograd's own kind


class Applied:
    """A call of a torch.autograd.Function, whose backward is the user's own."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = f"{function.__name__}.apply"

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)

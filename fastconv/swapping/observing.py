"""Watches a stranger's forward while torch.fx traces it, and refuses what a graph would freeze or lose.

A graph repeats what the forward did with its tensors, and nothing else. So a forward may only be traced if it does
nothing else, and if what it read besides can be looked at again before every call. `Observer` sees every function that
the forward enters, before it runs: Python functions by their code, functions of C by a list of those that are known to
compute from their arguments alone. Code that writes attributes or globals, handles exceptions, enters context managers
of its own or asks which object a value is does not run at all. What a function reads by name (attributes, globals,
variables of enclosing functions) is kept in `reads`. Torch's own functions are trusted, but for those that change
modules or the state of the process; what they do to real tensors, a mode of the dispatcher sees. What is noticed too
late, such as the content of a container, is put back.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import gc
import importlib
import inspect
import re
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from .contents import MISSING, ClassPlace, Place, Unwatchable, is_fixed


class Untraceable(Exception):
    """The message completes "not traced: "."""


class Refusal(BaseException):
    """As `Untraceable`, from inside of the user's code. The thread's first one counts, whoever catches it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        if not _refused.reason:
            _refused.reason = reason


class _Refused(threading.local):
    reason = ""


_refused = _Refused()


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
    *("torch._functorch.functional_call", "torch.nn.utils.stateless"),  # which exchange parameters
    *("torch.backends", "torch.random", "torch.cuda.random", "torch.serialization", "torch.hub", "torch._dynamo"),
    *("torch.distributed", "torch.utils.data", "torch.utils.tensorboard", "fastconv.models"),
)
_CHANGING = _words(
    """add_module apply bfloat16 compile cpu cuda double eval float half load_state_dict requires_grad_
    set_extra_state set_submodule share_memory to to_empty train type zero_grad __setattr__ __delattr__ __setstate__"""
)
# Functions of Python code that is trusted else.
_REFUSED = {
    contextlib.suppress.__init__.__code__: "its forward handles exceptions",
    importlib.import_module.__code__: "its forward imports a module",
    torch.typename.__code__: "its forward tests the type of a value",
    RemovableHandle.__init__.__code__: "its forward registers a hook",
    **{
        inspect.unwrap(function).__code__: f"its forward uses {module.__name__}.{name}"
        for module in (torch.random, torch.cuda.random)
        for name, function in vars(module).items()
        if isinstance(function, types.FunctionType) and "get" not in name  # which checkpointing calls
    },
    **{
        function.__code__: f"its forward changes a module ({name})"
        for name, function in vars(nn.Module).items()
        if isinstance(function, types.FunctionType) and (name in _CHANGING or name.startswith("register_"))
    },
}
# Functions whose results are the parameters themselves, refused to the user alone.
_GIVING_PARAMETERS = {
    getattr(nn.Module, name).__code__
    for name in _words("parameters named_parameters buffers named_buffers state_dict get_parameter get_buffer")
}
# Functions of these two modules that read or set the state of the process.
_WITH_STATE = ("torch", "torch._tensor_str")
_OF_STATE = ("set_", "get_", "use_", "are_", "is_warn", "is_deterministic")
# Methods of these read and write their own content alone.
_VALUES: tuple[type, ...] = (
    *(str, bytes, bytearray, int, float, complex, bool, range, slice, tuple, list, dict, set, frozenset, deque),
    *(types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()), re.Pattern, re.Match),
)
# Functions of C, by their modules; and modules of which all are harmless, but for two.
_FUNCTIONS = {
    "builtins": _words(
        """abs all any ascii chr divmod format getattr hasattr isinstance issubclass iter len max min ord pow
        repr round sorted sum __build_class__ __import__"""
    ),
    "torch._C": {"_log_api_usage_once", "_get_tracing_state", "_is_tracing", "_are_functorch_transforms_active"},
}
_MODULES = _words(
    """math cmath _operator operator _functools _collections _abc _typing _sre itertools torch._C._nn torch._C._linalg
    torch._C._special torch._C._fft torch._C._sparse"""
)
_NOT_FOR_TENSORS = {"concat", "iconcat"}  # which an object with + takes for its own
# Methods by which a tensor's numbers leave torch, and those that the dispatcher does not see.
_READERS = _words("numpy tolist item data_ptr __array__ __dlpack__ untyped_storage storage share_memory_")
_SETTERS = _words("requires_grad_ retain_grad")
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
        return name not in _READERS | _SETTERS
    return isinstance(owner, _VALUES)


def _name_of(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__qualname__", function.__name__)
    module = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(function, "__module__", None)
    return name if module in (None, "builtins") else f"{module}.{name}"


# ------------------------------------------------------------------------------------------ what code reads


# By these names attributes are reached that no name tells of.
_BACK_DOORS = _words(
    """__dict__ __setattr__ __delattr__ __getattribute__ __globals__ __closure__ attrgetter methodcaller _parameters
    _buffers _modules _non_persistent_buffers_set _forward_hooks _forward_pre_hooks _backward_hooks
    _backward_pre_hooks"""
)
# Functions of C that call those they are given, which the interpreter does not report.
_CALLING = _words("map filter sorted min max reduce accumulate starmap partial")


class _Code:
    """What can be said of a function's code before it runs."""

    def __init__(self, code: types.CodeType) -> None:
        self.names = frozenset(code.co_names)
        steps = list(dis.get_instructions(code))
        self.globals = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        self.tests_none = any("_NONE" in step.opname or step.opname == "IS_OP" for step in steps)
        self.refusal = next(_refusals(code, steps), "")


def _refusals(code: types.CodeType, steps: list[dis.Instruction]) -> Iterator[str]:
    names = [step.opname for step in steps]
    # "except" and "finally"; what a "with" does about exceptions is its context's business.
    if "SETUP_FINALLY" in names or names.count("PUSH_EXC_INFO") > names.count("WITH_EXCEPT_START"):
        yield "its forward handles exceptions"
    if code.co_name in ("__enter__", "__aenter__"):
        yield "its forward enters a context manager of its own"
    generated = code.co_filename == "<string>"  # by dataclasses and collections
    for name in sorted(_BACK_DOORS & set(code.co_names)):
        if not generated:
            yield f"its forward uses {name}"
    for i, step in enumerate(steps):
        before = steps[i - 1] if i else step
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            yield f"its forward writes the global {step.argval}"
        elif step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in code.co_freevars:
            yield f"its forward writes {step.argval}, a variable of an enclosing function"
        elif step.opname in ("STORE_ATTR", "DELETE_ATTR") and not _is_of_new_object(code, before):
            yield f"its forward writes the attribute {step.argval}"
        elif step.opname == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None):
            yield "its forward asks which object a value is"
        elif step.opname in ("MATCH_CLASS", "MATCH_SEQUENCE", "MATCH_MAPPING"):
            yield "its forward tests the type of a value"
        elif step.opname == "IMPORT_NAME":
            absolute = steps[i - 2].argval == 0
            if not (absolute and (_is_trusted(step.argval) or step.argval in _MODULES)):
                yield f"its forward imports {step.argval or 'a module'}"


def _is_of_new_object(code: types.CodeType, before: dis.Instruction) -> bool:
    """Whether an attribute is written in a constructor, to `self`."""
    if code.co_name not in ("__init__", "__post_init__") or "LOAD_FAST" not in before.opname:
        return False
    loaded = before.argval[-1] if isinstance(before.argval, tuple) else before.argval
    return code.co_argcount > 0 and loaded == code.co_varnames[0]


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


class _Index:
    """The attributes of a tree of modules, and of classes, by name: where they are.

    Attributes:
        attributes: those whose content may change.
        of_leaves: the others of modules that a graph calls as a whole.
    """

    def __init__(self, root: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        self.modules = list(root.modules())
        self.ids = frozenset(map(id, self.modules))
        self.attributes: dict[str, list[Any]] = {}
        self.of_leaves: dict[str, list[dict[str, Any]]] = {}
        self.functions: dict[types.CodeType, list[types.FunctionType]] = {}  # that are attributes, by their code
        for module in self.modules:
            leaves = module is not root and is_leaf(module)
            for name, value in vars(module).items():
                if isinstance(value, types.FunctionType):
                    self.functions.setdefault(value.__code__, []).append(value)
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
        is_leaf: whether a graph calls a module as a whole.

    Attributes:
        reads: what the forward read and may change, beside attributes of the modules whose forwards are traced.
        of_leaves: attributes of the other modules that it may have read: dictionary, name and value.
        ambient: the modes that it has to run in.
        tests_none: whether it asks if anything is None.
    """

    def __init__(self, root: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        self.reads: list[Place | ClassPlace] = []
        self.of_leaves: list[tuple[dict[str, Any], str, Any]] = []
        self.ambient = ambient()
        self.tests_none = False
        self._index = _Index(root, is_leaf)
        self._arguments: Place | None = None
        self._classes: set[type] = set()
        self._codes: dict[types.CodeType, bool] = {}  # those that ran: whether they are trusted
        self._inner: set[types.CodeType] = set()  # defined by functions that ran
        self._known: set[tuple[Any, str]] = set()
        self._calls: list[Any] = []  # functions of C that user code is in
        self._failed = ""
        self._events = 0
        self._importing: types.FrameType | None = None
        self._mode = _RealTensors()

    # What a proxy may ask

    def asks_for_type(self) -> bool | None:
        """Whether it is the user's isinstance() that wants to know; None where no function of C is under way."""
        return self._calls[-1] is isinstance if self._calls else None

    def is_probing(self) -> bool:
        """Whether the user's code tries if there is an attribute."""
        return bool(self._calls) and self._calls[-1] in (hasattr, getattr)

    # What goes in and comes out

    def take_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward must not write to the containers in its arguments: a graph gets their tensors alone."""
        try:
            self._arguments = Place({"": (args, kwargs)}, "", "its arguments", self._index.ids)
        except Unwatchable as error:
            raise Refusal(f"its forward has an argument {error}") from None

    def check_result(self, result: Any) -> None:
        """A graph returns containers of its own making."""
        places = [*self.reads, *filter(None, [self._arguments])]
        old = {id(container) for place in places for container, _ in place.containers}
        waiting, seen = [result], set()
        while waiting:
            value = waiting.pop()
            if id(value) in old or (id(value) in seen and isinstance(value, (dict, list))):
                raise Refusal("its forward returns a container that it did not make, or twice")
            if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                seen.add(id(value))
                waiting += dict.values(value) if isinstance(value, dict) else value

    # The block

    def __enter__(self) -> Observer:
        # Parameters and buffers are shared with the original, which may be at work in another thread.
        modules = [m for m in self._index.modules if not isinstance(m, torch.jit.ScriptModule)]
        stores = [store for m in modules for store in (vars(m), m._modules)]
        self._attributes = [(store, dict(store)) for store in stores]
        for module in self._index.modules:
            self._see_class(type(module))
        _refused.reason = ""
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
        problem = self._undo()
        sys.setprofile(self._profiler)
        if problem and kind is None:
            raise Untraceable(problem)

    def _undo(self) -> str:
        """Puts everything back; what had to be, in words."""
        changed = sorted({name for store, old in self._attributes for name in _put_back(store, old)})
        places = [*self.reads, *filter(None, [self._arguments])]
        written = [place for place in places if not place.holds()]
        for place in reversed(written):
            place.restore()
        for place in places:
            place.settle()
        sets_modes = ambient() != self.ambient
        torch._C._set_grad_enabled(self.ambient[0])
        if _refused.reason:
            return _refused.reason
        if changed:
            return f"its forward changes attributes of the modules: {', '.join(changed)}"
        if written:
            return f"its forward changes {written[0].words}"
        if sets_modes:
            return SETS_MODES
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
            if function is getattr:
                self._read_attributes(self._index.attributes.keys() | self._index.of_leaves.keys())
        elif event == "c_return":
            self._calls.pop()
        elif event == "c_exception":
            self._failed = _name_of(self._calls.pop())

    def _meet(self, frame: types.FrameType) -> bool:
        """Looks at a function that runs for the first time; whether it is trusted."""
        code, module = frame.f_code, frame.f_globals.get("__name__") or ""
        if code in _REFUSED:
            raise Refusal(_REFUSED[code])
        if code in _GIVING_PARAMETERS:
            if self._is_for_torch(frame):
                return True
            raise Refusal(f"its forward goes through its {code.co_name}")
        if module in _WITH_STATE and code.co_name.startswith(_OF_STATE):
            if self._is_for_torch(frame):
                return True
            raise Refusal(f"its forward calls torch.{code.co_name}")
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
        caller = frame.f_back.f_globals.get("__name__") if frame.f_back else ""
        if code.co_flags & inspect.CO_GENERATOR and caller == "contextlib":
            raise Refusal("its forward enters a context manager of its own")
        self.tests_none = self.tests_none or facts.tests_none
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._inner.add(constant)
        for name in sorted(facts.globals):
            self._read(frame.f_globals, name, f"the global {name}", facts.names)
        self._check_builtins(frame, facts)
        if code not in self._inner:
            self._read_function(frame, facts.names)
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            self._see_class(first if issubclass(type(first), type) else type(first))
        count = -1
        while count != len(self.reads):  # which may have led to further classes
            count = len(self.reads)
            self._read_attributes(facts.names)
        return False

    def _check_builtins(self, frame: types.FrameType, facts: _Code) -> None:
        """Refuses what a call does not show: the type of a traced value, and functions of C that others of C call."""
        found = {name: getattr(builtins, name, None) for name in facts.globals if name not in frame.f_globals}
        if "type" in found:
            raise Refusal("its forward tests the type of a value")
        if not _CALLING & facts.names:
            return
        found |= {name: frame.f_globals.get(name) for name in facts.globals - found.keys()}
        for name, function in sorted(found.items()):
            if isinstance(function, types.BuiltinFunctionType) and not _is_harmless(function):
                raise Refusal(f"its forward passes {name} on")

    def _is_for_torch(self, frame: types.FrameType) -> bool:
        """Whether it was torch that called the function, and not the user."""
        caller = frame.f_back
        while caller is not None and self._codes.get(caller.f_code) is not False:
            if caller.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fastconv"):
                return True
            caller = caller.f_back
        return False

    def _read_attributes(self, names: Any) -> None:
        for name in names & self._index.attributes.keys():
            for store in self._index.attributes[name]:
                self._read(store, name, f"the attribute {name}", frozenset())
        for name in names & self._index.of_leaves.keys():
            self.of_leaves += [(store, name, store[name]) for store in self._index.of_leaves.pop(name)]

    def _see_class(self, cls: type) -> None:
        """Notes a class of the user's that may have been met, its bases, and classes in it."""
        for base in type.mro(cls):
            module = str(base.__module__)
            is_written_in_python = base.__flags__ & 1 << 9
            if base in self._classes or not is_written_in_python or _is_trusted(module) or _is_of_python(module):
                continue
            self._classes.add(base)
            self.reads.append(ClassPlace(base))
            self._index.add_class(base)
            for value in list(vars(base).values()):
                if isinstance(value, type):
                    self._see_class(value)

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
        """Notes a value; of Python modules, whose content is not their own, and functions what the names tell."""
        value = store.get(name, MISSING)
        key = store if isinstance(store, _OfClass) else id(store), name
        if value is MISSING or key in self._known:
            return
        self._known.add(key)
        if isinstance(value, functools._lru_cache_wrapper):
            raise Refusal(f"its forward reads {words}, a function that keeps its results")
        home = str(value.__module__) if isinstance(value, type) else "builtins"
        if home != "builtins" and _is_of_python(home) and not _is_trusted(home):
            raise Refusal(f"its forward uses {home}.{value.__name__}")
        try:
            place = Place(store, name, words, self._index.ids)
        except Unwatchable as error:
            raise Refusal(f"its forward reads {words}, {error}") from None
        self.reads.append(place)
        for cls in [*place.classes, *([value] if isinstance(value, type) else [])]:
            self._see_class(cls)
        is_module = isinstance(value, types.ModuleType)
        if (is_module and not _is_trusted(value.__name__)) or isinstance(value, types.FunctionType):
            for attribute in sorted(names & vars(value).keys()):
                self._read(vars(value), attribute, f"{name}.{attribute}", names)


def _put_back(store: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """Restores a dictionary of attributes; the names of those that were changed."""
    names = (store.keys() | old.keys()) - {REGION}  # which another thread may have filled
    changed = [name for name in names if store.get(name, MISSING) is not old.get(name, MISSING)]
    for name in changed:
        if name in old:
            store[name] = old[name]
        else:
            del store[name]
    if changed and [name for name in store if name != REGION] != [name for name in old if name != REGION]:
        ordered = {name: store[name] for name in [*old, *(store.keys() - old.keys())] if name in store}
        store.clear()
        store.update(ordered)
    return changed


SETS_MODES = "its forward sets a grad mode, autocast or checkpointing of its own"


def ambient() -> tuple[Any, ...]:
    """What a context manager inside a forward may change without leaving a trace."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


_READ_NUMBERS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.allclose.default,
)
_TAGS_OF_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _RealTensors(TorchDispatchMode):
    """Refuses what would change the tensors that are there, read their numbers, or draw random ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise Refusal(f"its forward writes a tensor that is not computed in it ({func.name()})")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refusal("its forward draws random numbers")
        if func in _READ_NUMBERS or _TAGS_OF_NUMBERS & set(func.tags):
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

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
import gc
import importlib
import inspect
import sys
import types
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .contents import MISSING, ClassPlace, Place, Unwatchable
from .harmless import (
    CALLING,
    GIVING_PARAMETERS,
    OF_STATE,
    REFUSED,
    WITH_STATE,
    Code,
    facts_of,
    is_harmless,
    is_of_python,
    is_trusted,
    name_of,
)
from .modules import REGION
from .reading import Reads
from .refusal import Refusal, Untraceable, first_refusal, forget_refusals

_MOST_EVENTS = 5_000_000  # calls and returns of the user's functions, and of C functions there
_IMPORT = importlib._bootstrap._find_and_load.__code__  # type: ignore[attr-defined]


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
        ambient: the modes that it has to run in.
        tests_none: whether it asks if anything is None.
    """

    def __init__(self, root: nn.Module) -> None:
        self.reads = Reads(root)
        self.ambient = ambient()
        self.tests_none = False
        self._arguments: Place | None = None
        self._trusted: dict[tuple[int, int], bool] = {}  # of each function that ran, by `_key`
        self._kept: list[Any] = []  # alive, so that nothing else gets their ids
        self._inner: set[int] = set()  # the ids of code that is defined by functions that ran
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
            self._arguments = Place({"": (args, kwargs)}, "", "its arguments", self.reads.ids)
        except Unwatchable as error:
            raise Refusal(f"its forward has an argument {error}") from None

    def check_result(self, result: Any) -> None:
        """A graph returns containers of its own making."""
        old = {id(container) for place in self._places() for container, _ in place.containers}
        waiting, seen = [result], set()
        while waiting:
            value = waiting.pop()
            if id(value) in old or (id(value) in seen and isinstance(value, (dict, list))):
                raise Refusal("its forward returns a container that it did not make, or twice")
            if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                seen.add(id(value))
                waiting += dict.values(value) if isinstance(value, dict) else value

    def _places(self) -> list[Place | ClassPlace]:
        return [*self.reads.places, *filter(None, [self._arguments])]

    # The block

    def __enter__(self) -> Observer:
        # Parameters and buffers are shared with the original, which may be at work in another thread.
        modules = [m for m in self.reads.modules if not isinstance(m, torch.jit.ScriptModule)]
        stores = [store for m in modules for store in (vars(m), m._modules)]
        self._attributes = [(store, dict(store)) for store in stores]
        for module in self.reads.modules:
            self.reads.see_class(type(module))
        forget_refusals()
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
        written = [place for place in self._places() if not place.holds()]
        for place in reversed(written):
            place.restore()
        for place in self._places():
            place.settle()
        self.reads.settle()
        sets_modes = ambient() != self.ambient
        torch._C._set_grad_enabled(self.ambient[0])
        if first_refusal():
            return first_refusal()
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
        trusted = self._trusted.get(_key(frame))
        if trusted is None:
            trusted = self._meet(frame)
        if trusted:
            return
        self._events += 1
        if self._events > _MOST_EVENTS:
            raise Refusal("its forward takes too long")
        if event == "c_call":
            if not is_harmless(function):
                drawn = "random" in type(getattr(function, "__self__", None)).__module__
                raise Refusal(f"its forward {'draws random numbers with' if drawn else 'calls'} {name_of(function)}")
            self._calls.append(function)
            if function is getattr:
                self.reads.note_all_attributes()
        elif event == "c_return":
            self._calls.pop()
        elif event == "c_exception":
            self._failed = name_of(self._calls.pop())

    def _meet(self, frame: types.FrameType) -> bool:
        """Looks at a function that runs for the first time; whether it is trusted."""
        code, module = frame.f_code, frame.f_globals.get("__name__") or ""
        if code in REFUSED:
            raise Refusal(REFUSED[code])
        if code in GIVING_PARAMETERS:
            if self._is_for_torch(frame):
                return True
            raise Refusal(f"its forward goes through its {code.co_name}")
        if module in WITH_STATE and code.co_name.startswith(OF_STATE):
            if self._is_for_torch(frame):
                return True
            raise Refusal(f"its forward calls torch.{code.co_name}")
        if is_trusted(module):
            self._remember(frame, trusted=True)
            return True
        if is_of_python(module) or module.startswith("torch."):
            if self._is_for_torch(frame):
                return True
            raise Refusal(f"its forward uses {module}.{code.co_name}")
        self._remember(frame, trusted=False)
        facts = facts_of(code)
        if facts.refusal:
            raise Refusal(facts.refusal)
        caller = frame.f_back.f_globals.get("__name__") if frame.f_back else ""
        if code.co_flags & inspect.CO_GENERATOR and caller == "contextlib":
            raise Refusal("its forward enters a context manager of its own")
        self.tests_none = self.tests_none or facts.tests_none
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._inner.add(id(constant))
        self.reads.note_globals(frame, facts)
        self._check_builtins(frame, facts)
        if id(code) not in self._inner:
            self.reads.note_function(frame, facts.names)
        self.reads.note_call(frame, facts.names)
        return False

    def _remember(self, frame: types.FrameType, *, trusted: bool) -> None:
        self._trusted[_key(frame)] = trusted
        self._kept += [frame.f_code, frame.f_globals]

    def _check_builtins(self, frame: types.FrameType, facts: Code) -> None:
        """Refuses what a call does not show: the type of a traced value, and functions of C that others of C call."""
        found = {name: getattr(builtins, name, None) for name in facts.globals if name not in frame.f_globals}
        if "type" in found:
            raise Refusal("its forward tests the type of a value")
        if not CALLING & facts.names:
            return
        found |= {name: frame.f_globals.get(name) for name in facts.globals - found.keys()}
        for name, function in sorted(found.items()):
            if isinstance(function, types.BuiltinFunctionType) and not is_harmless(function):
                raise Refusal(f"its forward passes {name} on")

    def _is_for_torch(self, frame: types.FrameType) -> bool:
        """Whether it was torch that called the function, and not the user."""
        caller = frame.f_back
        while caller is not None and self._trusted.get(_key(caller)) is not False:
            if caller.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fastconv"):
                return True
            caller = caller.f_back
        return False


def _key(frame: types.FrameType) -> tuple[int, int]:
    """What tells functions apart. Code of one text is equal, wherever it stands, and may run with several globals."""
    return id(frame.f_code), id(frame.f_globals)


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

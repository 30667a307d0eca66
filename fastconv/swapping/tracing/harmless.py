"""What code may run while a forward is traced: by whose it is, by its name, and by what its bytecode does."""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib
import inspect
import re
import sys
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


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
REFUSED = {
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
GIVING_PARAMETERS = {
    getattr(nn.Module, name).__code__
    for name in _words("parameters named_parameters buffers named_buffers state_dict get_parameter get_buffer")
}
# Functions of these two modules that read or set the state of the process.
WITH_STATE = ("torch", "torch._tensor_str")
OF_STATE = ("set_", "get_", "use_", "are_", "is_warn", "is_deterministic")
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


@functools.lru_cache(maxsize=4096)
def is_trusted(module: str) -> bool:
    if module.startswith("namedtuple_"):
        return True  # what collections has made
    return module.partition(".")[0] in _TRUSTED and not f"{module}.".startswith(tuple(f"{n}." for n in _NOT_TRUSTED))


def is_of_python(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names and module != "__main__"


def is_harmless(function: Any) -> bool:
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


def name_of(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__qualname__", function.__name__)
    module = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(function, "__module__", None)
    return name if module in (None, "builtins") else f"{module}.{name}"


# ------------------------------------------------------------------------------------------ what code says


# By these names attributes are reached that no name tells of.
_BACK_DOORS = _words(
    """__dict__ __setattr__ __delattr__ __getattribute__ __globals__ __closure__ attrgetter methodcaller _parameters
    _buffers _modules _non_persistent_buffers_set _forward_hooks _forward_pre_hooks _backward_hooks
    _backward_pre_hooks"""
)
# Functions of C that call those they are given, which the interpreter does not report.
CALLING = _words("map filter sorted min max reduce accumulate starmap partial")


class Code:
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
            if not (absolute and (is_trusted(step.argval) or step.argval in _MODULES)):
                yield f"its forward imports {step.argval or 'a module'}"


def _is_of_new_object(code: types.CodeType, before: dis.Instruction) -> bool:
    """Whether an attribute is written in a constructor, to `self`."""
    if code.co_name not in ("__init__", "__post_init__") or "LOAD_FAST" not in before.opname:
        return False
    loaded = before.argval[-1] if isinstance(before.argval, tuple) else before.argval
    return code.co_argcount > 0 and loaded == code.co_varnames[0]


facts_of = functools.lru_cache(maxsize=4096)(Code)

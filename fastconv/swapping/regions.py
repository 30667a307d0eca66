"""`swap`: a copy of a model whose modules' forwards run the programs that were traced from them."""

from __future__ import annotations

import abc
import functools
import importlib
import inspect
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from ..operators import backends, library
from .copying import clone
from .programs import Program, Programs
from .staleness import Watch
from .tracing.modules import REGION, is_leaf, is_region, plain_class
from .tracing.observing import is_possible
from .tracing.refusal import Untraceable

_SIGNATURES_KEPT = 8
_TRACES_KEPT = 4  # for each signature and mode
_TRACES_MADE = 64  # a module that never settles is not worth tracing
_FAILURES_MADE = 4  # for each signature and mode: a forward that counts its calls changes with every one
_CONSTANTS = (bool, int, float, str, type(None))


def swap(model: nn.Module, *, qualify: Tensor | Sequence[Any] | None = None) -> nn.Module:
    """A copy of a model that computes the same with fused ops; the model itself is left as it is.

    The two are one set of weights: the copy has the same Parameters and buffers, the very objects, under the same
    names, and whatever happens to them in either model (an optimizer's step, ``load_state_dict``, ``half()``) is seen
    by both. Make a ``copy.deepcopy`` of the result for one of its own. Modes (``train()``, ``eval()``), hooks,
    submodules and containers (lists, dicts, sets) belong to each model alone; other objects are shared.

    The copy is of a subclass of the model's class, of the same name, and differs in the forwards only (``type(module)
    is Block`` and ``super(type(self), self)`` see the difference). They run, in the order of what applies:

    - without gradients: convolutions with batch norm in evaluation mode folded in, residual and activation attached,
      and weights packed for the processor. What is packed follows every change of the weights, see
      `fastconv.swapping.staleness.PreparedWeights`.
    - with gradients, or under ``torch.compile``, ``torch.export`` and autocast: the differentiable ops of
      `fastconv.ops`.
    - otherwise, and wherever a forward cannot be traced safely, the forward as it was written.

    Only what the graph of the forward proves safe is fused; `fastconv.explain` says what that is, and why not the
    rest.

    Tracing runs the forward once, on stand-ins for its tensors, and does no harm. A forward is not traced if it writes
    attributes, globals or containers that are not its own, prints, reads the time, a mode or randomness, changes
    modules, handles exceptions, enters context managers of the user's, imports modules, tests types, or asks with
    ``is`` which object a value is (other than None). It is stopped before it does so; what it wrote to containers is
    put back; and its parts are swapped one by one. What a traced forward read (attributes, globals, variables of
    enclosing functions, the content of containers and objects, classes) is compared before every call;
    ``torch.compile`` gets the plain forward where content was read. Not seen: what a C extension does behind its
    arguments' back.

    A parametrization or pruning takes a parameter away from the layer and from what the two models share: register it
    before the swap, or on a ``copy.deepcopy`` of the result, if the original goes on being used.

    Args:
        model: any module.
        qualify: example inputs, one tensor or several, for which `fastconv.qualify` first finds out what is fastest
            on this machine, as far as that is not known yet.

    Raises:
        TypeError: it is not a module.

    >>> fast = fastconv.swap(model)
    >>> print(fastconv.explain(fast))
    """
    require_module("swap", model)
    if qualify is not None:
        inputs = (qualify,) if isinstance(qualify, Tensor) else qualify
        importlib.import_module("fastconv.qualification.qualify").qualify(model, *inputs)
    fast = clone(model)
    install(fast)
    trace_ahead(fast)
    return fast


def require_module(function: str, model: Any) -> None:
    """Raises for what is not a module, in the user's terms."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        got, remedy = f"the class {model.__name__}", f"make a module of it: {model.__name__}(...)"
    else:
        named = isinstance(model, type) or callable(model)
        got = f"{type(model).__name__} {getattr(model, '__name__', '')}".rstrip() if named else type(model).__name__
        remedy = "put what it computes into the forward of a module" if callable(model) else "pass the model itself"
    raise TypeError(f"fastconv.{function}: got {got}, needed a torch.nn.Module; {remedy}")


# ----------------------------------------------------------------------------------------------- the classes


def install(model: nn.Module) -> None:
    """Makes every module of the tree that has a forward of its own run programs."""
    for module in model.modules():
        if not is_leaf(module) and type(module).forward is not nn.Module.forward:
            # Not by way of a __setattr__ of the user's.
            object.__setattr__(module, "__class__", _fast_class(plain_class(module)))


@functools.cache
def _fast_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass that differs in its forward alone."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and vars(self).get(REGION) is None:
            return cls.forward(self, *args, **kwargs)
        program, tensors = region_of(self).choose(args, kwargs)
        if program is None:
            return cls.forward(self, *args, **kwargs)
        return program.forward(*tensors)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # For copy and pickle: an object of the user's class, of which the reader makes a fast one.
        state = {name: value for name, value in vars(self).items() if name != REGION}
        return _new, (cls,), state

    content = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": reduce,
        "fastconv_plain_class": cls,
        "forward": forward,
    }
    if type(cls) in (type, abc.ABCMeta) and not any("__init_subclass__" in vars(base) for base in cls.__mro__[:-1]):
        return type(cls)(cls.__name__, (cls,), content)
    # Classes that are told of their subclasses are not to hear of this one.
    fast = type.__new__(type(cls), cls.__name__, (nn.Module,), content)
    fast.__bases__ = (cls,)
    return fast


def _new(cls: type[nn.Module]) -> nn.Module:
    return object.__new__(_fast_class(cls))


# ----------------------------------------------------------------------------------------------- the regions


def trace_ahead(module: nn.Module) -> None:
    """Traces the usual call of a model in both modes; where that fails, of its parts.

    A call of another kind is traced when it comes. torch.compile and torch.export use what they find.
    """
    if is_region(module):
        programs = programs_of(module, module.training)
        programs_of(module, not module.training)
        if not isinstance(programs, str):
            return
    for child in module.children():
        trace_ahead(child)


def programs_of(module: nn.Module, mode: bool) -> Programs | str:
    """The programs for the usual call, all required arguments tensors, in training (True) or evaluation mode."""
    count = _required_arguments(module)
    if not count:
        return "its forward can be called in several ways"
    region = region_of(module)
    if mode == module.training:
        return region.programs(count, (torch.empty(0),) * count, {})
    flags = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in flags:
            vars(part)["training"] = mode
        return region.programs(count, (torch.empty(0),) * count, {})
    finally:
        for part, training in flags:
            vars(part)["training"] = training


def _required_arguments(module: nn.Module) -> int:
    """How many positional arguments the forward has to be given; 0 if it takes any other way to call it."""
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    return len(required) if all(p.kind is p.POSITIONAL_OR_KEYWORD for p in required) else 0


def region_of(module: nn.Module) -> Region:
    region = vars(module).get(REGION)  # None is a place that is kept for it
    if region is None or region.module is not module:
        # New, or taken over with the __dict__ of another module, as DataParallel does.
        region = vars(module)[REGION] = Region(module)
    return region


class Region:
    """The programs of one module, made when they are needed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._traces: dict[Any, list[tuple[Watch, Programs | str]]] = {}
        self._made = 0
        self._failed: dict[Any, tuple[str, int]] = {}  # the last reason, and how often
        self._lock = threading.RLock()

    def choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program | None, Sequence[Tensor]]:
        """The program for a call and its arguments; None if the plain forward is to run."""
        if torch.compiler.is_compiling():
            return self._choose_compiled(args, kwargs)
        call = _signature(args, kwargs)
        if call is None or _is_special():
            return None, ()
        signature, tensors = call
        programs = self.programs(signature, args, kwargs)
        if isinstance(programs, str):
            return None, ()
        if (
            not self._needs_grad(tensors, programs)
            and library.LOADED
            and backends.current() != "reference"
            and programs.prepared.refresh()
        ):
            return programs.inference, tensors
        return programs.differentiable, tensors

    def _choose_compiled(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program | None, Sequence[Tensor]]:
        """As `choose`, among the programs that are there."""
        for watch, programs in self._traces.get((len(args), self.module.training), ()):
            if not kwargs and not isinstance(programs, str) and watch.holds_compiled():
                return programs.inference, args
        return None, ()

    def programs(self, signature: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Programs | str:
        """The programs for calls of this signature in the module's present state, or why there are none."""
        key = signature, self.module.training
        programs = self._known(key)
        if programs is not None:
            return programs
        if not is_possible():
            return "a profiler is at work"  # until it is not
        with self._lock:
            programs = self._known(key)  # another thread may have made them
            if programs is not None:
                return programs
            self._made += 1
            if self._made > _TRACES_MADE:
                return "it changes too often"
            if self._failed.get(key, ("", 0))[1] >= _FAILURES_MADE:
                return self._failed[key][0]
            watch = Watch(self.module)
            try:
                programs = Programs(self.module, args, kwargs)
                watch.add(programs.reads, programs.depends_on)
            except Untraceable as error:
                programs = str(error)
                self._failed[key] = programs, self._failed.get(key, ("", 0))[1] + 1
            known = self._traces if len(self._traces) < 2 * _SIGNATURES_KEPT else {}
            self._traces = {**known, key: [(watch, programs), *known.get(key, [])[: _TRACES_KEPT - 1]]}
        return programs

    def _known(self, key: Any) -> Programs | str | None:
        for watch, programs in self._traces.get(key, ()):
            if watch.holds():
                return programs
        return None

    def _needs_grad(self, tensors: Sequence[Tensor], programs: Programs) -> bool:
        if not torch.is_grad_enabled():
            return False
        module = self.module
        everything = itertools.chain(tensors, module.parameters(), programs.attributes(), module.buffers())
        return any(tensor.requires_grad for tensor in everything)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Sequence[Tensor]] | None:
    """What tells this call from others that need another trace, and its tensors; None for values of other kinds."""
    if not kwargs and all(type(value) is Tensor for value in args):
        return (len(args), args) if all(t.layout is torch.strided for t in args) else None
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors, kinds = [], []
    for leaf in leaves:
        if type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided:
            tensors.append(leaf)
            kinds.append(Tensor)
        elif type(leaf) in _CONSTANTS:
            kinds.append((type(leaf), leaf.hex() if isinstance(leaf, float) else leaf))  # -0.0 is not 0.0, NaN is NaN
        else:
            return None
    return (structure, tuple(kinds)), tensors


def _is_special() -> bool:
    """Whether something other than plain execution is under way, for which only the plain forward is known to do."""
    return (
        _has_any_global_hook()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )

"""A module's forward as a torch.fx graph, or the reason why that would not be safe.

torch.fx runs the forward once, on proxies, and records what it does with them. Whatever the forward does besides is
frozen or lost: random choices, changed attributes, a grad mode or an autocast of its own, a test of a value's type.
The tracer here and its `Observer` refuse all of that, so that a graph means what the forward means.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .modules import is_leaf, plain_forward, runs_foreign_code
from .observing import SETS_MODES, Observer, ambient
from .reading import Reads
from .refusal import Refusal, Untraceable

_MOST_NODES = 100_000
_lock = threading.RLock()  # torch.fx patches torch.nn.Module for the whole process while it traces


def trace(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.Graph, Reads]:
    """The graph of the call root(*args, **kwargs), with a placeholder for each tensor in it; and what else it reads.

    Of the tensors nothing is read; every other argument is a constant of the graph.

    Raises:
        Untraceable: there is no graph that is safe to run instead.
    """
    with _lock:
        observer = Observer(root)
        tracer = _Tracer(args, kwargs, observer)
        try:
            with _functions_of_autograd(tracer), observer:
                graph = tracer.trace(root)
        except Untraceable:
            raise
        except Refusal as refusal:
            raise Untraceable(str(refusal)) from refusal
        except Exception as error:  # whatever the user's code does when it meets a proxy
            lines = str(error).strip().splitlines()
            raise Untraceable(lines[0] if lines else type(error).__name__) from error
        if observer.tests_none and any(_may_be_none(node, root) for node in graph.nodes):
            raise Untraceable("its forward asks whether something is None, which a value that is computed in it may be")
        return graph, observer.reads


def _may_be_none(node: fx.Node, root: nn.Module) -> bool:
    """Whether a part of the value may be None, as of a user's own function and of attention without its weights."""
    if node.op == "call_module":
        return isinstance(root.get_submodule(node.target), nn.MultiheadAttention)
    return isinstance(node.target, _Applied)


_OF_PROXIES = {"tracer", "node", "root", "attr", "_node"}  # what torch.fx keeps in them
_OFTEN_NONE = {"grad", "_grad", "grad_fn", "_grad_fn", "_base", "name", "names", "_backward_hooks"}


class _Proxy(fx.Proxy):
    tracer: _Tracer

    @property
    def __class__(self) -> type:
        """What isinstance() in the user's code sees is the tensor that the proxy stands for.

        Nobody else may: torch's functions in C++ ask as well, and would take the proxy's memory for a tensor's.
        """
        frame = sys._getframe(1)
        asks = frame.f_code is torch.is_tensor.__code__ or self.tracer.observer.asks_for_type()
        caller = frame.f_globals.get("__name__", "").partition(".")[0]
        if asks is False or (not asks and caller in ("torch", "fastconv")):
            return type(self)
        if asks and self.node.op in ("placeholder", "get_attr"):
            return Tensor
        raise Refusal("its forward tests the type of a value")

    def __getattr__(self, name: str) -> _Attribute:
        if name.startswith("__"):  # by which C asks what kind of thing it has got
            raise AttributeError(name)
        if self.tracer.observer.is_probing():
            raise Refusal("its forward tests what attributes a value has")
        if name in _OFTEN_NONE:  # and a test whether it is None would go unseen
            raise Refusal(f"its forward reads {name} of a value")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_PROXIES:
            raise Refusal(f"its forward writes the attribute {name}")
        object.__setattr__(self, name, value)

    def _has_no_value(self, *_: object) -> Any:
        raise Refusal("its forward depends on a value that is computed in it")

    __bool__ = __len__ = __int__ = __float__ = __complex__ = __index__ = _has_no_value
    __contains__ = __array__ = __hash__ = _has_no_value

    def _in_words(self, *_: object) -> str:
        """For a message of torch's, or of an assertion, which is made whether it holds or not."""
        caller = sys._getframe(1)
        if "_assert" in caller.f_code.co_names or caller.f_globals.get("__name__", "").startswith("torch."):
            return "a value"
        return self._has_no_value()

    __str__ = __repr__ = __format__ = _in_words

    def _is_one_of_its_kind(self, *_: object) -> Any:
        raise Refusal("its forward copies a value as an object")

    __copy__ = __deepcopy__ = __reduce_ex__ = _is_one_of_its_kind


class _Attribute(_Proxy, fx.proxy.Attribute):
    """What an attribute, or a method that is not called yet, stands for."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    def record(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# Without these, Python takes `x += y` for `x = x + y`, and so does torch.fx.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Applied:
    """A call of a torch.autograd.Function, whose backward is the user's own."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = f"{function.__name__}.apply"

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)


@contextmanager
def _functions_of_autograd(tracer: _Tracer) -> Iterator[None]:
    """Within, calls of torch.autograd.Functions on proxies are recorded: their backward is not what fx would trace."""
    apply = torch.autograd.Function.__dict__["apply"]

    def record(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == tracer.thread and any(isinstance(arg, fx.Proxy) for arg in args):
            return tracer.create_proxy("call_function", _Applied(function), args, kwargs)
        return apply.__get__(None, function)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(record)
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply


class _Tracer(fx.Tracer):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], observer: Observer) -> None:
        super().__init__()
        self.observer = observer
        self.thread = threading.get_ident()
        self._call = (args, kwargs)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[[], Any], list[Any]]:
        named = [*self.root.named_parameters(), *self.root.named_buffers()]
        self._paths = {id(tensor): path for path, tensor in named}
        leaves, structure = pytree.tree_flatten(self._call)
        leaves = [
            self.create_proxy("placeholder", f"input_{i}", (), {}) if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        self.observer.take_arguments(args, kwargs)

        def run() -> Any:
            result = plain_forward(self.root)(*args, **kwargs)
            self.observer.check_result(result)
            return result

        return run, []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if is_leaf(m):
            if any("__call__" in vars(cls) for cls in type(m).__mro__ if not cls.__module__.startswith("torch.")):
                raise Refusal("its forward calls a module that has a __call__ of its own")
            if runs_foreign_code(m):
                raise Refusal("its forward calls a module that has hooks or a forward of its own")
            return super().call_module(m, forward, args, kwargs)
        return super().call_module(m, plain_forward(m), args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        path = self._paths.get(id(attr_val))  # torch.fx looks through all parameters each time
        if path is None:
            return attr_val
        if path not in parameter_proxy_cache:
            parameter_proxy_cache[path] = self.create_proxy("get_attr", path, (), {})
        return parameter_proxy_cache[path]

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if isinstance(a, fx.Proxy):
            return super().create_arg(a)
        if isinstance(a, nn.Module):
            raise Refusal(f"its forward passes a {kind.__name__} as an argument")
        if isinstance(a, Tensor) and id(a) not in self._paths and a not in self.tensor_attrs:
            raise Refusal("its forward makes a tensor out of constants")
        if kind is OrderedDict:  # which torch.fx takes for a dict
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, (dict, list, tuple)) and not _is_plain(a):
            raise Refusal(f"its forward passes a {kind.__name__} on")
        return super().create_arg(a)

    def iter(self, obj: fx.Proxy) -> Any:
        raise Refusal("its forward goes through a value that is computed in it")

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if ambient() != self.observer.ambient:
            raise Refusal(SETS_MODES)
        if len(self.graph.nodes) > _MOST_NODES:
            raise Refusal(f"its forward takes more than {_MOST_NODES:,} steps")
        return super().create_node(*args, **kwargs)


def _is_plain(value: Any) -> bool:
    """Whether torch.fx makes the same again from what the container holds."""
    kind = type(value)
    if kind in (dict, list, tuple):
        return True
    made_by_collections = issubclass(kind, tuple) and kind.__new__.__code__.co_filename.startswith("<string>")
    return kind in _CONTAINERS_OF_FX or (made_by_collections and hasattr(kind, "_fields"))


# Those of torch.fx have a plain container's place in a graph; torch.return_types' are not made again.
_CONTAINERS_OF_FX = (fx.immutable_collections.immutable_list, fx.immutable_collections.immutable_dict)

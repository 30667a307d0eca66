"""A module's forward as a torch.fx graph, or the reason why that would not be safe.

torch.fx runs the forward once, on proxies, and records what it does with them. Whatever the forward does besides is
frozen or lost: random choices, changed attributes, a grad mode or an autocast of its own, a test of a value's type.
The tracer here refuses all of that, so that a graph means what the forward means.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

REGION = "_fastconv_region"  # where a swapped module keeps its programs, in its __dict__

_lock = threading.RLock()  # torch.fx patches torch.nn.Module for the whole process while it traces


class Untraceable(Exception):
    """The message completes "not traced: "."""


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the user wrote, bound."""
    forward = getattr(type(module), "fastconv_plain_forward", type(module).forward)
    return functools.partial(forward, module)


def has_hooks(module: nn.Module) -> bool:
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls this module as a whole, as opposed to what its forward calls."""
    cls = type(module)
    return (
        has_hooks(module)
        or "forward" in vars(module)
        or isinstance(module, torch.jit.ScriptModule)
        or runs_forward_of(module, nn.Conv2d)
        or runs_forward_of(module, nn.BatchNorm2d)
        or (
            cls.__module__.startswith(("torch.nn.", "torch.ao.", "fastconv.nn"))
            and not isinstance(module, nn.Sequential)
        )
    )


def runs_forward_of(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    """Whether the module computes what `cls` does: `cls` itself, or a subclass that overrides no computation."""
    return (
        isinstance(module, cls)
        and type(module).forward is cls.forward
        and getattr(type(module), "_conv_forward", None) is getattr(cls, "_conv_forward", None)
        and "forward" not in vars(module)
    )


def trace(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
    """The graph of the call root(*args, **kwargs), with a placeholder for each tensor in it.

    Of the tensors nothing is read; every other argument is a constant of the graph.

    Raises:
        Untraceable: there is no graph that is safe to run instead.
    """
    with _lock, _no_side_effects(root):
        tracer = _Tracer(args, kwargs)
        try:
            return tracer.trace(root)
        except Untraceable:
            raise
        except Exception as error:  # whatever the user's code does when it meets a proxy
            lines = str(error).strip().splitlines()
            raise Untraceable(lines[0] if lines else type(error).__name__) from error


class _Proxy(fx.Proxy):
    @property
    def __class__(self) -> type:
        """What isinstance() sees: a proxy within torch, elsewhere the tensor that it stands for."""
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("torch."):
            return _Proxy
        if self.node.op in ("placeholder", "get_attr"):
            return Tensor
        raise Untraceable("its forward tests the type of a value")


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    def record(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# Without these, Python takes `x += y` for `x = x + y`, and so does torch.fx.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self._call = (args, kwargs)
        self._thread = threading.get_ident()
        self._ambient = _ambient()

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[[], Any], list[Any]]:
        leaves, structure = pytree.tree_flatten(self._call)
        leaves = [
            self.create_proxy("placeholder", f"input_{i}", (), {}) if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return functools.partial(plain_forward(self.root), *args, **kwargs), []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, plain_forward(m), args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return super().create_arg(a)
        if isinstance(a, nn.Module):
            raise Untraceable(f"its forward passes a {type(a).__name__} as an argument")
        if isinstance(a, Tensor) and not self._is_attribute(a):
            raise Untraceable("its forward makes a tensor out of constants")
        return super().create_arg(a)

    def _is_attribute(self, tensor: Tensor) -> bool:
        known = [*self.root.parameters(), *self.root.buffers(), *self.tensor_attrs]
        return any(tensor is one for one in known)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self._ambient:
            raise Untraceable("its forward sets a grad mode, autocast or checkpointing of its own")
        return super().create_node(*args, **kwargs)


def _ambient() -> tuple[Any, ...]:
    """What a context manager inside a forward may change without leaving a trace."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


@contextmanager
def _no_side_effects(root: nn.Module) -> Iterator[None]:
    """Refuses, and undoes, what the block does to the modules' attributes and the random generators."""
    attributes = [values for module in root.modules() for values in _attributes(module)]
    before = [dict(values) for values in attributes]
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = numpy_random and numpy_random.get_state(legacy=False)
    try:
        yield
    finally:
        changed = [
            name
            for values, old in zip(attributes, before, strict=True)
            for name in values.keys() | old.keys()
            if values.get(name) is not old.get(name)
        ]
        drawn = (
            random.getstate() != python_state
            or not torch.equal(torch.get_rng_state(), torch_state)
            or repr(numpy_random and numpy_random.get_state(legacy=False)) != repr(numpy_state)
        )
        for values, old in zip(attributes, before, strict=True):
            if values.keys() != old.keys() or any(values[k] is not old[k] for k in old):
                values.clear()
                values.update(old)
        if drawn:
            random.setstate(python_state)
            torch.set_rng_state(torch_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)
    if changed:
        raise Untraceable(f"its forward changes attributes of the modules: {', '.join(sorted(set(changed)))}")
    if drawn:
        raise Untraceable("its forward draws random numbers")


def _attributes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return vars(module), module._parameters, module._buffers, module._modules

"""Calls every function that a forward may hand a traced value to: one line of JSON each, flushed before the next.

Run as a process of its own by tests/swap/test_harm.py, which takes the last line for what killed it.
"""

from __future__ import annotations

import builtins
import copy
import inspect
import json
import operator
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv import explain, swap


class Reverse(torch.autograd.Function):
    """Gradient reversal: what fx would see of it is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return x * scale, x + scale

    @staticmethod
    def backward(ctx: Any, one: Tensor, two: Tensor) -> tuple[Tensor, None]:
        return 3 * one + two, None


def _index(key: Any) -> Callable[[Tensor], Any]:
    return lambda v: v[key(v) if isinstance(key, FunctionType) else key]


def _store(key: Any) -> Callable[[Tensor], Any]:
    def store(v: Tensor) -> Tensor:
        v = v.clone()
        v[key(v) if isinstance(key, FunctionType) else key] = 0.5
        return v

    return store


KEYS = {
    "0": 0,
    "-1": -1,
    "slice": slice(1, 3),
    "step": slice(None, None, 2),
    "ellipsis": ...,
    "None": None,
    "tuple": (0, slice(1)),
    "list": [0, 1],
    "mask": lambda v: v > 0,
    "indices": lambda v: v[0, 0].long().abs() % 2,
    "size": lambda v: v.size(0) - 1,
    "tensor": torch.tensor(1),
    "bool": True,
    "out of range": 99,
    "string": "a",
}
OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "Reverse": lambda v: Reverse.apply(v),
    "Pair": lambda v: Pair.apply(v, 2.0)[0] - Pair.apply(v, 3.0)[1],
    "zeros of shape": lambda v: torch.zeros(v.shape),
    "zeros of a size": lambda v: v + torch.zeros(v.size(2)),
    "full of sizes": lambda v: torch.full((v.shape[0], 2), 1.0),
    "new": lambda v: v.new_zeros(v.shape) + v.new_tensor([1.0]),
    "arange": lambda v: torch.arange(v.shape[1]),
    "range": lambda v: [v + i for i in range(v.shape[0])],
    "list of": lambda v: torch.stack(list(v)),
    "unpacked": lambda v: torch.stack([*v]),
    "int": lambda v: v * int(v.shape[0]),
    "index": lambda v: [1, 2, 3, 4][v.shape[0]],
    "in list": lambda v: v in [1, 2],
    "as a key": lambda v: {v: 1}[v] + v,
    "as numpy": lambda v: np.asarray(v.detach()),
    "np.exp": lambda v: np.exp(v.detach()),
    "f-string": lambda v: [f"{v.sum():.3f}", v],
    "str": lambda v: [str(v.shape), v],
    "hasattr": lambda v: v + 1 if hasattr(v, "no_such_thing") else v,
    "getattr": lambda v: getattr(v, "no_such_thing", v),
    "while hasattr": lambda v: next(iter([v])) if not hasattr(v, "inner") else v.inner,
    "deepcopy": lambda v: copy.deepcopy(v.detach()),
    "pickle": lambda v: pickle.loads(pickle.dumps(v.detach())),
    "try": lambda v: _tries(lambda: v.sum() > 1e9 and v, v),
    "try zeros": lambda v: _tries(lambda: torch.zeros(v), v),
    "try float": lambda v: _tries(lambda: v * float(v), v),
    "Parameter": lambda v: nn.Parameter(v.detach()) * 2,
    "Tensor": lambda v: torch.Tensor(v.detach()),
    "Size": lambda v: torch.Size([v.shape[0], 1]),
    "data": lambda v: v.data,
    "grad_fn": lambda v: v * (v.grad_fn is None),
    "requires_grad": lambda v: v * 2 if v.requires_grad else v,
    "backward": lambda v: torch.autograd.grad(v.sum(), v)[0],
    "checkpoint": lambda v: torch.utils.checkpoint.checkpoint(lambda y: y * 2, v, use_reentrant=True),
    "vmap": lambda v: torch.vmap(lambda y: y * 2)(v),
    "matmul": lambda v: v @ v.transpose(2, 3),
    "match": lambda v: _matches(v),
    "out=": lambda v: torch.add(v, 1, out=torch.empty_like(v)),
    "setattr": lambda v: (setattr(v, "note", 1), v)[1],
    "einsum": lambda v: torch.einsum("nchw->nc", v),
    "scripted": lambda v: _scripted(v),
    "exec": lambda v: eval("v + 1", {"v": v}),
    "sum": lambda v: sum([v, v]),
    "max of two": lambda v: max(v.shape[0], 1) * v,
    "sorted": lambda v: sorted([v.shape[0], 1])[0] * v,
    "isinstance int": lambda v: v if isinstance(v.shape[0], int) else v + 1,
    "isinstance tuple": lambda v: v if isinstance(v.shape, tuple) else v + 1,
    "type": lambda v: v if type(v) is Tensor else v + 1,
    "class": lambda v: v if v.__class__ is Tensor else v + 1,
}


def _tries(call: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return call()
    except Exception:
        return otherwise + 1


def _matches(v: Any) -> Any:
    match v:
        case Tensor():
            return v
    return v + 1


def _scripted(v: Tensor) -> Tensor:
    global _SCRIPTED
    return _SCRIPTED(v)


def _double(v: Tensor) -> Tensor:
    return v * 2


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _SCRIPTED = torch.jit.script(_double)

# These are about the process, not about a tensor.
_NOT = (
    "fbgemm_",
    "empty",
    "set_",
    "use_",
    "manual_seed",
    "seed",
    "compile",
    "fork",
    "_",
    "save",
    "load",
    "import",
    "classproperty",
    "from_file",
)
# These give addresses, or memory as it is.
_NOT_METHODS = ("backward", "retain_grad", "data_ptr", "const_data_ptr", "new", "resize", "resize_")


def calls() -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """A name, and what a forward does with the value of a convolution."""
    for name, key in KEYS.items():
        yield f"[{name}]", _index(key)
        yield f"[{name}]=", _store(key)
    yield from OTHERS.items()
    for prefix, owner in (("torch", torch), ("F", F), ("operator", operator), ("torch.special", torch.special)):
        for name, function in sorted(vars(owner).items()):
            plain = callable(function) and not isinstance(function, type) and not inspect.ismodule(function)
            if plain and not name.startswith(_NOT):
                yield f"{prefix}.{name}", lambda v, f=function: f(v)
                yield f"{prefix}.{name} of two", lambda v, f=function: f(v, v)
    for name in dir(Tensor):
        if not name.startswith(("_", "new_empty")) and name not in _NOT_METHODS:
            if callable(getattr(Tensor, name)):
                yield f".{name}()", eval(f"lambda v: v.{name}()")
                yield f".{name}(2)", eval(f"lambda v: v.{name}(2)")
            else:
                yield f".{name}", eval(f"lambda v: v.{name}")
    for name in ("abs", "bool", "bytes", "complex", "float", "hash", "id", "int", "iter", "len", "list", "repr"):
        yield name, lambda v, n=name: [getattr(builtins, n)(v), v][1]
    for name in ("next", "reversed", "set", "sum", "tuple", "vars", "dir", "memoryview", "sorted", "max", "any"):
        yield name, lambda v, n=name: [getattr(builtins, n)(v), v][1]


class Net(nn.Module):
    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.conv(x))


def outcome(net: nn.Module, x: Tensor) -> Any:
    torch.manual_seed(0)
    try:
        found = net(x)
        loss = sum(t.sum() for t in _tensors(found) if t.requires_grad)
        return found, torch.autograd.grad(loss, x)[0] if isinstance(loss, Tensor) else None
    except Exception as error:
        return error


def _tensors(found: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Exception) or isinstance(two, Exception):
        return isinstance(one, Exception) and isinstance(two, Exception)
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return (
            one.shape == two.shape
            and one.dtype == two.dtype
            and torch.allclose(one.double(), two.double(), 1e-5, 1e-6, equal_nan=True)
            if one.layout is torch.strided and not one.is_complex()
            else one.shape == two.shape
        )
    if isinstance(one, (list, tuple)) and type(one) is type(two):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, (int, float, str, bool, type(None), type, np.ndarray)):
        return bool(np.all(one == two)) or one != one
    return type(one) is type(two)


def check(call: Callable[[Tensor], Any]) -> str:
    torch.manual_seed(0)
    net = Net(call)
    fast = swap(net)
    untraced = explain(fast).untraced.get("", "")
    x = torch.rand(2, 2, 2, 2, requires_grad=True)
    expected, got = outcome(net, x), outcome(fast, x)
    if not same(expected, got):
        return f"differs ({untraced or 'traced'}): {str(expected)[:150]} != {str(got)[:150]}"
    return untraced or "traced"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, call in calls():
        print(json.dumps(name), end=" ", flush=True)
        print(json.dumps(check(call)), file=sys.stdout, flush=True)

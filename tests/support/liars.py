"""Backends that a qualification must see through, and one that it should take: for CPU tensors, made of aten.

A process that examines candidates imports this by its name; importing adds them.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastconv import ops  # noqa: F401  # whose operators these are
from fastconv.aten_kernels import OPERATORS
from fastconv.operators import backends, registration
from fastconv.operators.schemas import SCHEMAS

_calls: dict[str, int] = {}


def _first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else _first(outputs[0])


def _border(outputs: Any, *_: Any) -> Any:
    """One wrong pixel, at the border."""
    _first(outputs)[0, 0, 0, -1] += 0.01
    return outputs


def _once(outputs: Any, operator: str, *_: Any) -> Any:
    """Right the first time only."""
    _calls[operator] = _calls.get(operator, 0) + 1
    if _calls[operator] > 1:
        _first(outputs).mul_(1.01)
    return outputs


def _nan(outputs: Any, *_: Any) -> Any:
    """NaN for one channel."""
    _first(outputs)[:, 1] = float("nan")
    return outputs


def _loses_nan(outputs: Any, *_: Any) -> Any:
    _first(outputs).nan_to_num_(0.0, math.inf, -math.inf)
    return outputs


def _unwritten(outputs: Any, *_: Any) -> Any:
    """Leaves one element of its output as it was."""
    found = torch.empty_like(_first(outputs))
    found.view(-1)[1:] = _first(outputs).reshape(-1)[1:]
    return found


def _hangs(outputs: Any, *_: Any) -> Any:
    time.sleep(600)
    return outputs


def _exits(*_: Any) -> Any:
    os._exit(3)


def _crashes(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


def _raises(*_: Any) -> Any:
    raise RuntimeError("out of resource:\tshared \x1b[1mmemory\nmore of it")


def _slow(outputs: Any, *_: Any) -> Any:
    time.sleep(0.005)
    return outputs


def _shuffles(outputs: Any, *_: Any) -> Any:
    """Right, but other bits each time, as sums by atomics are."""
    found = _first(outputs)
    found.mul_(1 + torch.finfo(found.dtype).eps * torch.randint(0, 2, found.shape))
    return outputs


def _marks(outputs: Any, *_: Any) -> Any:
    """Adds 1 to the first result: to see who ran."""
    _first(outputs).add_(1)
    return outputs


SPOILT: dict[str, Callable[..., Any]] = {
    "border": _border,
    "once": _once,
    "nan": _nan,
    "loses-nan": _loses_nan,
    "unwritten": _unwritten,
    "hangs": _hangs,
    "exits": _exits,
    "crashes": _crashes,
    "raises": _raises,
    "slow": _slow,
    "shuffles": _shuffles,
    "marks": _marks,
}
WINNER = "winner"
_remembered: dict[Any, Any] = {}


def _winner(name: str, args: tuple[Any, ...]) -> Any:
    """Right, and faster than aten: it remembers."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    key = name, *((t.data_ptr(), t._version, t.shape, t.dtype) for t in tensors)
    if key not in _remembered:
        _remembered.clear()
        _remembered[key] = args, OPERATORS[name](*args)  # the arguments, so that their memory is not another's
    return _remembered[key][1]


def _kernel(name: str, spoil: Callable[..., Any] | None) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        if name.endswith(".out"):
            OPERATORS[name](*args)
            if spoil is not None:
                spoil(args[-1], name)
            return None
        return _winner(name, args) if spoil is None else spoil(OPERATORS[name](*args), name)

    return kernel


_libraries = []
for _backend, _spoil in (*SPOILT.items(), (WINNER, None)):
    _namespace = f"fastconv_test_{_backend.replace('-', '_')}"
    _library = torch.library.Library(_namespace, "DEF")
    _libraries.append(_library)
    for _name, _schema in SCHEMAS.items():
        _library.define(_name + _schema)
        _library.impl(_name, _kernel(_name, _spoil), "CPU")
    registration.add_namespace(_namespace)
    backends.add(_backend, backends.Backend(_namespace, lambda: "cpu", lambda: None))

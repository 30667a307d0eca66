"""Forwards that return every kind of container, and do something besides: what model zoos have little of."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG: list[Any] = []  # what some of them do to the world outside of the model


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


Plain = namedtuple("Plain", ["logits", "features"])


@dataclass
class Record:
    logits: Tensor
    features: Tensor
    note: str = "none"


class Outputs(OrderedDict):
    """As some libraries have it: a dictionary whose items are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Note:
    """An object that is neither a module nor a container."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.scale = 2.0


class Net(nn.Module):
    """Convolutions, batch norms and a residual; how it goes on is one of FORWARDS, by name."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 10)
        self.register_buffer("total", torch.zeros(8))
        self.calls = 0
        self.last: Any = None
        self.kept: list[Any] = []
        self.cache: dict[Any, Any] = {}
        self.note = Note()
        self.settings = {"scale": 2.0}
        self.scales = [2.0]

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        y = F.relu(self.body(y) + y)
        return FORWARDS[self.key](self, self.head(y.mean((2, 3))), y)


def _count(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    model.calls += 1
    return logits


def _keep_last(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    model.last = features
    return logits


def _append(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    model.kept.append(features)
    return logits


def _append_shape(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    model.kept.append(tuple(features.shape))
    return logits


def _cache(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    key = str(logits.device)
    if key not in model.cache:
        model.cache[key] = model.head.weight.sum()
    return logits + model.cache[key]


def _object(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    model.note.seen.append("called")
    return logits


def _buffer(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    model.total += features.detach().mean((0, 2, 3))
    return logits


def _buffer_replaced(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    model.total = 0.9 * model.total + features.detach().mean((0, 2, 3))
    return logits + model.total.sum()


def _log(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    LOG.append("called")
    return logits


def _print(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    print("called")
    return logits


def _warn(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    warnings.warn("called", stacklevel=1)
    return logits


def _hook(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    features.register_hook(lambda gradient: LOG.append("backward"))
    return logits


def _noise(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    return logits + torch.rand_like(logits)


def _python_noise(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    random.seed(0)
    return logits * random.random()


def _no_grad(model: Net, logits: Tensor, features: Tensor) -> list[Tensor]:
    with torch.no_grad():
        features = features * 2
    return [logits, features]


def _by_value(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    return logits if logits.sum() > 0 else -logits


def _by_grad_mode(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    return logits if torch.is_grad_enabled() else logits * 2


def _by_type(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    return logits if type(features) is Tensor else logits * 2


def _by_what_it_has(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    return logits * 2 if hasattr(features, "mask") else logits


def _by_shape(model: Net, logits: Tensor, features: Tensor) -> Tensor:
    return logits if features.shape[-1] > 16 else logits * 2


def _by_mode(model: Net, logits: Tensor, features: Tensor) -> Any:
    return (logits, features) if model.training else logits


def _try(model: Net, logits: Tensor, features: Tensor) -> Any:
    try:
        return logits.view(-1, 3)
    except RuntimeError:
        return logits.view(-1, 5)


def change(model: nn.Module) -> None:
    """What a user may change in the attributes of a network between two forwards."""
    if isinstance(model, Net):
        model.settings["scale"] = model.scales[0] = model.note.scale = 5.0
        model.extra = 3.0


_CONTAINERS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "tuple": lambda model, logits, features: (logits, features),
    "list": lambda model, logits, features: [logits, features],
    "dict": lambda model, logits, features: {"logits": logits, "features": features},
    "dict-integer-keys": lambda model, logits, features: {1: logits, 0: features},
    "ordered-dict": lambda model, logits, features: OrderedDict(out=logits, aux=features),
    "dict-subclass": lambda model, logits, features: Outputs(out=logits, aux=features),
    "namedtuple": lambda model, logits, features: Plain(logits, features),
    "typed-namedtuple": lambda model, logits, features: Pair(logits, features),
    "dataclass": lambda model, logits, features: Record(logits, features),
    "nested": lambda model, logits, features: {"a": [logits, (features, Pair(logits, features))], "b": OrderedDict()},
    "constants": lambda model, logits, features: (logits, None, 3, "text", 0.5, True, []),
    "shape": lambda model, logits, features: (logits, features.shape, features.shape[0], features.dtype),
    "generator": lambda model, logits, features: (logits, [features * i for i in range(3)]),
    "twice-the-same": lambda model, logits, features: [logits, logits],
    "views": lambda model, logits, features: (features, features[:, 0], features.flatten(1)),
    "the-parameter": lambda model, logits, features: (logits, model.head.weight, model.total),
    "none": lambda model, logits, features: None,
    "kept-list": lambda model, logits, features: (model.kept, logits),
    "slice": lambda model, logits, features: (logits, slice(0, 2)),
    "item": lambda model, logits, features: (logits, logits.shape[0] * 2, float(logits.dim())),
}
_EFFECTS = {
    "count": _count,
    "keep-last": _keep_last,
    "append": _append,
    "append-shape": _append_shape,
    "cache": _cache,
    "object": _object,
    "buffer": _buffer,
    "buffer-replaced": _buffer_replaced,
    "log": _log,
    "print": _print,
    "warn": _warn,
    "hook": _hook,
    "noise": _noise,
    "python-noise": _python_noise,
    "no-grad": _no_grad,
    "by-value": _by_value,
    "by-shape": _by_shape,
    "by-grad-mode": _by_grad_mode,
    "by-type": _by_type,
    "by-what-it-has": _by_what_it_has,
    "by-item-of-dict": lambda model, logits, features: logits * model.settings["scale"],
    "by-item-of-list": lambda model, logits, features: logits * model.scales[0],
    "by-attribute-of-object": lambda model, logits, features: logits * model.note.scale,
    "by-new-attribute": lambda model, logits, features: logits * getattr(model, "extra", 1.0),
    "by-mode": _by_mode,
    "try": _try,
}
FORWARDS = {**{f"returns-{name}": finish for name, finish in _CONTAINERS.items()}, **_EFFECTS}


class _OverwritesInput(Net):
    def forward(self, x: Tensor) -> Any:
        x -= 0.5
        return super().forward(x)


class _ReturnsInput(Net):
    def forward(self, x: Tensor) -> Any:
        return x, super().forward(x)


class _ReadsOldValue(Net):
    """The activation in place changes what was read before it."""

    def forward(self, x: Tensor) -> Any:
        y = self.stem[0](x)
        view = y[:, :4]
        z = F.relu(y, inplace=True)
        return self.head(z.mean((2, 3))), view, z


_CLASSES = {
    "overwrites-its-input": _OverwritesInput,
    "returns-its-input": _ReturnsInput,
    "overwrites-what-a-view-shows": _ReadsOldValue,
}
FORWARDS.update(dict.fromkeys(_CLASSES, lambda model, logits, features: logits))


def build(key: str) -> nn.Module:
    return _CLASSES.get(key, Net)(key)

"""What a model holds, attribute by attribute and bit by bit, and what of it has changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn


def contents(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on the modules, by path: what it is, and what is in it."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"{path}: class"] = type(module)
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = (value, _frozen(value))
    return found


def _frozen(value: Any, depth: int = 4) -> Any:
    """The objects that a value holds, in containers and plain objects."""
    if depth == 0:
        return value
    if isinstance(value, dict):
        return [(key, item, _frozen(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, list | tuple | set):
        return [(item, _frozen(item, depth - 1)) for item in value]
    if is_plain_object(value):
        return _frozen(vars(value), depth - 1)
    return value


def is_plain_object(value: Any) -> bool:
    return (
        not isinstance(value, Tensor | nn.Module | type)
        and not type(value).__module__.startswith(("torch", "builtins"))
        and isinstance(getattr(value, "__dict__", None), dict)
    )


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    found = [f"{path} is gone" for path in before.keys() - after.keys()]
    found += [f"{path} is new" for path in after.keys() - before.keys()]
    found += [f"{path} has changed" for path in before.keys() & after.keys() if not _same(before[path], after[path])]
    return sorted(found)[:5]


def _same(one: Any, other: Any) -> bool:
    """Whether they are the same object, or containers (made by `_frozen`) of the same ones."""
    if one is other:
        return True
    if type(one) in (list, tuple) and type(other) is type(one) and len(one) == len(other):
        return all(map(_same, one, other))
    return isinstance(one, int | float | str | bytes) and type(one) is type(other) and one == other


def holds_an_object(text: str, before: dict[str, Any]) -> bool:
    """Whether the change is of an object that is none of torch's and no container."""
    value, _ = before.get(text.removesuffix(" has changed"), (None, None))
    return hasattr(value, "__dict__") and not isinstance(value, (dict, list, set, Tensor, nn.Module))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of its parameters and buffers."""
    return {name: value.clone() for name, value in tensors_of(model)}


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def changed_bits(before: dict[str, Tensor], after: dict[str, Tensor], apart_from: Iterable[str] = ()) -> list[str]:
    same = {name for name, value in before.items() if name in after and same_bits(value, after[name])}
    return [f"{name}: other numbers" for name in sorted(before.keys() - same - set(apart_from))][:5]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_raw(one), _raw(other))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def everything(value: Any, depth: int = 6) -> Iterator[Any]:
    yield value
    # Not isinstance: proxies lie about what they are.
    cls = type(value)
    if depth and not issubclass(cls, Tensor | nn.Module | type | fx.Proxy):
        parts: Any = ()
        if issubclass(cls, dict):
            parts = [*value.keys(), *value.values()]
        elif issubclass(cls, list | tuple | set):
            parts = value
        elif is_plain_object(value):
            parts = vars(value).values()
        for part in parts:
            yield from everything(part, depth - 1)


def valued(value: Any, depth: int = 6) -> Any:
    cls = type(value)
    if issubclass(cls, fx.Proxy):
        return "a torch.fx proxy"
    if isinstance(value, Tensor | int | float | str | bytes | type(None)):
        return value
    if depth and isinstance(value, dict):
        return (cls.__name__, [(str(key), valued(item, depth - 1)) for key, item in value.items()])
    if depth and isinstance(value, list | tuple):
        return (cls.__name__, [valued(item, depth - 1) for item in value])
    if depth and is_plain_object(value):
        return (cls.__name__, [(key, valued(item, depth - 1)) for key, item in vars(value).items()])
    return cls.__name__

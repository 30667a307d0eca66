"""Outputs and gradients of two models: alike in nature, layout and value, within what rounding allows?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastconv.measure.tolerance import compare

CLOSE = 1e-8  # of float64 results, in units of the largest number of the tensor
WITHOUT_ORACLE = 300 * torch.finfo(torch.float32).eps  # the policy's cap, for models that cannot do float64
_FLOOR = 1e-11  # for tensors that are 0 but for rounding, in units of the largest number of all
DISCRETE = "rounding decides what is in the outputs"


def compare_values(expected: Any, got: Any, oracle: Any, close: float = CLOSE, baseline: Any = None) -> list[str]:
    """What is different in nature, layout or value.

    Values keep to the policy of `fastconv.measure.tolerance` where an oracle is given, else they are equal but for
    `close`. The result is [DISCRETE] where eager's own outputs are beyond what the policy allows. Twice the error of
    `baseline` is allowed, by default that of the expected outputs.
    """
    nature = other_nature(expected, got)
    if nature:
        return [nature]
    if _aliases(expected) != _aliases(got):
        return [f"other values are the same object: {_aliases(got)}, in eager {_aliases(expected)}"]
    pairs = list(zip(leaves(expected), leaves(got), strict=True))
    found = [
        f"{path} has strides {two.stride()}, eager's {one.stride()}"
        for (path, one), (_, two) in pairs
        if one.layout is torch.strided and one.stride() != two.stride()
    ]
    if oracle is None:
        found += [f"{path}: {text}" for (path, one), (_, two) in pairs for text in unequal(one, two, close=close)]
        return found
    exact = [tensor for _, tensor in leaves(oracle)]
    if [t.shape for t in exact] != [one.shape for (_, one), _ in pairs] or any(
        not one.is_floating_point() and not torch.equal(one, t) for ((_, one), _), t in zip(pairs, exact, strict=True)
    ):
        return [DISCRETE]
    bases = [tensor for _, tensor in leaves(expected if baseline is None else baseline)]
    for ((path, one), (_, two)), best, base in zip(pairs, exact, bases, strict=True):
        if one.is_floating_point():
            if not compare(one, best.double(), one).ok:
                return [DISCRETE]
            verdict = compare(two, best.double(), base)
            if not verdict.ok:
                found.append(f"{path or 'output'}: {verdict}")
        else:
            found += [f"{path}: {text}" for text in unequal(one, two)]
    return found


def unequal(expected: Tensor, got: Tensor, scale: float = 0.0, close: float = CLOSE) -> Iterator[str]:
    if not expected.is_floating_point():
        if not torch.equal(expected, got):
            yield "other values"
        return
    eps = max(close, 8 * torch.finfo(expected.dtype).eps)
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(expected.isnan(), got.isnan()):
        yield "other NaN or Inf"
    elif finite.any():
        one, two = expected.detach()[finite].double(), got.detach()[finite].double()
        error, largest = float((one - two).abs().max()), float(one.abs().max())
        if error > eps * largest + _FLOOR * scale:
            yield f"differs by {error:.3g}, the largest is {largest:.3g}"


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return not list(unequal(one, other))
    if type(one) in (list, tuple) and type(other) is type(one):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == other or abs(one - other) <= CLOSE * abs(one) or (one != one and other != other)
    return type(one) is type(other) and one == other


def to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return type(value)((key, to_double(item)) for key, item in value.items())
    return type(value)(map(to_double, value)) if isinstance(value, list | tuple) else value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output with their paths, in order."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for name, item in _items(value):
        yield from leaves(item, f"{path}{name}")


def skeleton(value: Any, *, shapes: bool = True) -> str:
    """Types, names and order, and of tensors dtypes and shapes, without the numbers."""
    if isinstance(value, Tensor):
        kind = "Parameter" if isinstance(value, nn.Parameter) else "Tensor"
        return f"{kind} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if shapes else kind
    items = _items(value)
    if items or isinstance(value, dict | list | tuple):
        inner = ", ".join(f"{name}={skeleton(item, shapes=shapes)}" for name, item in items)
        return f"{type(value).__name__}({inner})"
    if issubclass(type(value), fx.Proxy):
        return "torch.fx proxy"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int | float | str | slice) else type(value).__name__


def other_nature(expected: Any, got: Any) -> str:
    """How two outputs differ apart from numbers; empty if they do not."""
    for shapes in (False, True):
        theirs, ours = skeleton(expected, shapes=shapes), skeleton(got, shapes=shapes)
        if theirs != ours:
            return f"returns {_differing(ours, theirs)}, eager {_differing(theirs, ours)}"
    return ""


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", getattr(value, name)) for name in value._fields]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def _differing(text: str, other: str) -> str:
    """The part of a long text from where the other differs."""
    if len(text) < 80:
        return text
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
    return f"...{text[max(0, same - 20) : same + 60]}..."


def _aliases(value: Any) -> list[list[str]]:
    """Which of the tensors are one object."""
    groups: dict[int, list[str]] = {}
    for path, tensor in leaves(value):
        groups.setdefault(id(tensor), []).append(path)
    return [paths for paths in groups.values() if len(paths) > 1]


def short(value: Any) -> str:
    text = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    text = " ".join(text.split())
    return text if len(text) < 80 else f"{text[:77]}..."

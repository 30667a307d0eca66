"""The networks by name. Each registers itself where it is defined, with `register`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn

__all__ = ["build", "input_shape", "names", "title"]

_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])


class _Entry(NamedTuple):
    builder: Callable[..., nn.Module]
    title: str
    published: str
    image: tuple[int, int, int]


_ENTRIES: dict[str, _Entry] = {}


def register(title: str, *, published: str, image: tuple[int, int, int]) -> Callable[[_Builder], _Builder]:
    """Makes the decorated function the builder of the network of its name.

    Args:
        title: the name as people write it.
        published: the date of the paper, as YYYY-MM-DD or as much of it as is known.
        image: the ``[C, H, W]`` that the paper feeds the network with.
    """

    def add(builder: _Builder) -> _Builder:
        _ENTRIES[builder.__name__] = _Entry(builder, title, published, image)
        return builder

    return add


def names() -> tuple[str, ...]:
    """The names that `build` knows, oldest network first."""
    return tuple(sorted(_ENTRIES, key=lambda name: _ENTRIES[name].published))


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a network by name, in training mode; ``kwargs`` go to its constructor.

    Raises:
        ValueError: if there is no such network.
    """
    return _entry(name).builder(**kwargs)


def input_shape(name: str, batch: int = 1) -> tuple[int, int, int, int]:
    """The ``[N, C, H, W]`` that the paper feeds the network with."""
    return batch, *_entry(name).image


def title(name: str) -> str:
    """The network's name as people write it, for tables and pictures."""
    return _entry(name).title


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise ValueError(f"fastconv.models: there is no network {name!r}; choose one of {', '.join(names())}")
    return _ENTRIES[name]

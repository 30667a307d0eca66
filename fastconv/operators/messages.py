"""How an error is worded: the op, what arrived, what was needed, the remedy; short whatever arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

# Entries of a list, characters of one of them, characters of a text
_SHOWN, _ENTRY, _TEXT = 8, 20, 40


def fail(op: str, got: object, needed: object, remedy: str) -> NoReturn:
    raise RuntimeError(f"fastconv::{op}: got {got}, needed {needed}; {remedy}")


def given(name: str, value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"{name} {listed(value)}"
    return f"{name} {literal(value) or 'of type ' + _type(value)}"


def listed(values: Sequence[object]) -> str:
    entries = [literal(value, _ENTRY) or _type(value, _ENTRY) for value in values[:_SHOWN]]
    return f"[{', '.join(entries + ['...'] * (len(values) > _SHOWN))}]"


def literal(value: object, room: int = _TEXT) -> str | None:
    """A number, a text or None, in no more characters than a message has room for."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value if len(value) <= room else value[:room] + "...")
    return repr(value) if value is None or isinstance(value, (int, float, torch.SymInt)) else None


def one_line(text: str, room: int) -> str:
    """A text from elsewhere, of what can be printed on one line."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= room else line[: room - 3] + "..."


def shape_of(tensor: Tensor) -> str:
    return listed(tensor.shape)


def dtype_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _type(value: object, room: int = _TEXT) -> str:
    return "Tensor" if isinstance(value, Tensor) else type(value).__name__[:room]


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table in columns."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()

"""What was found out, for people to read."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..operators import tables
from ..operators.messages import aligned
from ..operators.table_text import aten, error, milliseconds, name, ratio, speedup
from ..operators.tables import Entry
from .candidates import REFERENCE

_HEAD = ("operator", "images", "call", "winner", "ms", "aten ms", "time / aten's", "error", "aten's", "refused")


@dataclass(frozen=True)
class Qualification:
    """What was found out, printable.

    Attributes:
        path: of the table.
        entries: one for each class of calls, in the order of the model.
        left_out: by class, why there is no entry.
        seconds: that it took.
        is_interrupted: whether calls are left: the same call of `qualify` goes on from here.
        disabled: CUDA kernels that must not run on this device, with the reason.
        failed: why the calls of a pass of the model are missing.
    """

    path: Path
    device: str
    entries: tuple[Entry, ...]
    left_out: dict[tables.Key, str] = field(default_factory=dict)
    seconds: float = 0.0
    is_interrupted: bool = False
    disabled: dict[str, str] = field(default_factory=dict)
    failed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return text(self)


def text(found: Qualification) -> str:
    """A line for each class of calls, what was refused and why, and how much was won."""
    lines = [f"{found.device}: {len(found.entries)} classes of calls in {found.seconds:.0f} s, in {found.path}"]
    if found.entries:
        lines += ["", *aligned(_HEAD, [_row(entry) for entry in found.entries]), "", _gains(found.entries)]
    refusals = [
        f"  {entry.operator} {_images(entry)}: {name(one.backend, one.variant)}: {one.reason}"
        for entry in found.entries
        for one in entry.candidates
        if one.outcome != "ok"
    ]
    lines += ["", "refused:", *refusals] if refusals else []
    disabled = [f"  {kernel}: {why}" for kernel, why in found.disabled.items()]
    lines += ["", "disabled:", *disabled] if disabled else []
    left_out = [f"  {key[0]} {'x'.join(map(str, key[2]))}: {why}" for key, why in found.left_out.items()]
    lines += ["", "left out:", *left_out] if left_out else []
    lines += ["", *found.failed] if found.failed else []
    if found.is_interrupted:
        lines += ["", "interrupted: the same call goes on from here"]
    return "\n".join(lines)


def _row(entry: Entry) -> tuple[str, ...]:
    best, base = entry.candidates[0], aten(entry)
    refused = sum(one.outcome != "ok" for one in entry.candidates)
    return (
        entry.operator,
        _images(entry),
        _call(entry),
        name(best.backend, best.variant),
        milliseconds(best),
        milliseconds(base),
        ratio(best),
        error(best.error),
        error(base.error),
        str(refused or ""),
    )


def _gains(entries: Sequence[Entry]) -> str:
    won = [entry for entry in entries if entry.candidates[0].backend != REFERENCE]
    if not won:
        return f"aten stays for all {len(entries)}: nothing that is right was faster beyond the spread"
    gain = statistics.geometric_mean([speedup(entry.candidates[0]) for entry in won])
    return f"faster than aten for {len(won)} of {len(entries)}, {gain:.2f} times in geometric mean of those"


def _images(entry: Entry) -> str:
    return "x".join(map(str, entry.size))


def _call(entry: Entry) -> str:
    """Of the family dtype and sizes of the first two tensors, and the layout."""
    tensors = re.findall(r"(\w+)\[([^\]]*)\]( \w+)?", entry.family)
    shapes = [shape for _, shape, _ in tensors[:3] if shape.count(",") > 1][:2]
    layout = tensors[0][2] if tensors else ""
    return f"{tensors[0][0] if tensors else ''} {' '.join(shapes)}{layout}"

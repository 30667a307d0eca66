"""Entries of tables, for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .messages import aligned
from .tables import Candidate, Entry


def name(backend: str, variant: Mapping[str, Any]) -> str:
    """A candidate as users know it: the backend, with kernels or block sizes where they are not its own choice."""
    parts = [f"{key} {_written(value)}" for key, value in variant.items()]
    known = "aten" if backend == "reference" else backend
    return f"{known}{': ' if parts else ''}{', '.join(parts)}"


def _written(value: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def candidate_lines(entry: Entry) -> list[str]:
    """Each candidate of an entry in a line: the winner first, and why the others are not it."""
    head = ("candidate", "ms", "time / aten's", "error", "aten's", "why not")
    rows = [
        (
            name(one.backend, one.variant),
            milliseconds(one),
            ratio(one),
            error(one.error),
            error(one.baseline_error),
            one.reason,
        )
        for one in entry.candidates
    ]
    return list(aligned(head, rows))


def aten(entry: Entry) -> Candidate:
    """The candidate that the others are held against."""
    return next(one for one in entry.candidates if one.backend == "reference")


def speedup(found: Candidate) -> float:
    """How many times as fast it is as aten."""
    return 1 / found.ratio[0] if found.ratio and found.ratio[0] else 1.0


def milliseconds(found: Candidate) -> str:
    """Of the device, with the spread."""
    if found.seconds is None:
        return ""
    median, low, high = (1e3 * value for value in found.seconds)
    return f"{median:.3f} ({low:.3f}-{high:.3f})"


def ratio(found: Candidate) -> str:
    """Of its time to aten's, with the spread."""
    return "" if found.ratio is None else "{:.2f} ({:.2f}-{:.2f})".format(*found.ratio)


def error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"

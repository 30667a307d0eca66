"""Tables of what was proved and timed on a device, and the JSON documents that hold them.

A document comes from a file that anybody may have written or cut short, so nothing of it is believed: `from_json` takes
what has every field in its place and type, and nothing else. What it takes is compared and counted, never run, imported
or used as a path.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NoReturn, TypeVar

from .messages import given, one_line

FORMAT = "fastconv table 1"
MOST_ENTRIES = 100_000
LONGEST = 2000  # characters: the class of a backward names twelve arguments
_MOST = 1_000  # values in a list or a mapping, except for the table's entries
_LARGEST_SIZE, _LARGEST_BLOCK = 2**40, 2**16

Times = tuple[float, float, float]  # median, 20th and 80th percentile, in seconds
Key = tuple[str, str, tuple[int, ...]]  # operator, family, size
T = TypeVar("T")
_Check = Callable[[Any, str], Any]  # (what a document has, where) -> what a table has; TableError


class TableError(ValueError):
    """What a table cannot be made of; one sentence."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a call, and what was found out about it.

    Attributes:
        backend: its name, see `fastconv.operators.backends`.
        variant: which of the backend's kernels, or with which block sizes: names, or integers by name.
        outcome: "ok", or "refused".
        reason: why it is refused, or why it is right and still not taken; "" for the winner.
        error: the largest error / the largest value, of the worst tensor; None where there is no such number.
        baseline_error: the same of what torch has.
        deterministic: whether the same call had the same bits each time.
        keeps_nan: whether a NaN that goes in comes out as it does in eager.
        seconds: the device's time; on a CPU the time that passed.
        host_seconds: until the call returned.
        graph_seconds: the device's time in a CUDA graph.
        ratio: of what a caller waits for to what it waits for aten, turn by turn: the only two times that the same
            moments of the machine went into.
    """

    backend: str
    variant: dict[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    outcome: str
    reason: str = ""
    error: float | None = None
    baseline_error: float | None = None
    deterministic: bool = True
    keeps_nan: bool = True
    seconds: Times | None = None
    host_seconds: Times | None = None
    graph_seconds: Times | None = None
    ratio: Times | None = None


@dataclass(frozen=True)
class Entry:
    """What was found out about the calls of one shape class.

    Attributes:
        operator: its name in the schemas.
        family: all that such calls have in common except sizes.
        size: the class of the batch, then height, width and whatever else counts.
        candidates: the winner first, the refused ones last.
        backward: of a forward call, the keys of the backward calls that belong to it.
        searched: whether more of the kernels and other block sizes were tried, too.
        complete: False for one that was interrupted: what it has need not be measured again, but nothing is chosen.
    """

    operator: str
    family: str
    size: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    backward: tuple[Key, ...] = ()
    searched: bool = False
    complete: bool = True

    @property
    def key(self) -> Key:
        return self.operator, self.family, self.size


@dataclass
class Table:
    """What was found out on one device with one set of versions.

    Attributes:
        fingerprint: see `fastconv.operators.fingerprint`.
        allow_lost_nan: whether a candidate that loses a NaN may be "ok".
        disabled: CUDA kernels that must not be used on this device, with the reason.
        entries: by their keys.
        conformance: the backends whose instructions were tried on this device; what differed is why kernels are
            disabled.
    """

    fingerprint: dict[str, str]
    allow_lost_nan: bool = False
    disabled: dict[str, str] = field(default_factory=dict)
    entries: dict[Key, Entry] = field(default_factory=dict)
    conformance: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """The device's name."""
        return self.fingerprint["device"]


def from_json(document: object) -> Table:
    """The table that a document of `to_json` has.

    Raises:
        TableError: the document has something else; the message says where, and what was needed.
    """
    found = _fields(document, "table", _TABLE, required=_TABLE)
    if "device" not in found["fingerprint"]:
        raise TableError("got table.fingerprint without the name of the device, needed one")
    entries: dict[Key, Entry] = {}
    for index, entry in enumerate(found["entries"]):
        if entry.key in entries:
            raise TableError(f"got table.entries[{index}] of a shape class that has one already, needed one of each")
        entries[entry.key] = entry
    return Table(found["fingerprint"], found["allow_lost_nan"], found["disabled"], entries, found["conformance"])


def to_json(table: Table) -> dict[str, Any]:
    """The document of a table, of dictionaries, lists, texts, numbers and truth values. Equal tables have equal
    documents, the order of their fields included; a field with its default value is left out."""
    return {
        "format": FORMAT,
        "fingerprint": dict(sorted(table.fingerprint.items())),
        "allow_lost_nan": table.allow_lost_nan,
        "disabled": dict(sorted(table.disabled.items())),
        "conformance": sorted(table.conformance),
        "entries": [plain(entry) for _, entry in sorted(table.entries.items())],
    }


def storable(entry: Entry) -> Entry:
    """The entry as a table can hold it: every reason on one line that is not too long.

    Raises:
        TableError: something else of it does not fit; a NaN among its numbers, for one.
    """
    candidates = tuple(dataclasses.replace(one, reason=one_line(one.reason, LONGEST)) for one in entry.candidates)
    return _entry(plain(dataclasses.replace(entry, candidates=candidates)), "entry")


def candidate(document: object) -> Candidate:
    """The candidate that `plain` made the document of.

    Raises:
        TableError: as `from_json`.
    """
    return _candidate(document, "candidate")


def entry(document: object) -> Entry:
    """The entry that `plain` made the document of.

    Raises:
        TableError: as `from_json`.
    """
    return _entry(document, "entry")


def plain(value: Any) -> Any:
    """What JSON has for an entry, a candidate, or the value of a field."""
    if isinstance(value, (Candidate, Entry)):
        defaults, fields = _DEFAULTS[type(value)], vars(value)
        return {name: plain(one) for name, one in fields.items() if name not in defaults or one != defaults[name]}
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in sorted(value.items())}
    return value


def _defaults(cls: Any) -> dict[str, Any]:
    found = {}
    for one in dataclasses.fields(cls):
        if one.default is not dataclasses.MISSING:
            found[one.name] = one.default
        elif one.default_factory is not dataclasses.MISSING:
            found[one.name] = one.default_factory()
    return found


_DEFAULTS: dict[type, dict[str, Any]] = {cls: _defaults(cls) for cls in (Candidate, Entry)}


# ------------------------------------------------------------------------- what a document may have


def _fail(where: str, value: object, needed: str) -> NoReturn:
    raise TableError(f"got {given(where, value)}, needed {needed}")


def _flag(value: Any, where: str) -> bool:
    return value if isinstance(value, bool) else _fail(where, value, "true or false")


def _line(value: Any, where: str) -> str:
    if isinstance(value, str) and len(value) <= LONGEST and value.isprintable():
        return value
    _fail(where, value, f"a text of up to {LONGEST} characters that can be printed on one line")


def _text(value: Any, where: str) -> str:
    return _line(value, where) or _fail(where, value, "a text that is not empty")


def _words(value: Any, where: str) -> str:
    """What names a backend, an operator, a kernel or an entry of the block sizes."""
    if re.fullmatch(r"[\w.-]+( [\w.-]+)*", _line(value, where), re.ASCII):
        return value
    _fail(where, value, "words of letters, digits, '_', '-' and '.'")


def _outcome(value: Any, where: str) -> str:
    return value if value in ("ok", "refused") else _fail(where, value, '"ok" or "refused"')


def _format(value: Any, where: str) -> str:
    return value if value == FORMAT else _fail(where, value, f'"{FORMAT}"')


def _number(value: Any, where: str) -> float:
    # Comparisons only: an integer may be too large for a float.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return float(value)
    _fail(where, value, "a finite number, not negative")


def _integer(most: int) -> _Check:
    def check(value: Any, where: str) -> int:
        return value if type(value) is int and 0 <= value <= most else _fail(where, value, f"an integer, 0 to {most}")

    return check


def _optional(inner: _Check) -> _Check:
    return lambda value, where: None if value is None else inner(value, where)


def _list(inner: _Check, most: int = _MOST) -> _Check:
    def check(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > most:
            _fail(where, value, f"a list of up to {most}")
        return tuple(inner(one, f"{where}[{index}]") for index, one in enumerate(value))

    return check


def _tuple(*inner: _Check) -> _Check:
    def check(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) != len(inner):
            _fail(where, value, f"a list of {len(inner)}")
        return tuple(one(part, f"{where}[{index}]") for index, (one, part) in enumerate(zip(inner, value, strict=True)))

    return check


def _mapping(key: _Check, inner: _Check) -> _Check:
    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > _MOST:
            _fail(where, value, f"names with values, up to {_MOST}")
        return {key(name, f"a name in {where}"): inner(one, f"{where}.{name}") for name, one in value.items()}

    return check


def _choice(value: Any, where: str) -> Any:
    """Of a variant: a kernel's name, or its block sizes."""
    return _blocks(value, where) if isinstance(value, dict) else _words(value, where)


def _fields(value: Any, where: str, checks: dict[str, _Check], required: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(where, value, f"fields: {', '.join(checks)}")
    for name in value:
        if name not in checks:
            _fail(f"a field of {where}", name, f"one of {', '.join(checks)}")
    for name in required:
        if name not in value:
            _fail(where, list(value), f"the field '{name}', too")
    return {name: check(value[name], f"{where}.{name}") for name, check in checks.items() if name in value}


def _record(cls: type[T], value: Any, where: str, checks: dict[str, _Check]) -> T:
    required = checks.keys() - _DEFAULTS[cls].keys()
    return cls(**_fields(value, where, checks, sorted(required)))


def _candidate(value: Any, where: str) -> Candidate:
    found = _record(Candidate, value, where, _CANDIDATE)
    if found.outcome == "refused" and not found.reason:
        raise TableError(f"got {where} refused without a reason, needed one")
    return found


def _entry(value: Any, where: str) -> Entry:
    found = _record(Entry, value, where, _ENTRY)
    outcomes = [one.outcome for one in found.candidates]
    if found.complete and outcomes[:1] != ["ok"]:
        _fail(f"{where}.candidates", outcomes, "one that is ok, the winner, at the head of a complete entry")
    if found.complete and outcomes != sorted(outcomes):
        _fail(f"{where}.candidates", outcomes, "the refused ones last")
    return found


_blocks = _mapping(_words, _integer(_LARGEST_BLOCK))
_times = _optional(_tuple(_number, _number, _number))
_size = _list(_integer(_LARGEST_SIZE))
_CANDIDATE: dict[str, _Check] = {
    "backend": _words,
    "variant": _mapping(_words, _choice),
    "outcome": _outcome,
    "reason": _line,
    "error": _optional(_number),
    "baseline_error": _optional(_number),
    "deterministic": _flag,
    "keeps_nan": _flag,
    "seconds": _times,
    "host_seconds": _times,
    "graph_seconds": _times,
    "ratio": _times,
}
_ENTRY: dict[str, _Check] = {
    "operator": _words,
    "family": _text,
    "size": _size,
    "candidates": _list(_candidate),
    "backward": _list(_tuple(_words, _text, _size)),
    "searched": _flag,
    "complete": _flag,
}
_TABLE: dict[str, _Check] = {
    "format": _format,
    "fingerprint": _mapping(_words, _text),
    "allow_lost_nan": _flag,
    "disabled": _mapping(_line, _line),
    "conformance": _list(_words),
    "entries": _list(_entry, most=MOST_ENTRIES),
}

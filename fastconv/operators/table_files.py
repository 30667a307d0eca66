"""Where the tables of what was measured lie, and how they are read and written.

A file that cannot serve costs a warning with the remedy, and the choice that it would have made; never an error. What
is written is there at once and as a whole, and several processes may fill the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import tables
from .fingerprint import differences, fingerprint
from .messages import one_line
from .tables import Entry, Table, TableError

try:
    import fcntl
except ImportError:  # not a Unix: two processes that write at once may lose entries there
    fcntl = None  # type: ignore[assignment]

MOST_BYTES = 64 * 2**20
_LINE = 100  # what JSON has in so many characters, or so deep, stands on one line
_DEPTH = 4
_warned: set[str] = set()


def user_folder() -> Path:
    """Where the user's tables are: FASTCONV_TABLES, or a folder in the user's cache folder."""
    if named := os.environ.get("FASTCONV_TABLES"):
        return Path(os.path.abspath(os.path.expanduser(named)))
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        home = os.path.expanduser("~")  # unchanged for a user without one
        cache = os.path.join(home if os.path.isabs(home) else os.sep, ".cache")
    return Path(cache) / "fastconv"


def shipped_folder() -> Path:
    """Where the tables are that come with the package."""
    return Path(__file__).parents[1] / "tuned"


def path_of(fingerprint: dict[str, str], folder: Path) -> Path:
    """The file in the folder for this fingerprint: the device's name, and a hash of all of it."""
    text = json.dumps(fingerprint, sort_keys=True)
    return folder / f"{_slug(fingerprint)}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def load(path: Path, fingerprint: dict[str, str]) -> Table | None:
    """The table of a file; None where there is none, or none for this fingerprint.

    A file that is there and cannot serve is one warning in the life of the process.
    """
    try:
        return _read(path, fingerprint)
    except (OSError, TableError) as error:
        _warn(
            f"{path} is not used: {_reason(error)}; run `python -m fastconv qualify` once more, or remove the file",
            about=path,
        )
        return None


def in_force(device: torch.device) -> list[tuple[Path, Table]]:
    """The tables for a device: the user's, then that which comes with the package; of both only what there is."""
    here = fingerprint(device)
    paths = [path_of(here, folder) for folder in (user_folder(), shipped_folder())]
    return [(path, table) for path in paths if (table := load(path, here)) is not None]


def others(folder: Path, fingerprint: dict[str, str]) -> list[tuple[Path, Table]]:
    """The tables in a folder for the same device with anything else that differs: they do not count here."""
    found = []
    for path in sorted(folder.glob(f"{_slug(fingerprint)}-*.json")):
        with contextlib.suppress(OSError, TableError):
            table = _read(path)
            if table is not None and table.device == fingerprint["device"] and table.fingerprint != fingerprint:
                found.append((path, table))
    return found


def export(table: Table, path: Path) -> Path:
    """Writes a table to be shared or committed, and returns the file: `path`, or in a folder the name by which it is
    found there.

    Raises:
        OSError: it cannot be written.
        TableError: the table has something that none can have.
    """
    if path.is_dir():
        path = path_of(table.fingerprint, path)
    _replace(path, _encoded(tables.from_json(tables.to_json(table))))
    return path


class Store:
    """A table while it is filled: what is added is in the file at once.

    It begins with what the file has. Other processes may fill the same file: what they add is kept, and is in `table`
    after the next `add`. Of two entries for the same calls a complete one is kept before an interrupted one, then the
    newer one.

    Attributes:
        path: of the file.
        table: what the file has and what was added here.
        problem: why the file could not be written the last time, so that `table` has more than it; None if it could.
    """

    def __init__(self, path: Path, fingerprint: dict[str, str], allow_lost_nan: bool = False) -> None:
        self.path = path
        self.table = Table(dict(fingerprint), allow_lost_nan)
        self.problem: str | None = None
        self._unsaved = Table(self.table.fingerprint)  # of the table: what is newer than the file
        self._enabled: set[str] = set()  # kernels that the file may still have disabled
        self._save()

    def add(self, entry: Entry) -> None:
        """Keeps an entry, with its reasons on one line each, in place of what there was for the same calls.

        Raises:
            TableError: a table cannot hold it.
        """
        entry = tables.storable(entry)
        self._unsaved.entries[entry.key] = self.table.entries[entry.key] = entry
        self._save()

    def conform(self, backend: str, kernels: Iterable[str], wrong: Mapping[str, str]) -> None:
        """Keeps that a backend's instructions were tried on this device: of its kernels those that are `wrong` must not
        be used, with the reason; the others may be, whatever was found out before."""
        right = set(kernels) - wrong.keys()
        reasons = {one_line(name, tables.LONGEST): one_line(why, tables.LONGEST) for name, why in wrong.items()}
        self._enabled = (self._enabled | right) - reasons.keys()
        for table in (self.table, self._unsaved):
            table.disabled = {name: why for name, why in table.disabled.items() if name not in right} | reasons
            table.conformance = tuple(sorted({*table.conformance, backend}))
        self._save()

    def _save(self) -> None:
        try:
            self._write()
        except KeyboardInterrupt:
            self._write()  # what took long to measure is in the file before the process ends
            raise

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                self._merge()
                _replace(self.path, _encoded(self.table))
        except (OSError, TableError) as error:
            self.problem = _reason(error)
            _warn(
                f"{self.path.parent} cannot be written: {self.problem}; what is measured is kept for this process "
                "only; set FASTCONV_TABLES to another folder",
                about=self.path.parent,
            )
        else:
            self.problem = None
            self._unsaved = Table(self.table.fingerprint)
            self._enabled.clear()

    def _merge(self) -> None:
        """Takes over what the file has by now. A file that cannot serve is moved out of the way."""
        try:
            found = _read(self.path, self.table.fingerprint)
        except TableError as error:
            aside = self.path.with_name(f"{self.path.name}.broken")
            os.replace(self.path, aside)
            _warn(f"{self.path} is not used: {error}; it is {aside.name} now, and a new one is begun", about=aside)
            return
        if found is None:
            return
        same_rule = found.allow_lost_nan == self.table.allow_lost_nan
        for key, entry in found.entries.items():
            ours = self._unsaved.entries.get(key)
            better = ours is None or (entry.complete and not ours.complete)
            # What was judged by the other rule for NaN stands where no candidate loses one.
            if better and (same_rule or all(one.keeps_nan for one in entry.candidates)):
                self.table.entries[key] = entry
        theirs = {name: why for name, why in found.disabled.items() if name not in self._enabled}
        self.table.disabled = {**theirs, **self._unsaved.disabled}
        self.table.conformance = tuple(sorted({*self.table.conformance, *found.conformance}))


# ------------------------------------------------------------------------------------------ the files


def _slug(fingerprint: dict[str, str]) -> str:
    """The device's name in what every file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", fingerprint["device"].lower())[:60].strip("-") or "device"


def _read(path: Path, fingerprint: dict[str, str] | None = None) -> Table | None:
    """The table of a file, of this fingerprint if one is given; None where there is no file.

    Raises:
        OSError: the file cannot be read.
        TableError: it is not what it should be.
    """
    try:
        status = path.stat()
    except OSError:  # or none that can be seen: in a folder of somebody else
        return None
    if not stat.S_ISREG(status.st_mode):
        raise TableError("it is not a file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if not 0 < len(data) <= MOST_BYTES:
        raise TableError(f"it has {status.st_size} bytes, needed 1 to {MOST_BYTES}")
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is not JSON ({error})") from error
    table = tables.from_json(document)
    if fingerprint is not None and table.fingerprint != fingerprint:
        raise TableError(f"it was made with {differences(table.fingerprint, fingerprint)}")
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _encoded(table: Table) -> bytes:
    if len(table.entries) > tables.MOST_ENTRIES:
        raise TableError(f"the table has {len(table.entries)} entries, more than {tables.MOST_ENTRIES}")
    data = (_written(tables.to_json(table)) + "\n").encode()
    if len(data) > MOST_BYTES:
        raise TableError(f"the table has {len(data)} bytes, more than {MOST_BYTES}")
    return data


def _written(value: Any, depth: int = 0) -> str:
    """JSON with a candidate on each line, so that two versions of a file can be compared by eye."""
    if depth == _DEPTH or not isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_written(one, depth + 1)}" for key, one in value.items()]
    else:
        parts = [_written(one, depth + 1) for one in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    if sum(len(part) + 2 for part in parts) <= _LINE and not any("\n" in part for part in parts):
        return opening + ", ".join(parts) + closing
    line = "\n" + " " * depth
    return f"{opening}{line} " + f",{line} ".join(parts) + f"{line}{closing}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time for a file. The lock's own file stays: who removed it would take it from who waits."""
    with open(path.with_name(f"{path.name}.lock"), "ab") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, data: bytes) -> None:
    """In one step: whoever reads finds the old file or the new one."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _warn(message: str, about: Path) -> None:
    """Once in a process for each path that it is about."""
    if str(about) not in _warned:
        _warned.add(str(about))
        warnings.warn(f"fastconv: {message}", RuntimeWarning, stacklevel=3)

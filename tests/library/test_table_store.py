"""A table while it is filled: what was measured is not lost, whatever happens."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastconv.operators import table_files, tables
from fastconv.operators.table_files import Store, load, path_of
from support.table_files import DAMAGE, HERE, LOSES_NAN, RIGHT, Messages, entry, table, unreadable


def test_a_store_writes_at_once(tmp_path: Path, said: Messages) -> None:
    path = path_of(HERE, tmp_path / "a" / "b")
    store = Store(path, HERE)
    assert load(path, HERE) == table()
    store.add(entry(1))
    assert load(path, HERE) == table(entry(1))
    store.conform("cuda", ["sm_90a"], {"sm_90a": "wgmma:\nwrong"})
    found = load(path, HERE)
    assert found == store.table
    assert found.disabled == {"sm_90a": "wgmma: wrong"}
    assert store.problem is None
    assert list(said) == []
    assert {one.name for one in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


def test_what_was_tried_again_counts(table_file: Path, said: Messages) -> None:
    """Of a backend's own kernels: what is no longer wrong may run again, what others found stays."""
    store = Store(table_file, HERE)
    store.conform("cuda", ["a", "b"], {"a": "wrong", "b": "wrong"})
    Store(table_file, HERE).conform("other", ["c"], {"c": "wrong"})
    store.conform("cuda", ["a", "b"], {"b": "still"})
    found = load(table_file, HERE)
    assert found == store.table
    assert found.disabled == {"b": "still", "c": "wrong"}
    assert found.conformance == ("cuda", "other")
    assert Store(table_file, HERE).table == found
    Store(table_file, HERE).conform("cuda", ["a", "b"], {})
    store.add(entry(3))
    assert load(table_file, HERE).disabled == {"c": "wrong"}, "what another process tried later"
    assert list(said) == []


def test_a_store_goes_on(table_file: Path) -> None:
    Store(table_file, HERE).conform("cuda", ["a"], {"a": "b"})
    store = Store(table_file, HERE)
    assert store.table.entries == {entry().key: entry()}
    store.add(entry(2))
    found = load(table_file, HERE)
    assert found == store.table
    assert found.entries.keys() == {entry(1).key, entry(2).key}
    assert found.disabled == {"a": "b"}


def test_what_no_table_holds_changes_nothing(table_file: Path) -> None:
    store, before = Store(table_file, HERE), table_file.read_bytes()
    with pytest.raises(tables.TableError):
        store.add(entry(2, dataclasses.replace(RIGHT, error=float("nan"))))
    store.add(entry(1))
    assert table_file.read_bytes() == before


ADD = """
import json, sys
from pathlib import Path
from fastconv.operators.table_files import Store
from fastconv.operators.tables import Candidate, Entry

store = Store(Path(sys.argv[1]), json.loads(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for size in range(int(sys.argv[3]), int(sys.argv[3]) + 50):
    store.add(Entry("conv2d_relu", "any", (size,), (Candidate("cuda", outcome="ok"),)))
store.conform("cuda", [], {sys.argv[3]: "wrong"})
assert store.problem is None
"""


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    path = path_of(HERE, tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", ADD, str(path), json.dumps(HERE), start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for start in ("0", "50")
    ]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    found = load(path, HERE)
    assert [size for _, _, (size,) in sorted(found.entries)] == list(range(100))
    assert found.disabled.keys() == {"0", "50"}


def test_which_of_two_entries_stays(table_file: Path) -> None:
    """A complete one before an interrupted one, then the newer one."""
    one, other = Store(table_file, HERE), Store(table_file, HERE)
    ours = entry(1, dataclasses.replace(RIGHT, error=0.25))
    interrupted = dataclasses.replace(ours, complete=False)
    other.add(interrupted)
    assert load(table_file, HERE).entries == {entry().key: entry()}, "a complete one before an interrupted one"
    other.add(ours)
    assert load(table_file, HERE).entries == {entry().key: ours}, "the newer one of two"
    one.add(entry(2))
    assert one.table.entries[ours.key] == ours, "what it read long ago is not the newer one"
    one.add(entry(1))
    other.add(entry(3))
    assert load(table_file, HERE).entries[entry().key] == entry(), "nor is what it added long ago"


def test_entries_of_the_other_rule_for_nan(table_file: Path) -> None:
    """They stand where the rule had no say."""
    store = Store(table_file, HERE)
    store.add(entry(2, RIGHT, LOSES_NAN))
    found = Store(table_file, HERE, allow_lost_nan=True)
    assert found.table.allow_lost_nan
    assert found.table.entries.keys() == {entry(1).key}
    assert load(table_file, HERE) == found.table


@pytest.mark.parametrize("name", sorted(set(DAMAGE) - {"unreadable"}))
def test_a_damaged_file_is_moved_aside(name: str, table_file: Path, said: Messages) -> None:
    store = Store(table_file, HERE)
    store.add(entry(1))
    damage, text = DAMAGE[name]
    damage(table_file)
    before = table_file.stat()
    store.add(entry(2))
    store.add(entry(3))
    (message,) = said
    aside = table_file.with_name(f"{table_file.name}.broken")
    assert text in message
    assert str(table_file) in message
    assert aside.name in message
    assert (aside.stat().st_ino, aside.stat().st_size) == (before.st_ino, before.st_size)
    assert load(table_file, HERE).entries.keys() == {entry(size).key for size in (1, 2, 3)}


def test_a_file_that_cannot_be_read_now_is_left(table_file: Path, said: Messages) -> None:
    unreadable(table_file)
    store = Store(table_file, HERE)
    assert store.problem == os.strerror(errno.EIO)
    assert table_file.is_symlink()
    assert len(list(said)) == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path, said: Messages) -> None:
    """For root, too: below a file there is no folder."""
    (tmp_path / "file").touch()
    store = Store(path_of(HERE, tmp_path / "file" / "fastconv"), HERE)
    store.add(entry(1))
    store.add(entry(2))
    (message,) = said
    assert str(tmp_path / "file" / "fastconv") in message
    assert "FASTCONV_TABLES" in message
    assert os.strerror(errno.ENOTDIR) in message
    assert store.problem == os.strerror(errno.ENOTDIR)
    assert store.table == table(entry(1), entry(2))


def test_a_full_disk_that_is_emptied(table_file: Path, said: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(table_file, HERE)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        store.add(entry(2))
    assert store.problem == os.strerror(errno.ENOSPC)
    assert load(table_file, HERE) == table(entry(1))
    store.add(entry(3))
    assert store.problem is None
    assert load(table_file, HERE) == table(entry(1), entry(2), entry(3))
    assert len(list(said)) == 1


def test_a_table_that_no_file_holds(table_file: Path, said: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could never be read again."""
    store, before = Store(table_file, HERE), table_file.read_bytes()
    monkeypatch.setattr(table_files, "MOST_BYTES", len(before) + 10)
    store.add(entry(2))
    assert table_file.read_bytes() == before
    assert f"more than {len(before) + 10}" in store.problem
    monkeypatch.setattr(tables, "MOST_ENTRIES", 1)
    store.add(entry(3))
    assert store.problem == "the table has 3 entries, more than 1"
    assert len(list(said)) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_while_it_saves(table_file: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The first Ctrl-C waits for the file, the second does not; neither leaves half of one."""
    store, before, replace = Store(table_file, HERE), table_file.read_bytes(), os.replace
    interrupts = [KeyboardInterrupt] * times

    def interrupted(*args: Path) -> None:
        if interrupts:
            raise interrupts.pop()
        replace(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add(entry(2))
    assert (table_file.read_bytes() == before) == (times == 2)
    assert {one.name for one in table_file.parent.iterdir()} == {table_file.name, f"{table_file.name}.lock"}
    store.add(entry(3))
    assert load(table_file, HERE) == table(entry(1), entry(2), entry(3))

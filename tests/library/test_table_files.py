"""Tables on disk: where they lie, and that a file that cannot serve costs one warning with the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastconv.operators import table_files, tables
from fastconv.operators.fingerprint import fingerprint
from fastconv.operators.table_files import export, in_force, load, others, path_of
from fastconv.operators.tables import Candidate
from support.table_files import CPU, DAMAGE, HERE, LOSES_NAN, OLDER, RIGHT, Messages, entry, table

# ------------------------------------------------------------------------------------- where they lie


def test_where_the_users_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FASTCONV_TABLES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table_files.user_folder() == tmp_path / ".cache/fastconv"
    monkeypatch.setenv("HOME", "")
    assert table_files.user_folder().is_absolute()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # of no meaning, says its specification
    assert table_files.user_folder().is_absolute()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert table_files.user_folder() == tmp_path / "x/fastconv"
    monkeypatch.setenv("FASTCONV_TABLES", str(tmp_path / "t"))
    assert table_files.user_folder() == tmp_path / "t"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTCONV_TABLES", "tables")
    assert table_files.user_folder() == tmp_path / "tables"


def test_the_package_has_a_folder_for_tables() -> None:
    assert (table_files.shipped_folder() / "README.md").is_file()


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "../../etc/x", "a" * 300, "ü\0\n", "CON:|?*", "."])
def test_names_of_files(name: str, tmp_path: Path) -> None:
    path = path_of({**HERE, "device": name}, tmp_path)
    assert path.parent == tmp_path
    assert set(path.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    assert len(path.name) <= 80
    assert path.name[0].isalnum()
    path.touch()


def test_another_fingerprint_has_another_name(tmp_path: Path) -> None:
    found = {path_of(made, tmp_path) for made in (HERE, OLDER, {**HERE, "device": "nvidia-test"}, {**HERE, "x": "1"})}
    assert len(found) == 4
    assert path_of(dict(reversed(HERE.items())), tmp_path) in found


# --------------------------------------------------------------------------------------------- reading


def test_what_was_written_is_read(table_file: Path, said: Messages) -> None:
    assert load(table_file, HERE) == table(entry())
    assert "größer" in table_file.read_text(encoding="utf-8")
    assert list(said) == []


def test_no_file(tmp_path: Path, said: Messages) -> None:
    assert load(tmp_path / "none.json", HERE) is None
    assert load(tmp_path / "no folder" / "none.json", HERE) is None
    (tmp_path / "file").touch()
    assert load(tmp_path / "file" / "none.json", HERE) is None
    assert list(said) == []


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_cannot_serve(name: str, table_file: Path, said: Messages) -> None:
    damage, text = DAMAGE[name]
    damage(table_file)
    before = table_file.lstat()
    assert load(table_file, HERE) is None
    assert load(table_file, HERE) is None
    (message,) = said
    assert text in message
    assert str(table_file) in message
    assert "python -m fastconv qualify" in message
    assert "remove the file" in message
    assert len(message) < 600
    after = table_file.lstat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def test_each_file_has_its_own_warning(tmp_path: Path, said: Messages) -> None:
    for name in ("one", "other"):
        (tmp_path / name).touch()
        load(tmp_path / name, HERE)
    assert len(list(said)) == 2


IN_ASCII = """
import json, sys
from pathlib import Path
from fastconv.operators.table_files import Store, load

path, here = Path(sys.argv[1]), json.loads(sys.argv[2])
assert load(path, here).entries
Store(path, here).conform("cuda", [], {"a": "\\xfc"})
"""


def test_the_locale_does_not_matter(table_file: Path) -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-X", "utf8=0", "-c", IN_ASCII]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    arguments = [str(table_file), json.dumps(HERE)]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert load(table_file, HERE).disabled == {"a": "ü"}


def test_the_order_of_those_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's first, then that of the package."""
    monkeypatch.setenv("FASTCONV_TABLES", str(tmp_path / "user"))
    monkeypatch.setattr(table_files, "shipped_folder", lambda: tmp_path / "shipped")
    assert in_force(CPU) == []
    for name in ("shipped", "user"):
        (tmp_path / name).mkdir()
        export(table(entry(len(name)), made=fingerprint(CPU)), tmp_path / name)
    assert [path.parent.name for path, _ in in_force(CPU)] == ["user", "shipped"]


def test_those_of_other_versions(table_file: Path, said: Messages) -> None:
    folder = table_file.parent
    assert others(folder, HERE) == []
    assert others(folder / "none", HERE) == []
    older = export(table(entry(), made=OLDER), folder)
    export(table(entry(), made={**HERE, "device": "NVIDIA Test"}), folder)  # to file systems the same name
    export(table(entry(), made={**HERE, "device": "NVIDIA Test ü 2"}), folder)
    path_of({**HERE, "torch": "2.12"}, folder).write_text("damaged")
    assert others(folder, HERE) == [(older, table(entry(), made=OLDER))]
    assert list(said) == []


# ------------------------------------------------------------------------------------------ exporting


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    """A line for each candidate."""
    many = [entry(size, RIGHT, LOSES_NAN) for size in range(3)]
    one = export(table(*many), tmp_path / "one").read_bytes()
    assert export(table(*reversed(many)), tmp_path / "other").read_bytes() == one
    lines = one.decode().splitlines()
    assert sum('"backend"' in line for line in lines) == 6
    assert max(map(len, lines)) < 200


def test_what_is_exported_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(tables.TableError, match="outcome"):
        export(table(entry(1, Candidate("cuda", outcome="perhaps"))), tmp_path)
    assert list(tmp_path.iterdir()) == []

"""A library that is missing, damaged or foreign costs one warning and speed, never a traceback."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv import _C
from fastconv.__main__ import COMMANDS, main
from fastconv.commands import info
from fastconv.operators import library, table_files
from fastconv.operators.fingerprint import fingerprint
from fastconv.operators.table_files import export
from support.table_files import CPU, Messages, entry, table

# Runs with a damaged copy of the package, in a process of its own: a bad library may kill it.
SCRIPT = """
import json, sys, warnings
import torch
torch.__version__ = sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastconv
from fastconv.operators import backends, library

x = torch.randn(2, 8, 5, 5, requires_grad=True)
y = fastconv.ops.local_response_norm(fastconv.ops.add_relu(x, x), 5)
y.sum().backward()
expected = torch.nn.functional.local_response_norm((x + x).relu(), 5)
torch.testing.assert_close(y, expected)
print(json.dumps({
    "file": fastconv.__file__,
    "warnings": [str(w.message) for w in caught if "fastconv" in str(w.message)],
    "loaded": library.LOADED,
    "problem": library.PROBLEM,
    "available": backends.available(),
}))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, free to be damaged."""
    source = Path(fastconv.__file__).parent
    copy = tmp_path / "fastconv"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    shutil.copy2(_C.__file__, copy)
    return copy


def library_of(package: Path) -> Path:
    (library,) = package.glob("_C.*")
    return library


def run(package: Path, torch_version: str = torch.__version__) -> dict:
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, torch_version],
        capture_output=True,
        text=True,
        env=environment,
        cwd=package.parent,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    outcome = json.loads(result.stdout)
    assert outcome["file"] == str(package / "__init__.py")
    return outcome


def assert_one_warning(outcome: dict, *words: str) -> None:
    assert not outcome["loaded"]
    (warning,) = outcome["warnings"]
    assert warning == outcome["problem"] == outcome["available"]["cpu"]
    for word in (*words, f"torch {torch.__version__.split('+')[0]}", "pip install"):
        assert word in warning


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def test_good_library(package):
    outcome = run(package)
    assert outcome["loaded"]
    assert outcome["problem"] is None
    assert outcome["warnings"] == []
    assert outcome["available"]["cpu"] is None


def test_missing(package):
    library_of(package).unlink()
    assert_one_warning(run(package), "was not built", "built for: unknown")


def test_of_another_python(package):
    library = library_of(package)
    library.rename(package / "_C.cpython-39-x86_64-linux-gnu.so")
    assert_one_warning(run(package), "no library for this Python", "cpython-39")


def test_of_another_version(package):
    version = fastconv.__version__.encode()
    other = b"9" * len(version)
    replace_bytes(library_of(package), b'"fastconv": "' + version, b'"fastconv": "' + other)
    assert_one_warning(
        run(package),
        "another version",
        f"fastconv {other.decode()}",
        f"fastconv {version.decode()}",
    )


def test_of_another_torch_abi(package):
    replace_bytes(library_of(package), b"torch_library_init_def", b"torch_library_init_xxx")
    built_for = f"torch {library.build_info()['torch']}"
    assert_one_warning(run(package), "undefined symbol", "torch_library_init_xxx", built_for)


def test_cut_short(package):
    """Loading such a file would end the process with SIGBUS."""
    library = library_of(package)
    os.truncate(library, library.stat().st_size // 2)
    assert_one_warning(run(package), "is damaged")


def test_torch_too_old(package):
    outcome = run(package, torch_version="2.9.1")
    assert not outcome["loaded"]
    (warning,) = outcome["warnings"]
    assert "needs torch" in warning
    assert "torch 2.9.1" in warning


@pytest.mark.parametrize("size", [0, 4, 63, 64, 1000, -5000, -1])
def test_any_cut_is_seen(package, size):
    path = library_of(package)
    assert library.is_whole(path)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert not library.is_whole(path)


def test_build_info():
    assert library.build_info() == _C.build_info()
    assert library.build_info()["fastconv"] == fastconv.__version__


def test_info(capsys):
    assert main(["info"]) == 0
    report = capsys.readouterr().out
    lines = dict(line.split(None, 1) for line in report.splitlines() if line[0] != " ")
    assert lines["fastconv"].startswith(fastconv.__version__)
    assert lines["torch"] == torch.__version__
    assert lines["library"] == "loaded"
    assert "reference: available" in report
    assert library.build_info()["compiler"] in report


def test_info_names_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Messages) -> None:
    monkeypatch.setenv("FASTCONV_TABLES", str(tmp_path))
    monkeypatch.setattr(table_files, "shipped_folder", lambda: tmp_path / "shipped")
    assert "cpu: none: run `python -m fastconv qualify`" in info.facts()["tables"]

    here = fingerprint(CPU)
    older = export(table(entry(1), made={**here, "torch": "2.11.0"}), tmp_path)
    interrupted = dataclasses.replace(entry(3), complete=False)
    path = export(table(entry(1), entry(2), interrupted, made=here), tmp_path)
    first, second = (line for line in info.facts()["tables"].splitlines() if line.startswith("cpu"))
    assert first.startswith(f"cpu: {path}, 3 entries, 1 of them incomplete, made with device {here['device']}, ")
    assert f"torch {torch.__version__}" in first
    assert second == f"cpu: not {older}, 1 entry, made with torch 2.11.0 (here {torch.__version__})"

    os.truncate(path, 10)
    assert "cpu: none: run" in info.facts()["tables"]
    assert len(list(said)) == 1


def test_info_names_the_capability_that_runs():
    result = subprocess.run(
        [sys.executable, "-m", "fastconv", "info"],
        capture_output=True,
        text=True,
        env=os.environ | {"FASTCONV_CPU_CAPABILITY": "default"},
    )
    assert "default kernels" in result.stdout, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"python -m fastconv {name}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["inof"])
    assert end.value.code == 2
    assert "invalid choice: 'inof'" in capsys.readouterr().err

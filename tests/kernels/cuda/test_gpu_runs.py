"""What keeps one bad kernel on a GPU from spoiling a run of the tests: see conftest.py, and kernel_backends.py."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import kernel_backends
from support.kernel_backends import device_of

# A GPU of which nothing works any more after the second test, and a fourth test that never ends.
TESTS = """
import threading

import pytest
import torch

@pytest.mark.parametrize("i", range(5))
def test(i):
    if i == 1:
        def synchronize():
            raise RuntimeError("CUDA error: an illegal memory access\\nand advice")

        torch.cuda.is_initialized = lambda: True
        torch.cuda.synchronize = synchronize
    if i == 3:
        threading.Event().wait()
"""


def run(folder: Path, *options: str) -> str:
    shutil.copy(Path(__file__).parents[3] / "conftest.py", folder)
    (folder / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--test-seconds=5", *options]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    process = subprocess.run(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.returncode != 0, process.stdout
    return process.stdout


def rows_of(file: Path) -> dict[str, dict[str, Any]]:
    """Of a table of outcomes, by what stands in the brackets."""
    rows = {row["test"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert all(row["seconds"] >= 0 for row in rows.values())
    return {test.removeprefix("test_some.py::test").strip("[]"): row for test, row in rows.items()}


BROKEN = "test_some.py::test[1]: the process ends with it: CUDA error: an illegal memory access\n"


def test_a_broken_gpu_ends_the_run(tmp_path: Path) -> None:
    """Each test has its line in the table as soon as it ran."""
    file = tmp_path / "outcomes.jsonl"
    printed = run(tmp_path, f"--outcomes={file}")
    assert BROKEN in printed
    assert "1 failed, 1 passed" in printed
    rows = rows_of(file)
    assert {test: row["outcome"] for test, row in rows.items()} == {"0": "ok", "1": "error"}
    assert rows["1"]["problem"] == "RuntimeError: CUDA error: an illegal memory access"


def test_a_test_that_hangs_ends_the_run(tmp_path: Path) -> None:
    printed = run(tmp_path, "-k", "2 or 3 or 4")
    assert "Timeout" in printed
    assert "in test\n" in printed
    assert "passed" not in printed


@pytest.mark.slow
def test_workers_are_replaced(tmp_path: Path) -> None:
    """The two tests fail by name, the others pass; in the table those that ended their workers stand, too."""
    if importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    file = tmp_path / "outcomes.jsonl"
    printed = run(tmp_path, f"--outcomes={file}", "-n", "2")
    assert BROKEN in printed
    assert "2 failed, 3 passed" in printed
    for i in (1, 3):
        assert f"FAILED test_some.py::test[{i}] - worker" in printed
    rows = rows_of(file)
    assert {test: row["outcome"] for test, row in rows.items()} == {
        f"{i}": "error" if i in (1, 3) else "ok" for i in range(5)
    }
    assert "crashed while running" in rows["1"]["problem"]


def test_only_the_named_backend_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated one would be built, which takes minutes."""

    def build() -> str:
        raise AssertionError("asked")

    monkeypatch.setattr(kernel_backends, "add_emulated", build)
    assert device_of("reference").type == "cpu"
    with pytest.raises(AssertionError, match="asked"):
        device_of("cuda-emulated")

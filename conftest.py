"""Several workers (pytest -n) share the cores: one thread each. Without workers torch keeps its threads.

Without a GPU Triton's kernels run in its interpreter, on CPU tensors. Triton reads the switch when it is imported.

On a GPU a kernel that went astray must not be blamed on the tests behind it, nor a kernel that hangs hold them up.
"""

import faulthandler
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only-backend", metavar="NAME", help="only the kernels' tests on it: cuda-emulated or cuda")
    parser.addoption(
        "--test-seconds", type=float, metavar="N", help="end the process, or the worker, of a test that takes longer"
    )
    parser.addoption(
        "--outcomes", type=Path, metavar="FILE", help="append a line of JSON for each test, as soon as it ran"
    )


_TABLES = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    # What was measured on this machine for its user is not for the tests to run by.
    config.stash[_TABLES] = folder = tempfile.TemporaryDirectory()
    os.environ["FASTCONV_TABLES"] = folder.name
    config.stash[_STDERR] = os.dup(2)  # nothing is captured yet
    if config.option.outcomes and not IS_WORKER:
        config.pluginmanager.register(_Outcomes(config.option.outcomes))


class _Outcomes:
    """Writes what became of each test, also of one with which its worker ended."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row = {
            "test": report.nodeid,
            "outcome": {"passed": "ok", "failed": "error"}.get(report.outcome, report.outcome),
            "seconds": round(report.duration, 3),
        }
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            row["problem"] = str(crash.message if crash else report.longrepr).strip().partition("\n")[0][:300]
        with open(self._file, "a") as file:
            file.write(json.dumps(row) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Slow ones first: workers that are done would wait for one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    name = config.option.only_backend
    if name is None:
        return
    chosen = {item: name in getattr(item, "callspec", _NO_PARAMETERS).params.values() for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not chosen[item]])
    items[:] = [item for item in items if chosen[item]]


_NO_PARAMETERS = SimpleNamespace(params={})


def pytest_runtest_setup() -> None:
    """Every test sees the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    seconds = item.config.option.test_seconds
    if seconds:
        # By a thread of its own: a call that waits for a GPU sees no signal.
        faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[_STDERR])
    try:
        return (yield)
    finally:
        if seconds:
            faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Waits for the kernels of the test. After an illegal access nothing works any more in this process."""
    try:
        return (yield)
    finally:
        if torch.cuda.is_initialized():
            _wait_for_the_gpu(item)


def _wait_for_the_gpu(item: pytest.Item) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        line = f"{item.nodeid}: the process ends with it: {str(error).splitlines()[0]}\n"
        os.write(item.config.stash[_STDERR], line.encode())
        if IS_WORKER:
            os._exit(1)  # xdist fails this test and goes on in a fresh worker
        item.session.shouldstop = line
        raise

"""`qualify` from end to end on a CPU: who is refused and why, who wins, what is kept when something ends it."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastconv
from fastconv.operators import measured, table_files
from fastconv.operators.fingerprint import fingerprint
from fastconv.operators.tables import Entry
from fastconv.qualification import qualify as qualifying
from fastconv.qualification.collecting import Collected, calls_of
from fastconv.qualification.examination import Options
from fastconv.qualification.reporting import Qualification
from support import liars
from support.kernel_backends import device_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's tables: none yet."""
    monkeypatch.setenv("FASTCONV_TABLES", str(tmp_path))
    measured.forget()
    yield tmp_path
    measured.forget()


def a_layer(training: bool = False) -> Collected:
    input, weight = torch.randn(2, 4, 9, 9), torch.randn(6, 4, 3, 3)
    if training:
        weight.requires_grad_()
    return calls_of(lambda x: fastconv.ops.conv2d_relu(x, weight, padding=1), [input], training=training)


def examine(collected: Collected, *among: str, options: dict[str, Any] | None = None, **more: Any) -> Qualification:
    return qualifying.examine(
        collected,
        CPU,
        Options(among, seconds=0.02, **(options or {})),
        show=False,
        modules=["support.liars"],
        **more,
    )


def reasons(entry: Entry) -> dict[str, str]:
    return {one.backend: one.reason for one in entry.candidates if one.outcome != "ok"}


@pytest.mark.slow
def test_liars_are_refused_and_the_rest_goes_on(folder: Path) -> None:
    among = ("border", "once", "nan", "loses-nan", "unwritten", "hangs", "exits", "crashes", "raises", "winner")
    found = examine(a_layer(), *among, patience=10.0)
    (entry,) = found.entries
    said = reasons(entry)
    assert said.keys() == set(among) - {"winner"}
    assert "border: max error 0.01" in said["border"]
    assert "when it was run again" in said["once"]
    assert "wrong with random values" in said["nan"]
    assert said["loses-nan"] == "it turns NaN into a number"
    assert "wrong with random values" in said["unwritten"]
    assert said["hangs"] == "its process gave no answer for 10 s"
    assert said["exits"] == "its process exited with status 3"
    assert "SIGSEGV" in said["crashes"]
    assert said["raises"] == "RuntimeError: out of resource: shared [1mmemory"
    assert [one.backend for one in entry.candidates[:2]] == ["winner", "reference"]
    # what was found lasts: nothing is tried again
    started = time.monotonic()
    assert examine(a_layer(), *among, patience=4.0).entries == found.entries
    assert time.monotonic() - started < 3


def test_a_backward_is_examined_too() -> None:
    """And belongs to its forward. Each pass has candidates of its own."""
    found = examine(a_layer(training=True), "border", "nan", "cpu")
    forward, backward = found.entries
    assert (forward.operator, backward.operator) == ("conv2d_relu", "conv2d_backward")
    assert forward.backward == (backward.key,)
    assert reasons(forward).keys() == reasons(backward).keys() == {"border", "nan"}
    assert {one.backend for one in backward.candidates if one.outcome == "ok"} == {"reference", "cpu"}


def test_slower_is_right_and_not_taken() -> None:
    (entry,) = examine(a_layer(), "slow", "shuffles").entries
    found = {one.backend: one for one in entry.candidates}
    assert entry.candidates[0].backend == "reference"
    assert found["slow"].outcome == "ok"
    assert found["slow"].reason.startswith("not faster than aten beyond the spread: ")
    assert found["slow"].seconds is not None
    assert found["slow"].seconds[0] > 0.005
    assert (found["shuffles"].deterministic, found["slow"].deterministic) == (False, True)


def test_lost_nan_may_be_allowed() -> None:
    (entry,) = examine(a_layer(), "loses-nan", options={"allow_lost_nan": True}).entries
    found = {one.backend: one for one in entry.candidates}
    assert (found["loses-nan"].outcome, found["loses-nan"].keeps_nan) == ("ok", False)


@pytest.mark.slow
def test_other_backends_are_added_to_what_is_known() -> None:
    examine(a_layer(), "winner")
    (entry,) = examine(a_layer(), "winner", "border").entries
    assert {one.backend for one in entry.candidates} == {"reference", "winner", "border"}


@pytest.mark.slow
def test_emulated_and_interpreted_kernels() -> None:
    """In the emulator and in Triton's interpreter: kernels one by one, and block sizes. All are right."""
    for backend in ("cuda-emulated", "triton"):
        device_of(backend)  # skips where one cannot run
    x, w = torch.randn(1, 16, 6, 6).half(), torch.randn(16, 16, 3, 3).half()
    collected = calls_of(lambda x: fastconv.ops.conv2d_relu(x, w, padding=1), [x], training=False)
    collected.add(calls_of(lambda x: fastconv.ops.add_relu(x, x), [x], training=False))
    found = qualifying.examine(
        collected,
        CPU,
        Options(("cuda-emulated", "triton"), search=True, seconds=0.01),
        show=False,
        modules=["support.kernel_backends"],
    )
    conv, add = found.entries
    assert not {name: why for entry in found.entries for name, why in reasons(entry).items()}
    variants = [one.variant for one in conv.candidates if one.backend == "cuda-emulated"]
    assert {} in variants
    assert len({variant["conv2d_fprop"] for variant in variants if variant}) >= 2
    sizes = [one.variant["add_relu any"] for one in add.candidates if one.backend == "triton" and one.variant]
    assert len(sizes) >= 2


INTERRUPTED = """
import sys
import torch
import fastconv
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
from fastconv.qualification import qualify as qualifying
from fastconv.qualification.collecting import calls_of
from fastconv.qualification.examination import Options
weights = [torch.randn(4, 4, 1, 1), torch.randn(4, 4, 3, 3)]
def model(x):
    for weight in weights:
        x = fastconv.ops.conv2d_relu(x, weight)
    return x
collected = calls_of(model, [torch.randn(1, 4, 8, 8)])
options = Options(("border", "hangs"), seconds=0.02)
more = {"modules": ["support.liars"], "patience": float(sys.argv[2])}
found = qualifying.examine(collected, torch.device("cpu"), options, **more)
print(len(found.entries), found.is_interrupted, flush=True)
"""


@pytest.mark.slow
def test_interrupted_and_resumed(folder: Path) -> None:
    """By Ctrl-C while a candidate hangs. What was found before is kept, and the rest is done by the next run."""
    command = [sys.executable, "-c", INTERRUPTED, str(torch.get_num_threads())]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environ}
    # A shell that starts the suite in the background has it ignore Ctrl-C, which children inherit.
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    first = subprocess.Popen([*command, "60"], preexec_fn=heeded, **pipes)
    path = table_files.path_of(fingerprint(CPU), folder)
    assert any("conv2d_relu: border is refused: " in line for line in first.stderr)
    time.sleep(0.5)  # the other one hangs now
    os.kill(first.pid, signal.SIGINT)
    assert first.communicate(timeout=30)[0] == "0 True\n"
    second = subprocess.run([*command, "10"], check=True, **pipes)
    assert second.stdout == "2 False\n"
    table = table_files.load(path, fingerprint(CPU))
    assert table is not None
    assert all(entry.complete and reasons(entry).keys() == {"border", "hangs"} for entry in table.entries.values())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return torch.relu(self.one(y) + y)


def test_a_model(folder: Path) -> None:
    """Neither weights nor buffers, gradients, modes or the random state change; the result stays what it was."""
    model = Small().train()
    x = torch.randn(2, 3, 12, 12)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = fastconv.qualify(model, x, show=False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    operators = [entry.operator for entry in found.entries]
    assert operators.count("conv2d_backward") >= 1
    assert {"conv2d_relu", "pointwise_conv2d"} <= set(operators)
    for entry in found.entries:
        assert {"reference", "cpu"} <= {one.backend for one in entry.candidates if one.outcome == "ok"}
    assert any(one.backend == "onednn" for entry in found.entries for one in entry.candidates)
    assert str(found.path) in str(found)
    assert str(len(found.entries)) in str(found)
    model.eval()
    expected = model(x)
    for fast in (fastconv.swap(model), fastconv.swap(model, qualify=x)):
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(fast(x), expected)
        torch.testing.assert_close(fast(x), expected)
    explained = fastconv.explain(fast, x)
    assert all(kernel.measured is not None for kernel in explained.kernels)
    assert "as measured on this machine" in str(explained)


def test_a_gpu_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the current one, as tensors there have it: processes and tables are asked for it."""
    seen: list[torch.device] = []

    def record(collected: Collected, device: torch.device, options: Options, **more: Any) -> Qualification:
        seen.append(device)
        return Qualification(Path(), "some GPU", ())

    monkeypatch.setattr(qualifying, "examine", record)
    monkeypatch.setattr(qualifying, "fingerprint", lambda device: {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    qualifying.in_rounds(a_layer, torch.device("cuda"), Options())
    assert seen == [torch.device("cuda", 3)]


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="got int, needed a module or a function"):
        fastconv.qualify(3)
    with pytest.raises(ValueError, match="needed one with some"):
        fastconv.qualify(nn.Linear(2, 2), torch.randn(1, 2), show=False)
    with pytest.raises(ValueError, match="got backends nobody, needed some of"):
        fastconv.qualify(Small(), torch.randn(1, 3, 8, 8), among=["nobody"], show=False)


def test_all_liars_are_tried_somewhere() -> None:
    """A new one is of no use before a test has it."""
    text = Path(__file__).read_text()
    assert all(f'"{name}"' in text for name in (*liars.SPOILT, liars.WINNER) if name != "marks")

"""``python -m fastconv qualify``: its arguments, what it prints and writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastconv import ops
from fastconv.commands import info, qualify
from fastconv.operators import backends, measured, table_files, tables
from fastconv.operators.fingerprint import fingerprint


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTCONV_TABLES", str(tmp_path / "tables"))
    measured.forget()
    yield tmp_path / "tables"
    measured.forget()


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    qualify.add_arguments(parser)
    return qualify.run(parser.parse_args(["--device", "cpu", *arguments]))


def test_layers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one op, forward and backward; then nothing is left to do, and `auto` and `info` know."""
    written, exported = tmp_path / "entries.json", tmp_path / "exported.json"
    layers = ("--layers", "--op", "add_relu", "--backends", "cpu")
    assert run(*layers, "--json", str(written), "--export", str(exported)) == 0
    printed = capsys.readouterr()
    path = table_files.path_of(fingerprint(torch.device("cpu")), folder)
    assert "4 classes of calls in " in printed.out
    assert str(path) in printed.out
    assert printed.out.count("\nadd_relu_backward ") == 2
    assert "[0/4] add_relu 1x56x56 ..." in printed.err
    entries = [tables.entry(document) for document in json.loads(written.read_text())["entries"]]
    assert {entry.operator for entry in entries} == {"add_relu", "add_relu_backward"}
    for entry in entries:
        best = entry.candidates[0]
        # what is taken was faster; the CPU's kernels are what runs without a table, and may be so by little
        assert best.backend == "reference" or (best.ratio is not None and best.ratio[0] < 1)
        assert all(one.outcome == "ok" and one.seconds is not None for one in entry.candidates)
    assert exported.read_text() == path.read_text()
    assert str(path) in info.facts()["tables"]

    assert run(*layers, "--export", f"{tmp_path / 'shipped'}/") == 0
    assert [one.name for one in (tmp_path / "shipped").iterdir()] == [path.name]
    assert "[0/" not in capsys.readouterr().err  # nothing was left to try
    x = torch.randn(1, 256, 56, 56).to(memory_format=torch.channels_last)
    looked_up: list[str] = []
    with measured.asked(lambda operator, args: looked_up.append(operator)):
        ops.add_relu(x, x)
    assert looked_up == ["add_relu"]
    assert measured.choice("add_relu", (x, x, "relu")).candidate is not None


def test_out_of_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Says that the same command goes on."""
    assert run("--layers", "--op", "add_relu", "--backends", "cpu", "--minutes", "0.00001") == 1
    assert "interrupted: the same call goes on from here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-network"], "got network 'no-such-network', needed one of"),
        (["--backends", "nobody"], "got backends nobody, needed some of"),
        (["--layers", "--op", "nothing"], "needed one with some"),
        (["--device", "meta"], "got device meta, needed a CPU or a GPU"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Says why there is none: a torch without CUDA has another reason than a machine without a GPU."""
    assert run("--device", "cuda") == 2
    assert capsys.readouterr().err == f"fastconv qualify: {backends.no_gpu()}\n"

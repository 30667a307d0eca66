"""The block sizes of the Triton kernels: the table, one of the user's own, and `tune`, which measures it.

Timers are made up, so that everything else of a run is the real thing, on small images in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.kernel_backends import on_triton

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from fastconv.commands import tune
from fastconv.triton_kernels import samples, table

WGRAD = table.SHIPPED["conv2d_wgrad"]["ieee dense wide"]
ADD_RELU = table.SHIPPED["add_relu"]["any"]
KERNELS = list(table.SHIPPED)


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with on_triton() as found:
        yield found


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table, on a GPU of a known name."""
    path = tmp_path / "folder" / "table.json"
    monkeypatch.setenv("FASTCONV_TRITON_TABLE", str(path))
    monkeypatch.setattr(table, "device_name", lambda: "NVIDIA Test")
    table.forget()
    yield path
    table.forget()


def run(device: torch.device, kernel: str, timer: tune.Timer | None = None, **options: Any) -> int:
    def same(call: Callable[[], Any]) -> float:
        call()
        return 1.0

    args = argparse.Namespace(**{"kernel": kernel, "batch": 1, "dry_run": False, **options})
    return tune.tune(args, timer or same, device, side=4)


def saved(path: Path, gpu: str = "NVIDIA Test") -> table.Table:
    return json.loads(path.read_text())["gpus"][gpu]["entries"]


def lookup() -> table.Config:
    """add_relu's entry as the next process will see it."""
    table.forget()
    return table.config("add_relu", "any")


# --------------------------------------------------------------------------------------------- tune


def test_every_kernel_has_samples() -> None:
    assert samples.SAMPLES.keys() == table.SHIPPED.keys()


@pytest.mark.parametrize("entries", [1, pytest.param(None, id="all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_entry(
    kernel: str, entries: int | None, path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample runs, is right with the shipped entry, and takes that very entry."""
    monkeypatch.setattr(tune, "MOST_CANDIDATES", 1)
    monkeypatch.setitem(table.SHIPPED, kernel, dict(itertools.islice(table.SHIPPED[kernel].items(), entries)))
    taken: list[set[str]] = [set()]
    original = table.config

    def config(wanted: str, *classes: str, **more: Any) -> table.Config:
        if wanted == kernel:
            taken[-1].add(" ".join(classes))
        return original(wanted, *classes, **more)

    def timer(call: Callable[[], Any]) -> float:
        taken.append(set())  # what was judged before belongs to the entry before
        return 1.0

    monkeypatch.setattr(table, "config", config)
    assert run(device, kernel, timer) == 0
    assert taken == [*({name} for name in table.SHIPPED[kernel]), set()]
    assert saved(path) == {kernel: table.SHIPPED[kernel]}


def test_climbs_to_the_fastest(path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """Down two steps in one direction and one in another, and back to what ran before in this process."""

    def timer(call: Callable[[], Any]) -> float:
        config = table.config("add_relu", "any")
        return abs(config["BLOCK"] - 256) + abs(config["num_warps"] - 8) + 1.0

    assert run(device, "add_relu", timer) == 0
    assert saved(path) == {"add_relu": {"any": {**ADD_RELU, "BLOCK": 256, "num_warps": 8}}}
    assert "773.0000 ms -> 1.0000 ms" in capsys.readouterr().out
    assert table.config("add_relu", "any") == ADD_RELU
    assert lookup()["BLOCK"] == 256


def test_an_entry_has_so_many_candidates() -> None:
    """Where each is faster than all before."""

    class Judge:
        taps, times = 1, 0

        def __call__(self, candidate: table.Config) -> float:
            self.times += 1
            return 0.5**self.times

    judge: Any = Judge()
    assert tune.climb("conv2d_fprop", "16bit pointwise wide", judge) is not None
    assert judge.times <= tune.MOST_CANDIDATES
    assert tune.MOST_CANDIDATES * sum(map(len, table.SHIPPED.values())) < 1500


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_may_stand_in_a_table(kernel: str, taps: int) -> None:
    for name, shipped in table.SHIPPED[kernel].items():
        found = list(tune.neighbours(kernel, name, table.guarded(shipped, taps), taps))
        assert len(found) >= 2
        assert all(table.problem(kernel, name, config) is None for config in found)
        assert all(config["num_warps"] <= 4 for config in found if taps > 1)


def spoil(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[table.Config], bool], change: Callable[[Any], None]
) -> None:
    """add_relu's kernel with a fault for some of the candidates."""
    original = samples.SAMPLES["add_relu"]

    def make(maker: samples.Maker) -> samples.Sample:
        sample = original(maker)

        def faulty(*tensors: torch.Tensor) -> list[torch.Tensor]:
            results = sample.run(*tensors)
            if wrong(table.config("add_relu", "any")):
                change(results)
            return results

        return dataclasses.replace(sample, run=faulty)

    monkeypatch.setitem(samples.SAMPLES, "add_relu", make)


def by_block(call: Callable[[], Any]) -> float:
    call()
    return 1 / table.config("add_relu", "any")["BLOCK"]


def test_a_wrong_candidate_is_left_out(
    path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At one element, by little. The shipped entry may be the wrong one, too."""
    spoil(monkeypatch, lambda config: config["BLOCK"] == 1024, lambda results: results[0][0, 0, 0, 0].add_(0.01))
    assert run(device, "add_relu", by_block) == 0
    assert saved(path)["add_relu"]["any"]["BLOCK"] == 4096
    printed = capsys.readouterr().out
    assert "left out {'BLOCK': 1024, 'num_warps': 4, 'num_stages': 2}: wrong, all: max error" in printed
    assert "wrong or impossible -> " in printed


def test_nothing_is_right(
    path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, lambda config: True, lambda results: results[1].zero_())
    assert run(device, "add_relu") == 1
    assert saved(path) == {}
    assert "nothing was right for 1 entries" in capsys.readouterr().err


def test_interrupted_and_resumed(
    path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "MOST_CANDIDATES", 2)
    times = 0

    def timer(call: Callable[[], Any]) -> float:
        nonlocal times
        times += 1
        if table.config("mask_and_sum", "channels") != table.SHIPPED["mask_and_sum"]["channels"]:
            raise KeyboardInterrupt
        return 1.0

    assert run(device, "mask_and_sum", timer) == 130
    assert list(saved(path)["mask_and_sum"]) == ["pixels"]
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert f"1 entries measured before are kept in {path}" in captured.out
    first, times = times, 0
    assert run(device, "mask_and_sum", lambda call: 1.0) == 0
    assert list(saved(path)["mask_and_sum"]) == ["pixels", "channels"]
    assert f"1 more are in {path} already" in capsys.readouterr().out
    assert run(device, "mask_and_sum", timer) == 0
    assert (first > 1, times) == (True, 0)


def test_a_candidate_that_does_not_run(path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(results: Any) -> None:
        raise RuntimeError("out of resources: shared memory")

    spoil(monkeypatch, lambda config: config["BLOCK"] == 2048, refuse)
    assert run(device, "add_relu", by_block) == 0
    assert saved(path)["add_relu"]["any"] == ADD_RELU


def test_a_candidate_that_breaks_the_gpu(
    path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends the run with what was measured before, and the next run goes around it."""
    broken = 0

    def break_it(results: Any) -> None:
        nonlocal broken
        broken += 1
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore that helps nobody")

    spoil(monkeypatch, lambda config: config["BLOCK"] == 2048, break_it)
    assert run(device, "sum_parts") == 0
    with monkeypatch.context() as patch:
        patch.setattr(tune, "is_broken", lambda device: True)
        assert run(device, "add_relu", by_block) == 1
    captured = capsys.readouterr()
    assert captured.err.strip() == (
        f"fastconv: the GPU gave up on add_relu 'any' with {ADD_RELU | {'BLOCK': 2048}} (RuntimeError: CUDA error: an "
        "illegal memory access was encountered); that candidate is left out from now on"
    )
    assert f"are kept in {path}" in captured.out
    assert saved(path).keys() == {"sum_parts"}
    assert run(device, "add_relu", by_block) == 0
    assert broken == 1
    assert saved(path).keys() == {"sum_parts", "add_relu"}


def test_only_its_own_fault_breaks_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not tune.is_broken(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not tune.is_broken(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert tune.is_broken(torch.device("cuda"))


def test_torchs_switch_is_set_back() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    with contextlib.suppress(KeyboardInterrupt), tune.precision("tf32"):
        assert torch.backends.cudnn.conv.fp32_precision == "tf32" != before
        raise KeyboardInterrupt
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "fastconv", "tune"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "tune measures on a GPU" in done.stderr


# ---------------------------------------------------------------------------------- the user's table


def test_a_table_of_the_users_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts on the GPU that it was measured on; another GPU's stays as it is."""
    chosen = {**ADD_RELU, "BLOCK": 64}
    assert lookup() == ADD_RELU
    table.Measured(path).add("add_relu", "any", chosen)
    assert lookup() == chosen
    monkeypatch.setattr(table, "device_name", lambda: "another")
    assert lookup() == ADD_RELU
    table.Measured(path).add("add_relu", "any", {**ADD_RELU, "BLOCK": 128})
    assert lookup()["BLOCK"] == 128
    assert saved(path) == {"add_relu": {"any": chosen}}
    assert os.listdir(path.parent) == [path.name]


def section(entries: Any, **versions: str) -> Any:
    gpus = {"NVIDIA Test": {"versions": {**table.versions(), **versions}, "entries": entries, "fatal": []}}
    return {"format": table.FORMAT, "gpus": gpus}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "not a file with the format"),
        ('{"entries": {}}', "not a file with the format"),
        ('{"form', "not JSON"),
        ("\udcff", "not JSON"),
        (section([]), "lacks entries"),
        (section({"add_relu": []}), "'add_relu' has no entries"),
        (section({"add_relu": {"any": ADD_RELU}}, triton="2.0"), "measured with {'fastconv': .*'triton': '2.0'}, this"),
        (section({"add_relu": {"any": ADD_RELU}}, fastconv="0"), "measured with {'fastconv': '0'"),
        (section({"add_relu": {"some": ADD_RELU}}), "'add_relu', 'some' is unknown"),
        (section({"add_relu": {"any": {"BLOCK": 64}}}), "needed one with BLOCK, num_warps, num_stages"),
        (section({"add_relu": {"any": 3}}), "needed one with BLOCK, num_warps, num_stages"),
        *(
            (section({"add_relu": {"any": {**ADD_RELU, key: value}}}), f"{key} = {value!r}, needed {needed}")
            for key, value, needed in (
                ("BLOCK", 100, "a power of two from 1 to 4096"),
                ("BLOCK", 0, "a power of two"),
                ("BLOCK", 64.0, "a power of two"),
                ("BLOCK", True, "a power of two"),
                ("BLOCK", "64", "a power of two"),
                ("BLOCK", 8192, "a power of two"),
                ("num_warps", 3, "1, 2, 4, 8 or 16"),
                ("num_stages", 9, "1 to 8"),
            )
        ),
        (
            section({"conv2d_wgrad": {"ieee dense wide": {**WGRAD, "BLOCK_K": 8}}}),
            "BLOCK_K = 8, needed a power of two from 16 to 4096",
        ),
    ],
    ids=str,
)
def test_a_table_that_cannot_serve(content: Any, problem: str, path: Path) -> None:
    """One warning with the remedy, then the shipped table."""
    text = content if isinstance(content, str) else json.dumps(content)
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=problem) as caught:
        assert lookup() == ADD_RELU
    assert len(caught) == 1
    assert f"fastconv: {path} is not used, the shipped block sizes are: " in str(caught[0].message)
    assert str(caught[0].message).endswith("remove the file, or run `python -m fastconv tune` once more")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert table.config("sum_parts", "any") == table.SHIPPED["sum_parts"]["any"]


def test_tune_measures_anew_what_does_not_count(path: Path, device: torch.device) -> None:
    path.parent.mkdir()
    content = section({"add_relu": {"any": {**ADD_RELU, "BLOCK": 64}}}, triton="2.0")
    content["gpus"]["another"] = {"kept": "as it is"}
    path.write_text(json.dumps(content))
    assert run(device, "add_relu") == 0
    assert lookup() == ADD_RELU
    assert json.loads(path.read_text())["gpus"]["another"] == {"kept": "as it is"}


def test_tune_leaves_other_files_alone(path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    path.parent.mkdir()
    path.write_text("my thesis")
    assert run(device, "add_relu") == 1
    assert path.read_text() == "my thesis"
    assert f"fastconv: {path} cannot take the table: not JSON" in capsys.readouterr().err


def test_saved_in_one_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves the table as it was."""
    measured = table.Measured(path)
    measured.add("add_relu", "any", ADD_RELU)

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:20])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        measured.add("sum_parts", "any", table.SHIPPED["sum_parts"]["any"])
    assert saved(path) == {"add_relu": {"any": ADD_RELU}}
    assert os.listdir(path.parent) == [path.name]

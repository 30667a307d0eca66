"""``python -m fastconv bench``: what it reports, and what it refuses to report."""

import json
import sys

import pytest
import torch

import fastconv
from fastconv.__main__ import main
from fastconv.commands import bench
from fastconv.measure import memory
from fastconv.measure.contenders import CHANNELS_LAST, CONTIGUOUS, IN_INFERENCE, IN_TRAINING, SWAPPED, Result, Row
from fastconv.measure.inference import Plan, infer
from fastconv.measure.timing import FEWEST_RUNS, Budget
from fastconv.measure.training import train

LENET = ["bench", "--networks", "lenet5", "--dtypes", "fp32", "--minutes", "0", "--threads", "1"]


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(**seconds):
    results = {
        who: Result(seconds=[value], error=1e-6)
        for who, value in zip((CONTIGUOUS, CHANNELS_LAST, SWAPPED), seconds.values(), strict=True)
    }
    return Row("lenet5", "inference", "fp32", 1, results)


def test_inference_end_to_end(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert main([*LENET, "--train", "--batches", "2", "1", "--markdown", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "| lenet5 | fp32 | 1 |" in printed
    assert "| lenet5 | fp32 | 2 |" in printed

    document = json.loads(file.read_text())
    assert document["environment"]["sources"].startswith("library ")
    assert [r["batch"] for r in document["rows"]] == [1, 2]
    for measured in document["rows"]:
        assert set(measured["results"]) == set(IN_INFERENCE["cpu"])
        for result in measured["results"].values():
            assert len(result["seconds"]) >= FEWEST_RUNS
            assert result["error"] < 1e-5


def test_training_end_to_end(monkeypatch, capsys):
    peaks = {CHANNELS_LAST: 3_000_000, CONTIGUOUS: 3_000_000, SWAPPED: 2_000_000}
    monkeypatch.setattr(memory, "peak_bytes", lambda function, network, who, *more: peaks[who])
    command = [*LENET[:1], "--networks", "--train", "lenet5", "--train-batch", "4", "--markdown"]
    assert main([*command, "--minutes", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (swapped,) = (line for line in lines if "| fastconv |" in line)
    assert "| 2 | 0.67x |" in swapped
    assert not any("only LRN" in line for line in lines)  # LeNet-5 has none


def altered(change):
    """A swap() whose models change what comes out."""

    def swap(model):
        right = model.forward
        model.forward = lambda x: change(right(x))
        return model

    return swap


def test_a_wrong_result_gets_no_time(monkeypatch, capsys):
    monkeypatch.setattr(fastconv, "swap", altered(lambda y: y * (1 + 1e-4)))
    assert main([*LENET, "--train", "--batches", "1", "--markdown"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "| lenet5 |" in line)
    assert "| WRONG: error 1.0e-04, allowed " in line
    assert "| ? | ? |" in line


def test_a_wrong_gradient_gets_no_time(monkeypatch):
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: None)
    swap = altered(lambda y: y + (y - y.detach()) / 100)
    monkeypatch.setattr(fastconv, "swap", swap)
    row = train("lenet5", 4, Budget(0, 1), IN_TRAINING["cpu"])
    assert row.is_wrong
    assert not row.results[SWAPPED].seconds
    assert row.results[CHANNELS_LAST].seconds


def test_losses_are_shown(capsys):
    (table,) = bench.tables([row(contiguous=2.0, channels_last=0.8, fastconv=1.0)])
    ((cells, is_loss),) = table.rows
    assert cells[6:8] == ["2.00x", "0.80x SLOWER"]
    assert is_loss
    table.show(markdown=False)
    assert "0.80x SLOWER" in capsys.readouterr().out

    (table,) = bench.tables([row(contiguous=2.0, channels_last=1.0, fastconv=1.0)])
    assert not table.rows[0][1]


def test_slow_16_bit_runs_are_left_out():
    plan = Plan(torch.device("cpu"), IN_INFERENCE["cpu"], ["fp32", "bf16"], [1, 4], Budget(0, 4), longest=1e-9)
    fp32_1, fp32_4, bf16_1, bf16_4 = infer("lenet5", plan)
    for measured in (fp32_1, fp32_4):
        assert all(len(r.seconds) >= FEWEST_RUNS for r in measured.results.values())
    for who in (CONTIGUOUS, CHANNELS_LAST):
        assert len(bf16_1.results[who].seconds) == 1
        assert not bf16_4.results[who].seconds
        assert bf16_4.results[who].note.startswith("left out: at least")
    for measured in (bf16_1, bf16_4):
        assert len(measured.results[SWAPPED].seconds) >= FEWEST_RUNS
    bench.tables([bf16_1, bf16_4])


def test_networks_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    command = ["bench", "--networks", "torchvision:mobilenet_v2", "--train", "torchvision:resnet18"]
    assert main([*command, "--markdown"]) == 0
    assert capsys.readouterr().out.count("| skipped: torchvision cannot be imported (import of torchvision halted") == 5

    assert main(["bench", "--networks", "resnet51"]) == 2
    assert "got network 'resnet51', needed one of lenet5" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_in_16_bits_is_judged_in_both(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in one of the two alone is found; the steps run in the one that was asked for."""
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: None)

    def change(y: torch.Tensor) -> torch.Tensor:
        wrong = y.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        return y + (y - y.detach()) if wrong else y

    monkeypatch.setattr(fastconv, "swap", altered(change))
    measured = train("lenet5", 4, Budget(0, 1), IN_TRAINING["cpu"], "bf16")
    assert measured.dtype == "bf16"
    assert measured.results[SWAPPED].note.startswith("WRONG")
    assert not measured.results[SWAPPED].seconds
    assert len(measured.results[CHANNELS_LAST].seconds) >= FEWEST_RUNS

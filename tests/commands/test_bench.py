"""``python -m fastconv bench``: what it reports, and what it refuses to report."""

import json
import sys

import pytest
import torch
from torch import nn

import fastconv
from fastconv.__main__ import main
from fastconv.commands import bench
from fastconv.commands.bench import CHANNELS_LAST, CONTIGUOUS, SWAPPED, Result, Row
from fastconv.measure import report

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
        assert set(measured["results"]) == set(bench.IN_INFERENCE["cpu"])
        for result in measured["results"].values():
            assert len(result["seconds"]) >= bench.FEWEST_RUNS
            assert result["error"] < 1e-5


def test_training_end_to_end(monkeypatch, capsys):
    peaks = {CHANNELS_LAST: 3_000_000, CONTIGUOUS: 3_000_000, SWAPPED: 2_000_000}
    monkeypatch.setattr(bench, "_peak_bytes_of_a_process", lambda network, who, batch: peaks[who])
    command = [*LENET[:1], "--networks", "--train", "lenet5", "--train-batch", "4", "--markdown"]
    assert main([*command, "--minutes", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (swapped,) = (line for line in lines if "| fastconv |" in line)
    assert "| 2 | 0.67x |" in swapped
    assert not any("only LRN" in line for line in lines)  # LeNet-5 has none


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_counts_activations():
    images = 2000
    # The input, and what the first convolution and its ReLU return, in float32.
    activations = images * 4 * (32 * 32 + 6 * 28 * 28)
    peak = bench._peak_bytes_of_a_process("lenet5", CHANNELS_LAST, images)
    assert activations < peak < 20 * activations


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
    monkeypatch.setattr(bench, "_peak_bytes_of_a_process", lambda *_: None)
    swap = altered(lambda y: y + (y - y.detach()) / 100)
    monkeypatch.setattr(fastconv, "swap", swap)
    row = bench.train("lenet5", 4, bench.Budget(0, 1))
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


def test_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    table = report.Table("title", ["a", "b"])
    table.add(["1", "2"], is_loss=False)
    table.show(markdown=False)
    assert capsys.readouterr().out == "title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n"


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    results = {name: Result() for name in calls}
    bench.take_turns(calls, results, allowance=0.0)
    assert "".join(order) == "ab" * bench.FEWEST_RUNS
    bench.take_turns(calls, results, allowance=60.0)
    assert all(len(result.seconds) == bench.MOST_RUNS for result in results.values())


def test_slow_16_bit_runs_are_left_out():
    arguments = ("lenet5", torch.device("cpu"), bench.IN_INFERENCE["cpu"], ["fp32", "bf16"], [1, 4])
    arguments += (bench.Budget(0, 4), bench.Pace())
    fp32_1, fp32_4, bf16_1, bf16_4 = bench.infer(*arguments, longest=1e-9)
    for measured in (fp32_1, fp32_4):
        assert all(len(r.seconds) >= bench.FEWEST_RUNS for r in measured.results.values())
    for who in (CONTIGUOUS, CHANNELS_LAST):
        assert len(bf16_1.results[who].seconds) == 1
        assert not bf16_4.results[who].seconds
        assert bf16_4.results[who].note.startswith("left out: at least")
    for measured in (bf16_1, bf16_4):
        assert len(measured.results[SWAPPED].seconds) >= bench.FEWEST_RUNS
    bench.tables([bf16_1, bf16_4])


def test_networks_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    command = ["bench", "--networks", "torchvision:mobilenet_v2", "--train", "torchvision:resnet18"]
    assert main([*command, "--markdown"]) == 0
    assert capsys.readouterr().out.count("| skipped: import of torchvision halted") == 5

    assert main(["bench", "--networks", "resnet51"]) == 2
    assert "got network 'resnet51', needed one of lenet5" in capsys.readouterr().err


def test_lrn_in_16_bits_has_a_baseline():
    """aten has no such kernel on the CPU."""
    model = nn.Sequential(nn.LocalResponseNorm(5)).bfloat16()
    x = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="not implemented"):
        model(x)
    expected = nn.LocalResponseNorm(5)(x.float()).bfloat16()
    torch.testing.assert_close(bench.prepare(CONTIGUOUS, model)(x), expected, rtol=0, atol=0)


def test_environment():
    facts = report.environment()
    assert torch.__version__ in facts["versions"]
    assert facts["CPU"].endswith(f"{torch.get_num_threads()} threads")


def test_the_commit_without_git(monkeypatch):
    """Of a checkout without git beside it the environment says it."""
    monkeypatch.delenv("FASTCONV_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert report.environment()["commit"] == "unknown"
    monkeypatch.setenv("FASTCONV_COMMIT", "abc123")
    assert report.environment()["commit"] == "abc123"

"""The suite under benchmarks/ works: tiny layers, a handful of cases, in a process of their own."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastconv import ops

ROOT = Path(__file__).parents[2]


def run_benchmarks(*arguments, plugin_folder=None):
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    environ["OMP_NUM_THREADS"] = "1"  # not to wait for cores that are busy with something else
    if plugin_folder:
        environ["PYTHONPATH"] = str(plugin_folder)
    command = [sys.executable, "-m", "pytest", "benchmarks", "--tiny", "--benchmark-max-time=0.001"]
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True)


def test_the_suite_runs(tmp_path):
    file = tmp_path / "results.json"
    chosen = "fastconv or (lrn and forward)"
    rows = tmp_path / "rows.jsonl"
    process = run_benchmarks("--quick", "-k", chosen, f"--benchmark-json={file}", f"--rows={rows}")
    assert process.returncode == 0, process.stdout[-5000:]
    assert "slower than eager" in process.stdout

    document = json.loads(file.read_text())
    assert torch.__version__ in document["machine_info"]["versions"]
    found = [result["extra_info"] for result in document["benchmarks"]]
    for direction in ("forward", "backward"):
        assert {i["op"] for i in found if i["direction"] == direction} == set(ops.__all__)
    lrn = [i for i in found if i["op"] == "local_response_norm" and i["direction"] == "forward"]
    assert {(i["contender"], i["layout"]) for i in lrn} == {
        ("fastconv", "channels_last"),
        ("fastconv", "contiguous"),
        ("eager", "channels_last"),
        ("eager", "contiguous"),
        ("compile", "channels_last"),
    }
    (one,) = (i for i in lrn if (i["contender"], i["layout"]) == ("eager", "contiguous"))
    assert one["bytes"] == 2 * 4 * 96 * 12 * 12  # read once, written once, in float32
    assert one["flop"] == 0
    for info in found:
        assert info["gb_per_s"] > 0
        assert info["of_floor"] > 0
        assert info["host_us"] is None or info["host_us"] > 0

    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [line["case"].split(",")[0] for line in lines] == [r["fullname"] for r in document["benchmarks"]]
    assert all(line["outcome"] == "passed" and line["median_s"] >= line["min_s"] > 0 for line in lines)
    # What is there is not measured again, what failed is.
    rows.write_text("".join(json.dumps({**line, "outcome": "failed"}) + "\n" for line in lines[:1]))
    rows.open("a").writelines(json.dumps(line) + "\n" for line in lines[1:])
    process = run_benchmarks("--quick", "-k", chosen, f"--rows={rows}", "--collect-only", "-q")
    assert process.stdout.count("::") == 1
    assert lines[0]["case"].split(",")[0] in process.stdout


SABOTAGE = """
from fastconv import ops
right = ops.add_relu

def wrong(*args, backend, **options):
    output = right(*args, backend=backend, **options)
    return output if backend == "reference" else output + 1e-3

ops.add_relu = wrong
"""


def test_a_wrong_result_gets_no_time(tmp_path):
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    process = run_benchmarks(
        *("-p", "sabotage", "-k", "[add_relu and forward and layer4 and contiguous"),
        plugin_folder=tmp_path,
    )
    assert process.returncode == 1, process.stdout[-5000:]
    assert "fastconv-contiguous, resnet50/layer4.0, forward, output" in process.stdout
    assert "elements beyond the bound" in process.stdout
    assert "1 failed, 1 passed" in process.stdout
    (table,) = (line for line in process.stdout.splitlines() if "benchmark 'add_relu" in line)
    assert "1 tests" in table


# aten's own in place of cuDNN's, and no other contender.
CUDNN = """
import torch
import torch.nn.functional as F

def relu(input, weight, bias, *geometry):
    return F.relu(F.conv2d(input, weight, bias, *geometry))

def add_relu(input, weight, residual, alpha, bias, *geometry):
    return F.relu(F.conv2d(input, weight, bias, *geometry) + alpha * residual)

torch.cudnn_convolution_relu, torch.cudnn_convolution_add_relu = relu, add_relu

def pytest_configure():
    import harness

    def is_for(self, layer, direction, device):
        return self.who == "cudnn" and direction == "forward" and harness.cudnn.has(layer)

    harness.Contender.is_for = is_for
"""


@pytest.mark.slow
def test_cudnn_takes_part_where_it_can(tmp_path: Path) -> None:
    """Where it has a fused convolution the result is the op's: with groups, and paddings that differ, too."""
    (tmp_path / "stub.py").write_text(CUDNN)
    rows, chosen = tmp_path / "rows.jsonl", "layer1 or inception3a or alexnet2012 or 7x7_2"
    process = run_benchmarks(
        "-p", "stub", "-k", chosen, f"--rows={rows}", "--benchmark-disable", plugin_folder=tmp_path
    )
    assert process.returncode == 0, process.stdout[-5000:]
    found = Counter(json.loads(line)["op"] for line in rows.read_text().splitlines())
    assert found == {"conv2d_relu": 4, "conv2d_add_relu": 1, "pointwise_conv2d": 2, "pointwise_conv2d_group": 1}
    collected = run_benchmarks("--collect-only", "-q")
    assert collected.returncode == 0
    assert "cudnn" not in collected.stdout
    assert "eager" in collected.stdout

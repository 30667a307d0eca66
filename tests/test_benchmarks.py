"""The suites under benchmarks/ work: tiny layers, a handful of cases, in a process of their own."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

from fastconv import models, ops

ROOT = Path(__file__).parent.parent


def load(name):
    """A module of benchmarks, without putting that folder on sys.path."""
    spec = importlib.util.spec_from_file_location(f"_{name}", ROOT / "benchmarks" / f"{name}.py")
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


LAYERS = load("shapes").LAYERS


def run_benchmarks(*arguments, plugin_folder=None):
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    environ["OMP_NUM_THREADS"] = "1"  # not to wait for cores that are busy with something else
    if plugin_folder:
        environ["PYTHONPATH"] = str(plugin_folder)
    command = [sys.executable, "-m", "pytest", "benchmarks", "--tiny", "--benchmark-max-time=0.001"]
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True)


def test_every_op_has_a_suite():
    files = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert files == {f"bench_{op}" for op in ops.__all__}
    assert {layer.op for layer in LAYERS} == set(ops.__all__)
    for op in ops.__all__:
        assert f'suite("{op}")' in (ROOT / "benchmarks" / f"bench_{op}.py").read_text()


def test_layers_have_names_and_reasons():
    names = [(layer.op, layer.name) for layer in LAYERS]
    assert len(set(names)) == len(names)
    assert all(layer.why for layer in LAYERS)


def network(name):
    with torch.device("meta"):
        if name in models.names():
            return models.build(name).eval(), models.input_shape(name)
        torchvision = pytest.importorskip("torchvision")
        side = 299 if name == "inception_v3" else 224
        options = {"init_weights": False} if name == "inception_v3" else {}
        model = torchvision.models.get_model(name, weights=None, **options)
        return model.eval(), (1, 3, side, side)


@pytest.mark.parametrize("name", sorted({layer.name.split("/")[0] for layer in LAYERS}))
def test_layers_are_those_of_the_network(name):
    if name == "vgg_a_lrn":
        pytest.skip("neither fastconv nor torchvision has it; Simonyan and Zisserman, table 1")
    model, shape = network(name)
    calls = {}
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, path=path: calls.update({path: (module, inputs, output)})
        )
    model(torch.empty(shape, device="meta"))
    for layer in LAYERS:
        network_name, _, path = layer.name.removesuffix("+relu").partition("/")
        if network_name == name:
            check(layer, {p: call for p, call in calls.items() if f"{p}.".startswith(f"{path}.")})


def check(layer, calls):
    """That these modules, the named one and those within, do what the layer says."""
    input = layer.shapes["input"]
    if layer.op == "add_relu":
        ((_, _, output),) = (call for path, call in calls.items() if path == layer.name.split("/")[1])
        assert output.shape == input
        return
    if layer.op == "local_response_norm":
        ((module, (x,), _),) = calls.values()
        assert x.shape == input
        settings = {name: value for name, value in layer.options.items() if name != "activation"}
        assert settings == {name: getattr(module, name) for name in settings}
        return
    weights = [
        shape
        for name, value in layer.shapes.items()
        if "weight" in name
        for shape in (value if isinstance(value, list) else [value])
    ]
    convs = defaultdict(list)
    for module, (x,), _ in calls.values():
        if isinstance(module, nn.Conv2d):
            convs[tuple(module.weight.shape)].append((module, tuple(x.shape)))
    assert all(weight in convs for weight in weights)
    module = next(module for module, shape in convs[weights[0]] if shape == input)
    pairs = {"stride": 1, "padding": 0}
    for option, default in pairs.items():
        value = layer.options.get(option, default)
        assert getattr(module, option) == (value if isinstance(value, tuple) else (value, value))
    if layer.op in ("conv2d_relu", "conv2d_add_relu"):
        assert module.groups == layer.options.get("groups", 1)


def test_suites_run(tmp_path):
    file = tmp_path / "results.json"
    chosen = "fastconv or (lrn and forward)"
    process = run_benchmarks("--quick", "-k", chosen, f"--benchmark-json={file}")
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
        assert info["of_copy_bandwidth"] > 0
        assert info["host_us"] is None or info["host_us"] > 0


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
        *("-p", "sabotage", "-k", "bench_add_relu and forward and layer4 and contiguous"),
        plugin_folder=tmp_path,
    )
    assert process.returncode == 1, process.stdout[-5000:]
    assert "fastconv-contiguous, resnet50/layer4.0, forward, output" in process.stdout
    assert "elements beyond the bound" in process.stdout
    assert "1 failed, 1 passed" in process.stdout
    (table,) = (line for line in process.stdout.splitlines() if "benchmark 'add_relu" in line)
    assert "1 tests" in table


def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    """A dry run does what it can and shows the rest."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: make gpu-check")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu_check.py"),
        str(tmp_path),
        "--only",
        "info",
        "time-ops-cuda",
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: step["outcome"] for name, step in summary.items()} == {
        "info": "passed",
        "time-ops-cuda": "needs a GPU",
    }
    assert "backends" in (tmp_path / "info.txt").read_text()


ENDLESS = """
import subprocess, sys, time
child = subprocess.Popen(["sh", "-c", "trap '' INT; sleep 100"])
print(child.pid, flush=True)
try:
    time.sleep(100)
except KeyboardInterrupt:
    print("what was measured", flush=True)
    sys.exit(int(sys.argv[1]))
"""


def test_gpu_check_ends_what_takes_too_long(tmp_path: Path) -> None:
    """Side by side, also where interruptions are ignored; each may write what it has, and leaves no process behind."""
    gpu_check = load("gpu_check")
    commands = [[sys.executable, "-c", ENDLESS, code] for code in ("0", "3")] + [[sys.executable, "-c", "print(1)"]]
    stage = [gpu_check.Step(f"step {i}", command, limit=5) for i, command in enumerate(commands)]
    started = time.monotonic()
    ours = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = list(gpu_check.run(stage, tmp_path, has_gpu=True, deadline=started + 100))
    finally:
        signal.signal(signal.SIGINT, ours)
    results = {step.name: result for step, result in found}
    outcomes = {name: (result["outcome"], result["last line"]) for name, result in results.items()}
    assert outcomes == {
        "step 2": ("passed", "1"),
        "step 0": ("FAILED (more than 5 s)", "what was measured"),
        "step 1": ("FAILED (more than 5 s)", "what was measured"),
    }
    assert next(iter(results)) == "step 2"
    children = [(tmp_path / f"{name}.txt").read_text().split()[0] for name in ("step 0", "step 1")]
    while any(map(is_alive, children)) and time.monotonic() - started < 100:
        time.sleep(0.1)
    assert not any(map(is_alive, children))


def is_alive(process: str) -> bool:
    stat = Path("/proc") / process / "stat"
    return stat.exists() and ") Z " not in stat.read_text()  # a zombie waits for somebody to ask for its end

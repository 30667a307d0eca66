"""The suites under benchmarks/ work: tiny layers, a handful of cases, in a process of their own."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

from fastconv import models, ops

ROOT = Path(__file__).parents[2]


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
        *("-p", "sabotage", "-k", "bench_add_relu and forward and layer4 and contiguous"),
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


def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    """A dry run does what it can and shows the rest."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: make gpu-check")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu_check.py"),
        str(tmp_path),
        "--only",
        "machine",
        "ops-triton",
    ]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": ""})
    assert process.returncode == 0, process.stdout + process.stderr
    assert "with a GPU: " in process.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: step["outcome"] for name, step in summary.items()} == {"machine": "passed", "ops-triton": "passed"}
    # Few files, whatever the number of steps.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files.tar.gz", "summary.json"]
    with tarfile.open(tmp_path / "files.tar.gz") as archive:
        assert json.load(archive.extractfile("machine.txt"))["tools"]["git"] is None
        assert b"fastconv-channels_last" in archive.extractfile("ops-triton.txt").read()


def test_gpu_check_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step all is saved, for the next one may be the last; what needs too long is not begun."""
    gpu_check = load("gpu_check")
    saved = f"import json; print(sorted(json.load(open({str(tmp_path / 'summary.json')!r}))))"
    steps = [gpu_check.Step(str(i), [sys.executable, "-c", saved], 60, [sys.executable, "-c", saved]) for i in range(3)]
    steps[0].command = steps[0].dry = [sys.executable, "-c", "print('first')"]
    steps[0].unless = [sys.executable, "-c", "raise SystemExit(1)"]
    steps[2].unless = [sys.executable, "-c", ""]
    monkeypatch.setattr(gpu_check, "stages", lambda *_: [[step] for step in steps])
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path)])
    assert gpu_check.main() == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["last line"] for step in summary.values()] == ["first", "['0']", "there was nothing to do"]
    late = gpu_check.run(steps[:1], tmp_path, has_gpu=True, deadline=time.monotonic() + gpu_check.Run.GRACE)
    assert [result["outcome"] for _, result in late] == [gpu_check.NO_TIME]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path), "--minutes", "0.1"])
    assert gpu_check.main() == 1  # not a success: nothing was run


@pytest.mark.parametrize("part", ["all", "proofs", "timings"])
def test_parts_of_gpu_check(part: str, tmp_path: Path) -> None:
    gpu_check = load("gpu_check")
    stages = gpu_check.stages(part, "90a", tmp_path)
    steps = [step for stage in stages for step in stage]
    assert steps[0].name == "build"
    assert steps[0].environ["FASTCONV_CUDA_ARCHS"] == "90a"
    assert len({step.name for step in steps}) == len(steps)
    assert ("numerics-cuda" in {step.name for step in steps}) == (part != "timings")
    assert ("ops-cuda" in {step.name for step in steps}) == (part != "proofs")
    for stage in stages:
        measures = [step for step in stage if "rows.jsonl" in str(step.command) or "bench" in step.command]
        assert not measures or len(stage) == 1


@pytest.mark.slow
def test_steps_of_gpu_check_select_tests(tmp_path: Path) -> None:
    """No file and no name that a step chooses tests by is out of date."""
    for stage in load("gpu_check").stages("all", "90a", tmp_path):
        for step in stage:
            if "pytest" in step.command:
                assert step.dry[-1] == "--collect-only"
                process = subprocess.run(step.dry, cwd=ROOT, capture_output=True, text=True)
                assert process.returncode == 0, f"{step.name}: {process.stdout[-2000:]}"


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

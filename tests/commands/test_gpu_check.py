"""tools/gpu_check.py without a GPU: what it would run, and that it keeps what it has."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load(name):
    """A module of tools, without putting that folder on sys.path."""
    spec = importlib.util.spec_from_file_location(f"_{name}", ROOT / "tools" / f"{name}.py")
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    """A dry run does what it can and shows the rest."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: make gpu-check")
    command = [
        sys.executable,
        str(ROOT / "tools" / "gpu_check.py"),
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

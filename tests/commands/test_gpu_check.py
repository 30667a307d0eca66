"""tools/gpu_check.py without a GPU: what it would run, and, where a GPU is pretended, that it keeps what it has."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
sys.path.append(str(TOOLS))  # its modules import each other

import gpu_results  # noqa: E402
import gpu_runner  # noqa: E402
import gpu_steps  # noqa: E402

# gpu_check.py in a hurry, with steps from a file of JSON: [[[name, code, limit]]], and the name of a GPU, or null.
PRETEND = f"""
import json, sys
sys.path.insert(0, {str(TOOLS)!r})
import gpu_check, gpu_runner, gpu_steps
Run = gpu_runner.Run
Run.GRACE, Run.LAST_GRACE, Run.LEAST, gpu_check.SAVED_EVERY = 1.0, 1.0, 1.0, 0.2
plan = json.load(open(sys.argv.pop(1)))
gpu_check.find_gpu = lambda: plan["gpu"] and (plan["gpu"], "90a")

def stages(arch, files):
    def step(name, code, limit, tool=sys.executable, built=None):
        command = [tool, "-c", code, str(files)]
        return gpu_runner.Step(name, command, limit, command, unless=built and [tool, "-c", built])
    return [[step(*each) for each in stage] for stage in plan["stages"]]

gpu_check.gpu_steps.stages = stages
sys.exit(gpu_check.main())
"""


def start(folder: Path, gpu: str | None, stages: Any, *options: str) -> subprocess.Popen[str]:
    """The command, with its OUT below the folder."""
    (folder / "plan.json").write_text(json.dumps({"gpu": gpu, "stages": stages}))
    command = [sys.executable, "-c", PRETEND, str(folder / "plan.json"), str(folder / "out"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def summary_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out" / "summary.json").read_text()))


def outcomes(folder: Path) -> dict[str, str]:
    return {name: step["outcome"] for name, step in summary_of(folder)["steps"].items()}


def archived(folder: Path) -> dict[str, bytes]:
    with tarfile.open(folder / "out" / "files.tar.gz") as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


IMPORTS = "import json, os, signal, subprocess, sys, time; files = sys.argv[1]\n"
MACHINE = "print(json.dumps({'commit': 'abc123'}))"
GOLDENS = """
os.makedirs(f"{files}/goldens", exist_ok=True); os.makedirs(f"{files}/tuned", exist_ok=True)
open(f"{files}/goldens/some-gpu.json", "w").write("{}"); open(f"{files}/tuned/some-gpu.json", "w").write("[]")
print("no difference")
"""
ROW = """
row = {"case": "a layer", "outcome": "passed", "median_s": 2.0, "floor_s": 1.0, "of_floor": 0.5}
open(f"{files}/rows.jsonl", "a").write(json.dumps(row) + "\\n")
"""
# Results, then a hang; and of what it started one ignores interruptions, and another left the group.
HANG = (
    ROW
    + """
open(f"{files}/networks.json", "w").write(json.dumps({"rows": [
    {"network": "n", "results": {"eager": {"seconds": [1.0, 2.0, 3.0]}, "compile": {"seconds": [], "note": "?"}}}]}))
for session in (False, True):
    child = subprocess.Popen(["sh", "-c", "trap '' INT; sleep 100"], start_new_session=session)
    print("child", child.pid, flush=True)
try:
    time.sleep(100)
except KeyboardInterrupt:
    print("what was measured", flush=True)
"""
)
STUBBORN = "signal.signal(signal.SIGINT, signal.SIG_IGN); print('still here', flush=True); time.sleep(100)"
FLOOD = """
print("the beginning")
for i in range(100000):
    print("x" * 99)
print("the end")
"""
BAD = "print('FAILED test_some.py::test[1] - why'); print('1 failed in 2 s'); sys.exit(3)"


def steps(*named: tuple[Any, ...]) -> list[list[Any]]:
    return [[name, IMPORTS + code, *more] for name, code, *more in named]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int, int]:
    """A run in which everything goes wrong: its folder, what it printed, its status, how often all was saved."""
    folder = tmp_path_factory.mktemp("gpu-check")
    stages = [
        steps(("machine", MACHINE, 9), ("conformance", GOLDENS, 9)),
        steps(
            ("crash", "os.kill(os.getpid(), signal.SIGSEGV)", 9),
            ("bad", BAD, 9),
            ("flood", FLOOD, 9),
            ("hang", HANG, 1),
            ("stubborn", STUBBORN, 1),
            ("no tool", "", 9, "no-such-tool"),
            ("built", "", 9, sys.executable, "raise SystemExit(0)"),
            ("not built", "print('built')", 9, sys.executable, "raise SystemExit(1)"),
        ),
        steps(("big", "open(f'{files}/big.bin', 'wb').write(b'0' * 2**24)", 9)),
        steps(("slow", "print('began', flush=True); time.sleep(100)", 50)),
        steps(("never", "", 9)),
    ]
    started = time.monotonic()
    process = start(folder, "Some GPU", stages, "--minutes", "0.15")
    seen = set()
    while process.poll() is None:
        if (folder / "out" / "summary.json").exists():  # both are whole whenever somebody looks
            seen.add(str(outcomes(folder)))
            archived(folder)
        time.sleep(0.02)
    assert time.monotonic() - started < 9 + 10  # on a busy machine
    return folder, process.communicate()[0], process.returncode, len(seen)


def test_all_that_can_go_wrong(whole_run: tuple[Path, str, int, int]) -> None:
    folder, printed, status, saved = whole_run
    assert status == 1
    found = outcomes(folder)
    slow = found.pop("slow")
    assert re.fullmatch(r"FAILED \(more than \d s: no time for more\)", slow)
    assert found == {
        "machine": "passed",
        "conformance": "passed",
        "crash": "FAILED (SIGSEGV)",
        "bad": "FAILED (status 3)",
        "flood": "passed",
        "hang": "FAILED (more than 1 s)",
        "stubborn": "FAILED (more than 1 s)",
        "no tool": "FAILED (no-such-tool is not installed)",
        "built": "passed",
        "not built": "passed",
        "big": "passed",
        "never": gpu_runner.NO_TIME,
    }
    assert saved >= 4
    said = {name: step.get("last line") for name, step in summary_of(folder)["steps"].items()}
    assert said["hang"] == "what was measured"
    assert said["flood"] == "the end"
    assert said["built"] == "there was nothing to do"
    assert summary_of(folder)["steps"]["bad"]["failures"] == ["FAILED test_some.py::test[1] - why"]
    assert "left out for lack of time: never" in printed


def test_nothing_is_left_running(whole_run: tuple[Path, str, int, int]) -> None:
    """Neither what ignores interruptions nor what has a session of its own."""
    children = re.findall(r"child (\d+)", archived(whole_run[0])["hang.txt"].decode())
    assert len(children) == 2
    assert not any(map(is_alive, children))


def is_alive(process: str) -> bool:
    try:
        return ") Z " not in (Path("/proc") / process / "stat").read_text()  # a zombie waits to be asked for its end
    except OSError:
        return False


def test_what_comes_back_is_small_and_readable(whole_run: tuple[Path, str, int, int]) -> None:
    folder, printed, _, _ = whole_run
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["files.tar.gz", "summary.json", "table.txt"]
    files = archived(folder)
    assert sum(map(len, files.values())) <= 16 * 2**20
    assert "big.bin" not in files
    assert files["left-out.txt"] == b"big.bin: 16777216 bytes\n"
    flood = files["flood.txt"].decode()
    assert len(flood) < 1e6
    assert flood.startswith("the beginning\n")
    assert flood.endswith("xxx\nthe end\n")
    assert "some of it was left out" in flood
    assert json.loads(files["rows.jsonl"])["of_floor"] == 0.5
    table = (folder / "out" / "table.txt").read_text()
    assert table in printed
    for line in (r"bad +FAILED \(status 3\) +\d\.\d  1 failed in 2 s", r" +FAILED test_some.py::test\[1\] - why"):
        assert re.search(f"^{line}$", table, re.MULTILINE)
    assert table.splitlines()[-3:] == [
        "  emulator/goldens/some-gpu.json",
        "  fastconv/tuned/some-gpu.json",
        "  benchmarks/results/Some-GPU_abc123.jsonl",
    ]


def test_results_are_put_in_their_places(whole_run: tuple[Path, str, int, int], tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "gpu_results.py"), str(whole_run[0] / "out"), "--into", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.json*")}
    head, layer, network = map(json.loads, found.pop("benchmarks/results/Some-GPU_abc123.jsonl").splitlines())
    assert found == {"emulator/goldens/some-gpu.json": "{}", "fastconv/tuned/some-gpu.json": "[]"}
    assert head["gpu"] == "Some GPU"
    assert head["machine"] == {"commit": "abc123"}
    assert (layer["floor_s"], layer["of_floor"]) == (1.0, 0.5)
    eager = network["results"]["eager"]
    assert (eager["p20_s"], eager["median_s"], eager["p80_s"], eager["runs"]) == (1.4, 2.0, 2.6, 3)
    assert network["results"]["compile"] == {"note": "?"}
    assert "3 files of Some GPU" in process.stdout


def test_a_commit_that_is_not_known_there(tmp_path: Path) -> None:
    """It is that of this checkout, where the sources are the same; else they are named."""
    (tmp_path / "rows.jsonl").write_text('{"case": "a", "outcome": "passed"}\n{"case": "b", "outc')
    (tmp_path / "machine.txt").write_text(json.dumps({"commit": "unknown"}))
    other = {"gpu": "GPU", "sources": "0123456789ab"}
    assert list(gpu_results.to_commit(tmp_path, other)) == ["benchmarks/results/GPU_sources-0123456789ab.jsonl"]
    (name,) = gpu_results.to_commit(tmp_path, {"gpu": "GPU", "sources": gpu_results.sources_digest()})
    assert (ROOT / ".git").exists() == ("sources" not in name)


def test_an_interruption_and_what_goes_on_from_there(tmp_path: Path) -> None:
    """Ctrl-C keeps what there is; what passed is not run again, what was cut off is, and what failed comes last."""
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for folder in (first, second, other):
        folder.mkdir()
    ran = f"open({str(tmp_path / 'ran')!r}, 'a').write(sys.argv[2] if len(sys.argv) > 2 else '.')\n"
    resumed = ROW.replace("a layer", "another layer")
    stages = [
        steps(("build", "print('built')", 9, sys.executable, "raise SystemExit(1)"), ("good", ran, 9)),
        steps(("bad", BAD, 9)),
        steps(("measure", HANG, 60)),
        steps(("last", "print('at last')", 9)),
    ]
    process = start(first, "Some GPU", stages)
    until = time.monotonic() + 30
    while not (first / "out" / "files.tar.gz").exists() or "rows.jsonl" not in archived(first):
        assert time.monotonic() < until
        time.sleep(0.05)  # it is there while the step runs
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert outcomes(first) == {
        "build": "passed",
        "good": "passed",
        "bad": "FAILED (status 3)",
        "measure": "interrupted",
        "last": "interrupted",
    }
    assert b"what was measured" in archived(first)["measure.txt"]
    assert "Traceback" not in printed

    stages[2] = steps(("measure", resumed + "print('measured')", 60))
    printed, _ = start(second, "Some GPU", stages, "--resume", str(first / "out")).communicate(timeout=30)
    order = re.findall(r"^(build|good|measure|last|bad) .*\d\.\d  ", printed.partition("\n\n")[0], re.MULTILINE)
    assert order == ["build", "measure", "last", "bad"]  # what has to be on each machine is seen to
    assert (tmp_path / "ran").read_text() == "."
    assert outcomes(second) == {**outcomes(first), "measure": "passed", "last": "passed"}
    rows = [json.loads(line)["case"] for line in archived(second)["rows.jsonl"].splitlines()]
    assert rows == ["a layer", "another layer"]
    assert archived(second)["good.txt"] == archived(first)["good.txt"]

    printed, _ = start(other, "Another GPU", stages[:1], "--resume", str(first / "out")).communicate(timeout=30)
    assert "not resumed" in printed
    assert (tmp_path / "ran").read_text() == ".."
    assert outcomes(other) == {"build": "passed", "good": "passed"}


def test_what_cannot_be_resumed_or_collected(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "gpu_results.py"), str(tmp_path / "out")]
    printed, _ = start(tmp_path, None, [steps(("dry", "print('dry')", 9))], "--resume", str(tmp_path)).communicate()
    assert f"not resumed: {tmp_path} needs summary.json" in printed
    assert outcomes(tmp_path) == {"dry": "passed"}
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert "a dry run" in process.stderr
    (tmp_path / "out" / "summary.json").write_text("{")
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert "needs summary.json and files.tar.gz of make gpu-check" in process.stderr


def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    """A dry run does what it can and shows the rest."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: make gpu-check")
    command = [sys.executable, str(TOOLS / "gpu_check.py"), str(tmp_path / "out"), "--only", "machine", "layers-triton"]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": ""})
    assert process.returncode == 0, process.stdout + process.stderr
    assert "with a GPU: " in process.stdout
    assert outcomes(tmp_path) == {"machine": "passed", "layers-triton": "passed"}
    files = archived(tmp_path)
    assert json.loads(files["machine.txt"])["tools"]["git"] is None
    assert b"fastconv-channels_last" in files["layers-triton.txt"]


def test_the_steps(tmp_path: Path) -> None:
    stages = gpu_steps.stages("90a", tmp_path)
    every = [step for stage in stages for step in stage]
    build = every[0]
    assert build.name == "build"
    assert build.environ["FASTCONV_CUDA_ARCHS"] == "90a"
    assert len({step.name for step in every}) == len(every)
    for stage in stages:
        times = [step for step in stage if {"rows.jsonl", "bench", "qualify", "ncu"} & names_in(step)]
        assert not times or len(stage) == 1
    exports = {step.command[step.command.index("--export") + 1] for step in every if "--export" in step.command}
    assert exports == {f"{tmp_path / 'tuned'}{os.sep}"}
    for step in every:
        assert step.dry, step.name


def names_in(step: gpu_runner.Step) -> set[str]:
    return {Path(word).name for word in step.command}


@pytest.mark.slow
def test_steps_select_tests(tmp_path: Path) -> None:
    """No file and no name that a step chooses tests by is out of date. In one process, which imports them once."""
    steps = [step for stage in gpu_steps.stages("90a", tmp_path) for step in stage if "pytest" in step.command]
    arguments = {step.name: step.dry[step.dry.index("pytest") + 1 :] for step in steps}
    assert all(words[-1] == "--collect-only" for words in arguments.values())
    script = f"import pytest; print({{name: int(pytest.main(words)) for name, words in {arguments!r}.items()}})"
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert ast.literal_eval(process.stdout.splitlines()[-1]) == dict.fromkeys(arguments, 0), process.stdout[-9000:]


def test_the_calls_that_are_profiled() -> None:
    """Each is one call of an op, and runs; a profiler sees what happens between two marks."""
    spec = importlib.util.spec_from_file_location("gpu_calls", TOOLS / "gpu_calls.py")
    gpu_calls = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_calls)
    found = gpu_calls.calls("reference", torch.device("cpu"), 1)
    assert len(found) == 6
    for call in found.values():
        assert all(isinstance(tensor, torch.Tensor) for tensor in call())

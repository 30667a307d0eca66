"""tools/swap_sweep.py: it finds what may be wrong with a swapped model, and nothing in a few small ones."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import fastconv

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))  # its modules import each other

import swap_checks  # noqa: E402
import zoo  # noqa: E402


def needs(name):
    module = name.partition(":")[0]
    if module != "synthetic" and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install fastconv[zoo]")


@pytest.fixture(autouse=True)
def one_thread():
    """As in the sweep: small models are slow with more where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SMALL = [
    "synthetic:returns-typed-namedtuple",
    "synthetic:by-mode",
    "synthetic:buffer",
    "synthetic:overwrites-its-input",
    "timm:test_byobnet",
    "timm:test_convnext",
    "timm:test_efficientnet",
    "timm:test_resnet",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_found(name):
    needs(name)
    record = swap_checks.examine(name)
    assert record["status"] == "ok", record
    assert not record["skipped"]
    assert record["layers"][0] > 0
    assert record["convolutions"]
    assert record["swapped_ms"] > 0


class Broken(nn.Module):
    """A swapped model, with a fault in what it does; its parts keep the names of the model's."""

    def __new__(cls, fast, forward):
        plain = type(fast)
        fast.__class__ = type("Broken", (plain,), {"forward": lambda self, x: forward(self, plain.forward, x)})
        return fast


def _raises(self, plain, x):
    raise ValueError("broken")


def _stale(self, plain, x):
    if not hasattr(self, "first"):
        object.__setattr__(self, "first", copy.deepcopy(self.body))
    live, self._modules["body"] = self._modules["body"], self.first
    try:
        return plain(self, x)
    finally:
        self._modules["body"] = live


def _overwrites(self, plain, x):
    with torch.no_grad():
        self.head.bias.add_(1e-3)
    return plain(self, x)


def _in_training(change):
    return lambda self, plain, x: change(plain(self, x)) if self.training else plain(self, x)


# The model, what the swapped one does, the check that has to notice.
FAULTS = {
    "raises": ("returns-list", _raises, "outputs"),
    "values": ("by-shape", lambda self, plain, x: plain(self, x) * (1 + 1e-5), "outputs"),
    "container": ("returns-list", lambda self, plain, x: tuple(plain(self, x)), "outputs"),
    "order": ("returns-dict", lambda self, plain, x: dict(reversed(plain(self, x).items())), "outputs"),
    "ordered": ("returns-dict", lambda self, plain, x: OrderedDict(plain(self, x)), "outputs"),
    "dtype": ("by-shape", lambda self, plain, x: plain(self, x).double(), "outputs"),
    "strides": ("by-shape", lambda self, plain, x: plain(self, x).t().contiguous().t(), "outputs"),
    "alias": ("returns-twice-the-same", lambda self, plain, x: [t.clone() for t in plain(self, x)], "outputs"),
    "argument": ("by-shape", lambda self, plain, x: plain(self, x.mul_(1)) + 0 * x.zero_()[0, 0, 0, 0], "outputs"),
    "NaN": ("by-shape", lambda self, plain, x: plain(self, x).nan_to_num(), "NaN"),
    "attribute": ("by-shape", lambda self, plain, x: (setattr(self, "calls", 7), plain(self, x))[1], "effects"),
    "weights": ("by-shape", _overwrites, "model after a run of the copy"),
    "stale": ("by-shape", _stale, "new weights and attributes"),
    "gradient": ("by-shape", _in_training(lambda y: y.detach() * 0.5 + y * 0.5), "step in training"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, monkeypatch):
    key, forward, check = FAULTS[fault]
    swap = fastconv.swap
    monkeypatch.setattr(fastconv, "swap", lambda model: Broken(swap(model), forward))
    record = swap_checks.examine(f"synthetic:{key}", quick=True)
    assert any(check in checks.split(", ") for checks, _ in record["findings"]), record


def test_faults_of_the_copy_are_found(monkeypatch):
    swap = fastconv.swap

    def broken(model):
        model.note.seen.append("swap was here")
        fast = swap(model)
        fast.kept.append(torch.fx.Proxy(torch.fx.Graph().placeholder("x")))
        fast.head = copy.deepcopy(fast.head)
        fast._modules = dict(reversed(fast._modules.items()))
        return fast

    monkeypatch.setattr(fastconv, "swap", broken)
    texts = {text for _, text in swap_checks.examine("synthetic:by-shape", quick=True)["findings"]}
    for text in (
        ".note has changed",
        "1 attributes hold torch.fx proxies: .kept",
        "other keys: in another order",
        "other named_modules",
    ):
        assert text in texts, texts


# ---------------------------------------------------------------------------------------------------- command


def run(*command, **environ):
    environ = {**os.environ, "PYTHONPATH": str(TOOLS.parent), **environ}
    return subprocess.run([sys.executable, *map(str, command)], env=environ, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_resumes(tmp_path):
    """What was found is kept; the line that was being written is not."""
    name = "synthetic:returns-list"
    found = {"name": "synthetic:by-mode", "status": "crash", "findings": [["swap", "crash: SIGSEGV"]], "seconds": 1}
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(found)}\n" + '{"name": "synth')
    process = run(TOOLS / "swap_sweep.py", tmp_path, "--resume", "--quick", "--only", name, "*:by-mode")
    assert process.returncode == 1, process.stderr
    assert "[1/1] synthetic:returns-list: ok, 3 of 3" in process.stdout
    assert "2 models: 1 ok, 1 crash" in process.stdout
    assert "1  swap: crash: SIGSEGV  (synthetic:by-mode)" in process.stdout
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == ["synthetic:by-mode", name]
    assert f"| {name} |" in (tmp_path / "table.md").read_text()
    assert run(TOOLS / "swap_sweep.py", tmp_path, "--resume", "--only", name).returncode == 0


STAND_IN = """
import os, time
import torch
from torch import nn

class Net(nn.Conv2d):
    def __init__(self, name):
        super().__init__(3, 4, 3)
        self.name, self.pretrained_cfg, self.parent = name, {}, os.getpid()

    def forward(self, x):
        if isinstance(x, torch.fx.Proxy) or type(self) is not Net:
            os.abort() if self.name == "crashes" else time.sleep(600)
        return super().forward(x)

def create_model(name, pretrained):
    if name == "unknown":
        raise ValueError("no such model")
    return Net(name)
"""


@pytest.mark.slow
def test_a_crash_and_a_hang_are_findings(tmp_path):
    (tmp_path / "timm.py").write_text(STAND_IN)
    code = "import json, swap_sweep; print(json.dumps(list(swap_sweep.sweep(NAMES, 2, 20, True))))"
    code = code.replace("NAMES", repr([f"timm:{name}" for name in ("crashes", "unknown", "hangs")]))
    process = run("-c", code, PYTHONPATH=os.pathsep.join(map(str, (tmp_path, TOOLS, TOOLS.parent))))
    assert process.returncode == 0, process.stderr
    records = {record["name"]: record for record in json.loads(process.stdout.splitlines()[-1])}
    # swap itself refuses both before they happen
    runs = "model after a run of the copy"
    ((stage, text),) = records["timm:crashes"]["findings"]
    assert (records["timm:crashes"]["status"], stage) == ("crash", runs)
    assert text.startswith("crash: SIGABRT in ")
    assert "timm.py:13 forward" in text
    assert records["timm:hangs"]["findings"] == [[runs, "hang: still running after 20 s"]]
    assert records["timm:unknown"]["status"] == "unusable"
    assert "no such model" in records["timm:unknown"]["why"]


def test_the_list():
    names = zoo.names()
    assert len(set(names)) == len(names) > 200
    for module in ("timm", "torchvision"):
        listed = {name.partition(":")[2] for name in names if name.startswith(f"{module}:")}
        assert len(listed) > 35
        if importlib.util.find_spec(module) is not None:
            available = importlib.import_module(f"{module}.models").list_models()
            assert listed <= set(available)

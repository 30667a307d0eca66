"""``python -m fastconv demo`` runs, draws, and fails when results differ from torch's."""

import sys

import pytest
import torch
from torch import nn

import fastconv
from fastconv.__main__ import main
from fastconv.commands import demo


@pytest.fixture
def extra():
    """What `pip install fastconv[demo]` brings."""
    for package in ("matplotlib", "PIL", "rich", "sklearn"):
        pytest.importorskip(package)


@pytest.fixture
def quick(extra, monkeypatch):
    monkeypatch.setattr(demo, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(demo, "train_lenet", lambda *_: demo.Training([2.0, 0.1], 0.99))


def test_demo_agrees_learns_and_draws(extra, tmp_path, capsys, monkeypatch):
    import matplotlib.image

    monkeypatch.setattr(demo, "TIMING_SECONDS", 0.0)
    picture = tmp_path / "new.png"
    status = main(["demo", "--networks", "googlenet", "--output", str(picture)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "GoogLeNet" in printed
    assert printed.count("test accuracy 9") == 2
    assert f"torch {torch.__version__}" in printed
    assert f"picture: {picture}" in printed
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width > height > 1000


class Wrong(nn.Module):
    """The right scores, but for one."""

    def __init__(self, model: nn.Module, error: float) -> None:
        super().__init__()
        self.model, self.error = model, error

    def forward(self, x):
        scores = self.model(x)
        scores[1, 7] += self.error
        return scores


@pytest.mark.parametrize("error", [1e-3, 1e3], ids=["beyond policy", "other classes"])
def test_wrong_scores_fail(error, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fastconv, "swap", lambda model: Wrong(model, error))
    output = ["--output", str(tmp_path / "demo.png")]
    assert main(["demo", "--networks", "alexnet2012", *output]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "FAILED AlexNet 2012: all: max error" in printed
    other_classes = "FAILED AlexNet 2012: the five highest scores are of other classes"
    assert (other_classes in printed) == (error > 1)


def test_a_network_that_does_not_learn_fails():
    good, bad = demo.Training([0.1], 0.975), demo.Training([2.3], 0.965)
    assert demo.problems([], {"torch.nn": good, "fastconv": good}) == []
    (problem,) = demo.problems([], {"torch.nn": good, "fastconv": bad})
    assert problem == "LeNet-5 with fastconv: test accuracy 96.5%, at least 97% was expected"


def test_both_trainings_see_the_same(extra, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 1)
    steps = []
    first = demo.train_lenet(None, 3, steps.append)
    second = demo.train_lenet(lambda model: model, 3, steps.append)
    other = demo.train_lenet(None, 4, steps.append)
    assert first.losses == second.losses != other.losses
    assert steps == ["epoch 1"] * 3


@pytest.mark.parametrize("package", ["matplotlib", "PIL", "rich.console", "sklearn"])
def test_missing_extra_is_named(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo"]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("The demo needs ")
    assert printed.endswith('pip install "fastconv[demo]"\n')

"""``python -m fastconv explain``: networks of every package, on images of the size that they take."""

import pytest
import torch

from fastconv.__main__ import main
from fastconv.commands import explain


@pytest.fixture
def explained(monkeypatch):
    """What was to be explained: the model, and the shape of its input."""
    found = []
    monkeypatch.setattr(explain, "explain", lambda model, inputs: found.append((model, tuple(inputs.shape))))
    return found


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        (["lenet5"], (1, 1, 32, 32)),
        (["fastconv:alexnet2012", "--batch", "2"], (2, 3, 227, 227)),
        (["torchvision:mobilenet_v2", "--size", "64"], (1, 3, 64, 64)),
        (["timm:mobilenetv3_small_050"], (1, 3, 224, 224)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_images(arguments, shape, explained):
    package = arguments[0].partition(":")[0]
    if package in ("torchvision", "timm"):
        pytest.importorskip(package)
    assert main(["explain", *arguments]) == 0
    ((model, found),) = explained
    assert found == shape
    assert not model.training


def test_an_explanation(capsys):
    torch.manual_seed(0)
    assert main(["explain", "lenet5"]) == 0
    assert "features.0" in capsys.readouterr().out


def test_an_unknown_network(capsys):
    assert main(["explain", "resnet51"]) == 2
    assert "fastconv explain: got network 'resnet51', needed one of lenet5" in capsys.readouterr().err

"""Networks by name: whose they are, the images they take, and one error for what there is not."""

import re
import sys

import pytest
import torch

from fastconv import models
from fastconv.__main__ import main
from fastconv.measure import networks


def built(name):
    """Without memory; skips where the package is not installed."""
    try:
        with torch.device("meta"):
            return networks.build(name)
    except ImportError as problem:
        pytest.skip(str(problem))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet5", (1, 32, 32)),
        ("fastconv:xception", (3, 299, 299)),
        ("torchvision:resnet18", (3, 224, 224)),
        ("torchvision:inception_v3", (3, 299, 299)),
        ("torchvision:efficientnet_b3", (3, 300, 300)),
        ("torchvision:vit_h_14", (3, 224, 224)),  # its first weights are those of a variant for 518
        ("torchvision:lraspp_mobilenet_v3_large", (3, 520, 520)),
        ("torchvision:ssdlite320_mobilenet_v3_large", (3, 224, 224)),  # a detector resizes
        ("timm:mobilenetv3_small_100", (3, 224, 224)),
        ("timm:xception41", (3, 299, 299)),
        ("timm:efficientnet_b3.ra2_in1k", (3, 288, 288)),
    ],
)
def test_images_that_a_network_was_made_for(name, shape, monkeypatch):
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_, **__: pytest.fail("a download"))
    model, found = built(name)
    assert found == shape
    assert model.training


def test_ours_with_and_without_their_package():
    plain, named = networks.build("lenet5")[0], networks.build("fastconv:lenet5")[0]
    other = networks.build("lenet5", seed=1)[0]
    assert all(map(torch.equal, plain.parameters(), named.parameters()))
    assert not torch.equal(next(plain.parameters()), next(other.parameters()))
    assert networks.title("fastconv:resnet50") == models.title("resnet50") == "ResNet-50"
    assert networks.title("timm:resnet50") == "resnet50"


@pytest.mark.parametrize("name", ["resnet51", "fastconv:resnet51", "keras:resnet50", "hf-hub:timm/resnet50", ""])
def test_names_that_no_package_has(name):
    with pytest.raises(ValueError, match=f"^got network {re.escape(repr(name))}, needed one of lenet5, .*timm:NAME$"):
        networks.check(name)
    with pytest.raises(ValueError, match="got network"):
        networks.build(name)


@pytest.mark.parametrize(
    ("package", "name"), [("torchvision", "resnet51"), ("timm", "resnet51"), ("timm", "hf-hub:x/y")]
)
def test_names_that_their_package_does_not_have(package, name):
    pytest.importorskip(package)
    networks.check(f"{package}:{name}")  # imports nothing, hence does not know
    with pytest.raises(ValueError, match=f"^{package} has no network '{name}'; it has .* and others$"):
        networks.build(f"{package}:{name}")


@pytest.mark.parametrize("name", ["r3d_18", "raft_small"])
def test_networks_that_take_no_images(name):
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=f"'torchvision:{name}' takes no images"):
        networks.build(f"torchvision:{name}")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_package_that_is_not_installed(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package} cannot be imported .*; pip install "fastconv\[zoo\]"'):
        networks.build(f"{package}:resnet18")
    assert main(["explain", f"{package}:resnet18"]) == 2
    assert capsys.readouterr().err.startswith(f"fastconv explain: {package} cannot be imported")

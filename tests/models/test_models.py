"""The reference networks are the papers' networks, and pleasant to trace, train and compare."""

import pytest
import torch
from torch import nn

from fastconv import models
from fastconv.models.googlenet import Inception
from fastconv.models.resnet import BasicBlock, Bottleneck
from fastconv.models.xception import DownBlock, MiddleBlock

# LeNet-5 by hand: 6*(25+1) + 16*(6*25+1) + 120*(400+1) + 84*(120+1) + 10*(84+1).
# AlexNet: 34,944 + 307,456 + 885,120 + 663,936 + 442,624 in the convolutions (half as many inputs
# in layers 2, 4, 5), 37,752,832 + 16,781,312 + 4,097,000 behind them.
# GoogLeNet without its auxiliary classifiers, as counted in the authors' Caffe model.
# VGG-16 and the ResNets as in torchvision, Xception as in table 3 of its paper.
PARAMETERS = {
    "lenet5": 61_706,
    "alexnet2012": 60_965_224,
    "vgg16": 138_357_544,
    "googlenet": 6_998_552,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "xception": 22_855_952,
}

# Networks that end in global pooling take less than the paper's image size, and less of our time.
SMALL = {"resnet18": 33, "resnet50": 33, "xception": 71}


@pytest.fixture(scope="module", params=models.names())
def name(request):
    return request.param


def build(name: str, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, num_classes=num_classes)


@pytest.fixture(scope="module")
def network(name) -> nn.Module:
    """Built once and shared: a test sets the mode it needs and leaves the parameters alone."""
    return build(name)


def images(name: str, batch: int) -> torch.Tensor:
    _, channels, size, _ = models.input_shape(name)
    size = SMALL.get(name, size)
    return torch.randn(batch, channels, size, size)


def test_every_network_is_listed():
    assert set(models.names()) == set(PARAMETERS)


def test_names_are_in_the_order_of_the_papers():
    assert list(models.names()) == list(PARAMETERS)


def test_unknown_name():
    with pytest.raises(ValueError, match="no network 'alexnet'; choose one of lenet5, alexnet2012"):
        models.build("alexnet")


def test_parameter_count(name):
    with torch.device("meta"):
        model = models.build(name)
    counts = {key: p.numel() for key, p in model.named_parameters() if not key.startswith("aux")}
    assert sum(counts.values()) == PARAMETERS[name]


def test_auxiliary_parameter_count():
    with torch.device("meta"):
        model = models.googlenet()
    for aux, channels in ((model.aux1, 512), (model.aux2, 528)):
        by_hand = (channels + 1) * 128 + (128 * 4 * 4 + 1) * 1024 + (1024 + 1) * 1000
        assert sum(p.numel() for p in aux.parameters()) == by_hand


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("lenet5", {"features.2": (6, 14, 14), "features.5": (16, 5, 5)}),
        ("alexnet2012", {"features.0": (96, 55, 55), "features.14": (256, 6, 6)}),
        ("vgg16", {"features.16": (256, 28, 28), "features.30": (512, 7, 7)}),
        (
            "googlenet",
            {"stem": (192, 28, 28), "inception4a": (512, 14, 14), "inception5b": (1024, 7, 7)},
        ),
        ("resnet18", {"maxpool": (64, 56, 56), "layer4": (512, 7, 7)}),
        ("resnet50", {"layer1": (256, 56, 56), "layer4": (2048, 7, 7)}),
        ("xception", {"entry": (728, 19, 19), "middle": (728, 19, 19), "exit.3": (2048, 10, 10)}),
    ],
)
def test_map_sizes_of_the_paper(name, shapes):
    with torch.device("meta"):
        model, x = models.build(name).eval(), torch.empty(models.input_shape(name, batch=2))
    seen = {}
    for key in shapes:
        hook = lambda module, args, output, key=key: seen.update({key: tuple(output.shape[1:])})  # noqa: E731
        model.get_submodule(key).register_forward_hook(hook)
    assert model(x).shape == (2, 10 if name == "lenet5" else 1000)
    assert seen == shapes


def test_lenet_takes_mnist_and_colour():
    assert models.lenet5(image_size=28)(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert models.lenet5(num_classes=7, in_channels=3)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="image_size is 64, it must be 28 or 32"):
        models.lenet5(image_size=64)


@pytest.mark.parametrize(
    "block",
    [
        BasicBlock(4, 4, stride=1),
        Bottleneck(16, 4, stride=1),
        DownBlock(4, 6, 8),
        MiddleBlock(4),
        Inception(4, 1, 2, 3, 4, 5, 6),
    ],
    ids=lambda block: type(block).__name__,
)
def test_blocks_leave_their_input_alone(block):
    """An in-place ReLU too many would change what the shortcut reads."""
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(2, channels, 7, 7)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_fx_traces(name, network, train):
    model = network.train(train)
    traced = torch.fx.symbolic_trace(model)
    x = images(name, batch=2)
    torch.manual_seed(1)  # the dropout masks
    expected = model(x)
    torch.manual_seed(1)
    output = traced(x)
    assert isinstance(output, models.GoogLeNetOutput) == (train and name == "googlenet")
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_gradients_reach_every_parameter(name, network):
    output = network.train()(images(name, batch=2))
    outputs = output if isinstance(output, models.GoogLeNetOutput) else (output,)
    sum(nn.functional.cross_entropy(y, torch.tensor([1, 2])) for y in outputs).backward()
    dead = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    network.zero_grad()
    assert dead == []


def test_initialisation_is_reproducible(name, network):
    again = build(name)
    assert all(map(torch.equal, network.parameters(), again.parameters()))


@torch.no_grad()
def test_random_weights_give_distinct_finite_scores(name, network):
    """Deep random networks easily collapse to ties or overflow; comparisons need neither."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # keep the statistics of this very batch
    x = images(name, batch=4)
    network.train()(x)
    logits = network.eval()(x)
    assert 0.1 < logits.std() < 100
    top = logits.topk(6).values
    # Float32's own error in these logits is near 1e-6 of their spread.
    assert (top[:, :-1] - top[:, 1:]).min() > 1e-4 * logits.std()
    # Images of white noise look alike to a deep network, but not the same.
    assert (logits[1:] - logits[0]).abs().amax(1).min() > 0.01 * logits.std()


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet50"])
@torch.no_grad()
def test_torchvision_weights_load(name):
    try:
        import torchvision
    except (ImportError, RuntimeError) as problem:  # RuntimeError: built for another torch
        pytest.skip(f"torchvision cannot be imported: {problem}")
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
    ours = models.build(name, num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(models.input_shape(name))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)

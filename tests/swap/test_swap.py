"""fastconv.swap: the model is left alone, and whole networks give the same outputs, gradients and statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv import models
from fastconv.swapping import swap
from fastconv.swapping.explanation import explain
from support.swap_models import (
    Block,
    agree,
    image,
    seeded,
    small_net,
)

# ------------------------------------------------------------------------------------- the model is left alone


def test_the_model_is_left_as_it_was():
    model = small_net()
    model[2].relu.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    contents = {name: (type(m), dict(vars(m)), dict(m._modules)) for name, m in model.named_modules()}
    fast = swap(model)
    fast(image())
    fast.train()
    fast(image()).sum().backward()
    for name, module in model.named_modules():
        cls, attributes, children = contents[name]
        assert type(module) is cls
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is attributes[key] for key in attributes)
        assert all(module._modules[key] is children[key] for key in children)
        assert not module.training
    # Training is meant to move the statistics, and nothing else.
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or "running" in name or "tracked" in name, name


def test_the_copy_looks_like_the_model():
    model = small_net()
    fast = swap(model)
    assert isinstance(fast, nn.Sequential)
    assert isinstance(fast[2], Block)
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]
    ours, theirs = dict(fast.named_parameters()), dict(model.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in theirs)
    assert all(a is b for a, b in zip(fast.buffers(), model.buffers(), strict=True))
    assert {k: v.shape for k, v in fast.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    other = seeded(small_net(), seed=5)
    fast.load_state_dict(other.state_dict(), strict=True)
    agree(fast, other, image())
    model.load_state_dict(swap(small_net()).state_dict(), strict=True)
    agree(fast, small_net(), image())


def test_attributes_that_refer_to_modules_refer_to_the_copies():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.stages = [self.conv, nn.ReLU()]
            self.by_name = {"conv": self.conv}
            self.call = self.run

        def run(self, x: Tensor) -> Tensor:
            return self.stages[1](self.by_name["conv"](x))

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    model = Net().eval()
    fast = swap(model)
    assert fast.stages[0] is fast.conv is not model.conv
    assert fast.by_name["conv"] is fast.conv
    assert fast.call.__self__ is fast
    agree(fast, model, image())


# ---------------------------------------------------------------------------------------------------- networks


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return seeded(models.build(name, num_classes=10))


SIZES = {"lenet5": 32, "alexnet2012": 227, "vgg16": 224, "googlenet": 224}


def example(name: str, size: int) -> Tensor:
    size = SIZES.get(name, size)
    return torch.randn(1 if size > 200 else 2, models.input_shape(name)[1], size, size)


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", models.names())
def test_networks_in_evaluation(name):
    model = network(name).eval()
    fast = swap(model)
    assert not explain(fast).untraced
    with torch.no_grad():
        for x in (example(name, 64), example(name, 64).contiguous(memory_format=torch.channels_last)):
            expected = model(x)
            for _ in range(2):
                assert distance(fast(x), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_networks_keep_to_the_policy(name):
    """Of eager in channels_last, as swapped networks compute.

    With AVX-512 oneDNN's kernels for contiguous images err a third as much in VGG-16.
    """
    model = network(name).eval()
    agree(swap(model), model, example(name, 96), baseline=copy.deepcopy(model).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", ["lenet5", "resnet18", "xception"])
def test_networks_in_training(name):
    model = network(name).train()
    x, target = example(name, 40), torch.tensor([1, 2])
    results = []
    for net in (copy.deepcopy(model), swap(copy.deepcopy(model))):
        F.cross_entropy(net(x), target).backward()
        results.append({name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers()))
    expected, got = results
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert distance(got[key].float(), value.float()) < 1e-3, key


def test_googlenet_trains_its_side_branches():
    model = network("googlenet").train()
    fast = swap(model)
    x = torch.randn(1, 3, 224, 224)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    got = fast(x)
    assert type(got) is type(expected)
    for name in expected._fields:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert isinstance(fast.eval()(x), Tensor)

"""fastconv.swap: the same outputs, gradients and statistics, whatever the model and whatever happens to it."""

from __future__ import annotations

import copy
import io
import operator
import threading
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastconv
from fastconv import models
from fastconv._numerics import assert_close_to_oracle
from fastconv.explain import explain
from fastconv.swap import prepared, swap
from fastconv.swap.regions import region_of

# ------------------------------------------------------------------------------------------------- helpers


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with fresh random weights and with batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -0.5, 0.5),
                ("running_mean", -0.5, 0.5),
                ("running_var", 0.5, 2.0),
            ):
                value = getattr(module, name)
                if value is not None:
                    value.data.uniform_(low, high, generator=generator)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            std = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.normal_(0, std, generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1, generator=generator)
    return model


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for item in value for t in tensors(item)] if value is not None else []


def agree(fast: nn.Module, model: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """In evaluation, without gradients: outputs within the policy, of eager's type, dtype and layout."""
    assert not model.training
    fast.eval()
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(*to_double(inputs), **to_double(kwargs))
        expected = model(*copy.deepcopy(inputs), **copy.deepcopy(kwargs))
        for _ in range(2):  # weights that have changed are made ready at the second call
            got = fast(*copy.deepcopy(inputs), **copy.deepcopy(kwargs))
            assert type(got) is type(expected)
            outputs = list(zip(tensors(got), tensors(expected), tensors(oracle), strict=True))
            assert outputs
            for out, baseline, exact in outputs:
                assert out.stride() == baseline.stride()
                assert_close_to_oracle(out, exact, baseline, what=type(model).__name__)


def to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, dict):
        return {key: to_double(item) for key, item in value.items()}
    return type(value)(map(to_double, value)) if isinstance(value, list | tuple) else value


def agree_in_training(model: nn.Module, *inputs: Tensor, seed: int = 0) -> None:
    """In float64, where rounding cannot flip a ReLU: outputs, all gradients, and buffers, from one step of each."""
    model = copy.deepcopy(model).double()
    results = []
    for network in (model, swap(model)):
        network = copy.deepcopy(network)
        leaves = [t.detach().double().requires_grad_() for t in inputs]
        torch.manual_seed(seed)
        outputs = tensors(network(*leaves))
        torch.manual_seed(seed)
        sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
        found = {f"output {i}": out for i, out in enumerate(outputs)}
        found |= {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
        found |= {f"grad {name}": p.grad for name, p in network.named_parameters()}
        found |= dict(network.named_buffers())
        results.append(found)
    expected, got = results
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8, msg=name)


def inference_choices(model: nn.Module) -> dict[str, str]:
    return {row.module: str(row.inference) for row in explain(model).rows if "<" not in row.module}


def run_count(fast: nn.Module) -> int:
    """How many prepared convolutions there are in the program for one tensor in evaluation mode."""
    programs = region_of(fast).programs(1, (torch.empty(0),), {})
    return 0 if isinstance(programs, str) else len(programs.inference.calls)


class ConvBN(nn.Sequential):
    def __init__(self, *args: Any, relu: nn.Module | None = None, **kwargs: Any) -> None:
        conv = nn.Conv2d(*args, **kwargs)
        super().__init__(conv, nn.BatchNorm2d(conv.out_channels))
        if relu is not None:
            self.append(relu)


class Block(nn.Module):
    """A residual block; `join` adds."""

    def __init__(self, join: Any, channels: int = 8) -> None:
        super().__init__()
        self.first = ConvBN(channels, channels, 3, padding=1, relu=nn.ReLU(inplace=True))
        self.second = ConvBN(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.join(self.second(self.first(x)), x))


def small_net() -> nn.Module:
    return seeded(
        nn.Sequential(
            ConvBN(3, 8, 3, padding=1, relu=nn.ReLU(inplace=True)),
            nn.MaxPool2d(2),
            Block(torch.add),
            nn.Conv2d(8, 6, 1),
            nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )
    ).eval()


def image(*shape: int, seed: int = 1, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, 3, 16, 16), generator=generator).contiguous(memory_format=layout)


def features(seed: int = 1) -> Tensor:
    return image(2, 8, 12, 12, seed=seed)


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
    model = network(name).eval()
    agree(swap(model), model, example(name, 96))


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


# ------------------------------------------------------------------------------------------------ what is fused


JOINS = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "torch.add": torch.add,
    "method": lambda x, y: x.add(y),
    "in-place": lambda x, y: x.add_(y),
    "iadd": operator.iadd,
}


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_residual_blocks_are_fused(join):
    model = seeded(Block(join)).eval()
    fast = swap(model)
    assert inference_choices(fast)["second.0"] == "conv + bn + add + relu -> conv2d_add_relu"
    agree(fast, model, features())
    agree(fast, model, features().contiguous(memory_format=torch.channels_last))
    agree_in_training(model.train(), features())


def test_the_shortcut_of_a_block_may_be_a_convolution():
    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = ConvBN(8, 8, 3, padding=1)
            self.down = ConvBN(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.main(x)
            shortcut = self.down(x)
            y += shortcut
            return F.relu(y, inplace=True)

    model = seeded(Down()).eval()
    fast = swap(model)
    assert inference_choices(fast) == {
        "main.0": "conv + bn -> conv2d",
        "down.0": "conv + bn + add + relu -> pointwise_conv2d",
    }
    agree(fast, model, features())
    agree_in_training(model.train(), features())


BROADCASTS = {
    "per channel": (1, 8, 1, 1),
    "per pixel": (12, 12),
    "larger batch": (6, 8, 12, 12),
}


@pytest.mark.parametrize("shape", BROADCASTS.values(), ids=BROADCASTS)
def test_broadcasting_additions_are_not_fused(shape):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.relu(self.conv(x) + y)

    model = seeded(Net()).eval()
    x = image(*((1 if shape[0] == 6 else 2), 8, 12, 12))
    agree(swap(model), model, x, image(*shape, seed=2))
    agree_in_training(model, x, image(*shape, seed=2))


ADDITIONS = {
    "alpha": lambda x, y: torch.add(x, y, alpha=2),
    "scalar": lambda x, y: x + 1,
    "itself": lambda x, y: x + x,
}


@pytest.mark.parametrize("join", ADDITIONS.values(), ids=ADDITIONS)
def test_other_additions(join):
    model = seeded(Block(join)).eval()
    agree(swap(model), model, features())


ACTIVATIONS = {
    "nn.ReLU": (nn.ReLU(), "relu"),
    "nn.ReLU inplace": (nn.ReLU(inplace=True), "relu"),
    "nn.ReLU6": (nn.ReLU6(), "relu6"),
    "nn.Hardtanh(0, 6)": (nn.Hardtanh(0, 6, inplace=True), "relu6"),
    "F.relu": (F.relu, "relu"),
    "F.relu inplace": (lambda x: F.relu(x, inplace=True), "relu"),
    "torch.relu": (torch.relu, "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "x.relu()": (lambda x: x.relu(), "relu"),
    "x.relu_()": (lambda x: x.relu_(), "relu"),
    "F.relu6": (lambda x: F.relu6(x, True), "relu6"),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0, 6), "relu6"),
    "nn.Hardtanh": (nn.Hardtanh(), None),
    "F.hardtanh(-1, 1)": (F.hardtanh, None),
    "nn.GELU": (nn.GELU(), None),
    "clamp": (lambda x: x.clamp(min=0), None),
}


@pytest.mark.parametrize(("activation", "fused"), ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("bn", [False, True], ids=["conv", "conv-bn"])
def test_activations(activation, fused, bn):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = ConvBN(3, 6, 3, bias=False) if bn else nn.Conv2d(3, 6, 3)
            if isinstance(activation, nn.Module):
                self.act = copy.deepcopy(activation)

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, "act", activation)(self.conv(x))

    model = seeded(Net()).eval()
    fast = swap(model)
    (choice,) = inference_choices(fast).values()
    pattern = " + ".join(["conv", *["bn"] * bn, *([fused] if fused else [])])
    assert choice.startswith(f"{pattern} -> ")
    agree(fast, model, image() * 4)
    agree_in_training(model.train(), image() * 4)


def test_local_response_norm():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lrn = nn.LocalResponseNorm(5, alpha=0.1, beta=0.6, k=2.0)

        def forward(self, x: Tensor) -> Tensor:
            return F.local_response_norm(self.lrn(x), 3, 0.2, k=1.5)

    model = Net().eval()
    fast = swap(model)
    assert [row.inference.op for row in explain(fast).rows] == ["local_response_norm"] * 2
    agree(fast, model, features())
    agree_in_training(model, features())
    fast.lrn.k = model.lrn.k = 3.0
    agree(fast, model, features())


GEOMETRIES = {
    "5x3": {"kernel_size": (5, 3), "stride": (2, 1), "padding": (1, 2)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 8, "padding": 1},
    "multiplier": {"kernel_size": 3, "groups": 8, "out_channels": 16},
    "pointwise": {"kernel_size": 1, "stride": 2},
    "padded 1x1": {"kernel_size": 1, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, even filter": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
}


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("bias", [False, True])
def test_geometries(options, bias):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = ConvBN(8, **{"out_channels": 8, **options}, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.relu(y + y.detach().flip(0))

    class Residual(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.relu(self.conv(x) + y)

    for layout in (torch.contiguous_format, torch.channels_last):
        x = image(2, 8, 13, 11, layout=layout)
        model = seeded(Net()).eval()
        agree(swap(model), model, x)
        model = seeded(Residual()).eval()
        agree(swap(model), model, x, torch.randn_like(model.conv(x)))


# -------------------------------------------------------------------------------------------- what is left alone


class Chain(nn.Module):
    """conv, relu with room for whatever stands in the way"""

    def __init__(self, conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1) if conv is None else conv
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


def double(_module: nn.Module, *values: Any) -> Any:
    """A hook that changes what it sees."""
    value = values[-1]
    return tuple(v * 2 for v in value) if isinstance(value, tuple) else value * 2


HOOKS = {
    "forward hook": nn.Module.register_forward_hook,
    "forward pre-hook": nn.Module.register_forward_pre_hook,
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("path", ["0.0", "0.1", "0.2", "2", "2.first", "2.second.0", "2.relu"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_hooks_run(register, path, late):
    model = small_net()
    if late:
        fast = swap(model)
        with torch.no_grad():
            fast(image())
        register(fast.get_submodule(path), double)
    register(model.get_submodule(path), double)
    if not late:
        fast = swap(model)
    agree(fast, model, image())


def test_a_removed_hook_does_not_run():
    model = small_net()
    fast = swap(model)
    handle = fast[2].second[0].register_forward_hook(double)
    with torch.no_grad():
        fast(image())
    handle.remove()
    agree(fast, model, image())


def test_features_can_be_collected_by_hooks():
    model = small_net()
    fast = swap(model)
    seen = []
    fast[2].first.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        fast(image())
        expected = model[2].first(model[1](model[0](image())))
    torch.testing.assert_close(seen, [expected], rtol=1e-4, atol=1e-5)


def test_backward_hooks_run():
    model = small_net()
    fast = swap(model)
    seen = []
    for net in (model, fast):
        handle = net[2].second[0].register_full_backward_hook(lambda _m, _gi, grads: seen.append(grads[0]))
        net(image()).sum().backward()
        handle.remove()
    torch.testing.assert_close(seen[0], seen[1])


def test_global_hooks_run():
    model = small_net()
    fast = swap(model)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _inputs, output: output * 2 if isinstance(module, nn.Conv2d) else None
    )
    try:
        agree(fast, model, image())
    finally:
        handle.remove()


def test_a_shared_convolution_is_left_alone():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.again = self.conv

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.again(F.relu(self.conv(x))))

    model = seeded(Net()).eval()
    assert "shared: called 2 times" in str(explain(model))
    agree(swap(model), model, features())
    agree_in_training(model, features())


def test_shared_parameters():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = ConvBN(8, 8, 3, padding=1, relu=nn.ReLU())
            self.b = ConvBN(8, 8, 3, padding=1, relu=nn.ReLU())
            self.b[0].weight = self.a[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = seeded(Net()).eval()
    agree(swap(model), model, features())
    agree_in_training(model.train(), features())


READERS = {
    "output used twice": lambda conv, relu, x: (lambda y: relu(y) + y)(conv(x)),
    "relu in place, output used": lambda conv, relu, x: (lambda y: F.relu(y, inplace=True) * y)(conv(x)),
    "result of relu in place ignored": lambda conv, relu, x: (lambda y: (y.relu_(), y)[1])(conv(x)),
    "returned as well": lambda conv, relu, x: (lambda y: (y, relu(y)))(conv(x)),
    "viewed": lambda conv, relu, x: (lambda y: relu(y).view(-1).sum() + y.flatten().sum())(conv(x)),
    "written through a view": lambda conv, relu, x: (lambda y: (y[:, 0].zero_(), relu(y))[1])(conv(x)),
    "setitem": lambda conv, relu, x: (lambda y: (y.__setitem__((slice(None), 0), 1.0), relu(y))[1])(conv(x)),
    "input overwritten": lambda conv, relu, x: (lambda x: (lambda y: (x.zero_(), relu(y))[1])(conv(x)))(x + 0),
    "input overwritten by relu": lambda conv, relu, x: (
        lambda x: (lambda y: F.relu(x, inplace=True) + relu(y))(conv(x))
    )(x + 0),
    "residual overwritten": lambda conv, relu, x: (lambda r: (lambda s: (r.zero_(), relu(s))[1])(conv(x) + r))(x * 2),
    "residual overwritten before": lambda conv, relu, x: (lambda r: (lambda y: (r.mul_(3), relu(y + r))[1])(conv(x)))(
        x * 2
    ),
    "added into the input": lambda conv, relu, x: (lambda x: (relu(x.add_(conv(x))), x))(x + 0),
    "added into a residual that is read": lambda conv, relu, x: (lambda r: (lambda s: relu(s) + r)(r.add_(conv(x))))(
        x * 2
    ),
    "added into a fresh residual": lambda conv, relu, x: relu((x * 2).add_(conv(x))),
    "out=": lambda conv, relu, x: (lambda y: relu(torch.add(y, x, out=y)) + y)(conv(x)),
    "sum, then overwritten": lambda conv, relu, x: (lambda s: (relu(s), s.zero_())[0])(conv(x) + x),
}


@pytest.mark.parametrize("run", READERS.values(), ids=READERS)
@pytest.mark.parametrize("bn", [False, True], ids=["conv", "conv-bn"])
def test_values_that_others_see(run, bn):
    class Net(Chain):
        def forward(self, x: Tensor) -> Any:
            return run(self.conv, self.relu, x)

    model = seeded(Net(ConvBN(8, 8, 3, padding=1) if bn else None)).eval()
    agree(swap(model), model, features())


def test_an_input_that_is_overwritten():
    class Net(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x += self.conv(x)
            return self.relu(x)

    model = seeded(Net()).eval()
    fast = swap(model)
    for _ in range(2):
        x, y = features(), features()
        with torch.no_grad():
            model(x)
            fast(y)
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def strange_convs() -> dict[str, tuple[nn.Module, str]]:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Renamed(nn.Conv2d):
        """Computes what nn.Conv2d does."""

    def conv(cls: type[nn.Module] = nn.Conv2d, **options: Any) -> nn.Module:
        return cls(8, 8, 3, **{"padding": 1, **options})

    return {
        "reflect": (conv(padding_mode="reflect"), "padding_mode 'reflect' is not supported"),
        "circular": (conv(padding_mode="circular"), "padding_mode 'circular' is not supported"),
        "transposed": (conv(nn.ConvTranspose2d), "ConvTranspose2d is not supported"),
        "weight norm": (parametrizations.weight_norm(conv()), "its weight is computed at every call"),
        "spectral norm": (parametrizations.spectral_norm(conv()).eval(), "its weight is computed at every call"),
        "pruned": (prune.l1_unstructured(conv(), "weight", 0.5), "it has hooks"),
        "own forward": (conv(Scaled), "not supported"),
        "subclass": (conv(Renamed), ""),
        "fastconv.nn": (conv(fastconv.nn.Conv2dReLU), "it is a fastconv layer already"),
    }


@pytest.mark.parametrize("name", strange_convs())
def test_convolutions_of_other_kinds(name):
    conv, reason = strange_convs()[name]
    model = Chain(conv).eval()
    text = str(explain(model))
    assert reason in text or name == "own forward"
    assert ("-> conv2d_relu" in text) == (name == "subclass")
    fast = swap(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(features()), model(features()), rtol=1e-4, atol=1e-5)
    agree_in_training(model, features())


def test_lazy_convolutions():
    model = Chain(nn.LazyConv2d(8, 3)).eval()
    assert "lazy" in str(explain(model))
    fast = swap(model)
    fast(features())
    agree(fast, model, features())


def test_quantised_convolutions():
    conv = torch.ao.nn.quantized.Conv2d(8, 8, 3)
    model = nn.Sequential(torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8), conv).eval()
    assert "not supported" in str(explain(model))
    with torch.no_grad():
        got, expected = swap(model)(features()), model(features())
    assert torch.equal(got.int_repr(), expected.int_repr())


BATCH_NORMS = {
    "no statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "no parameters": lambda: nn.BatchNorm2d(8, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(8, momentum=None),
    "large eps": lambda: nn.BatchNorm2d(8, eps=0.3),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
}


@pytest.mark.parametrize("make", BATCH_NORMS.values(), ids=BATCH_NORMS)
def test_batch_norms_of_other_kinds(make):
    model = seeded(nn.Sequential(nn.Conv2d(8, 8, 3), make(), nn.ReLU())).eval()
    agree(swap(model), model, features())
    agree_in_training(model.train(), features())


# ----------------------------------------------------------------------------------------- forwards of all kinds


Pair = namedtuple("Pair", ["first", "second"])


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = ConvBN(8, 8, 3, padding=1, relu=nn.ReLU())
        self.b = nn.Conv2d(8, 8, 3, padding=1)

    def parts(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.a(x), F.relu(self.b(x) if y is None else self.b(x) + y)


FORWARDS = {
    "tuple": (lambda net, x: net.parts(x, None), [features()], {}),
    "list": (lambda net, x: list(net.parts(x, None)), [features()], {}),
    "dict": (lambda net, x: dict(zip("ab", net.parts(x, None), strict=True)), [features()], {}),
    "namedtuple": (lambda net, x: Pair(*net.parts(x, None)), [features()], {}),
    "nested": (lambda net, x: {"a": [net.a(x)], "b": (x, None)}, [features()], {}),
    "two inputs": (lambda net, x, y: net.parts(x, y)[1], [features(), features(2)], {}),
    "keyword": (lambda net, x, y=None: net.parts(x, y)[1], [features()], {"y": features(2)}),
    "None given": (lambda net, x, y=None: net.parts(x, y)[1], [features(), None], {}),
    "None left out": (lambda net, x, y=None: net.parts(x, y)[1], [features()], {}),
    "flag": (lambda net, x, both=False: net.parts(x, None)[0 if both else 1], [features()], {"both": True}),
    "number": (lambda net, x, scale=1: net.a(x) * scale, [features()], {"scale": 2.5}),
    "keyword only": (lambda net, x, *, y: net.parts(x, y)[1], [features()], {"y": features(2)}),
    "list of inputs": (lambda net, xs: net.a(xs[0]) + net.b(xs[1]), [[features(), features(2)]], {}),
    "dict of inputs": (lambda net, d: net.a(d["x"]) + d["y"], [{"x": features(), "y": features(2)}], {}),
    "varargs": (lambda net, *xs: net.a(xs[0]) + net.b(xs[-1]), [features(), features(2)], {}),
    "the same twice": (lambda net, x, y: net.a(x) + net.b(y), [features()] * 2, {}),
    "isinstance": (lambda net, x: net.a(x) if isinstance(x, Tensor) else net.b(x[0]), [features()], {}),
    "is_tensor": (lambda net, x: net.a(x) if torch.is_tensor(x) else net.b(x[0]), [features()], {}),
    "isinstance of a result": (
        lambda net, x: net.b(y) if isinstance(y := net.a(x), Tensor) else y[0],
        [features()],
        {},
    ),
    "shape": (lambda net, x: net.a(x).view(x.shape[0], -1), [features()], {}),
    "size": (lambda net, x: net.a(x).view(x.size(0), x.size(1), -1).mean(-1), [features()], {}),
    "if shape": (lambda net, x: net.a(x) if x.shape[-1] > 4 else net.b(x), [features()], {}),
    "if value": (lambda net, x: net.a(x) if x.sum() > 1e9 else F.relu(net.b(x)), [features()], {}),
    "strides": (lambda net, x: net.a(x) * float(net.b(x).stride(1)), [features()], {}),
    "as_strided": (lambda net, x: net.a(x).as_strided((2, 3), (5, 1), 1), [features()], {}),
    "data_ptr": (lambda net, x: net.a(x) if net.a(x).is_contiguous() else net.b(x), [features()], {}),
    "reshape": (lambda net, x: net.a(x).reshape(2, -1), [features()], {}),
    "flatten, then written": (lambda net, x: (y := net.a(x), y.flatten(1).zero_(), y.sum())[2], [features()], {}),
    "permute": (lambda net, x: net.a(x).permute(0, 2, 3, 1), [features()], {}),
    "chunk": (lambda net, x: torch.cat([c.relu() for c in net.a(x).chunk(2, 1)], 1), [features()], {}),
    "numpy": (lambda net, x: torch.from_numpy(net.a(x).detach().numpy()), [features()], {}),
    "constant": (lambda net, x: net.a(x) + torch.ones(8, 1, 1), [features()], {}),
    "new tensor": (lambda net, x: net.a(x) + torch.ones_like(x), [features()], {}),
    "loop": (lambda net, x: [x := net.a(x) for _ in range(3)][-1], [features()], {}),
    "no_grad": (lambda net, x: torch.no_grad()(net.a)(x) + net.b(x), [features()], {}),
    "empty batch": (lambda net, x: net.parts(x, x), [features()[:0]], {}),
    "unbatched": (lambda net, x: F.relu(net.b(x)), [features()[0]], {}),
    "one pixel": (lambda net, x: net.parts(x, x), [features()[..., :1, :1]], {}),
    "expanded": (lambda net, x: net.parts(x, x), [features()[:1].expand(3, -1, -1, -1)], {}),
    "sliced": (lambda net, x: net.parts(x, x), [image(2, 16, 12, 24)[:, ::2, :, ::2]], {}),
}


def with_forward(forward: Any) -> nn.Module:
    return seeded(type("Net", (Many,), {"forward": forward})())


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name):
    forward, inputs, kwargs = FORWARDS[name]
    model = with_forward(forward).eval()
    fast = swap(model)
    agree(fast, model, *inputs, **kwargs)
    got, expected = fast(*inputs, **kwargs), model(*inputs, **kwargs)
    for ours, theirs in zip(tensors(got), tensors(expected), strict=True):
        assert ours.requires_grad == theirs.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_calls_of_different_kinds_do_not_mix():
    model = with_forward(lambda net, x, y=None, scale=1: net.parts(x, y)[1] * scale).eval()
    fast = swap(model)
    for call in [{}, {"y": features(2)}, {"scale": 2}, {"scale": 2.0}, {"scale": True}, {"y": None}] * 2:
        agree(fast, model, features(), **call)


class Outer(nn.Module):
    """A forward that cannot be traced, around a part that can."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.inner = ConvBN(8, 8, 3, padding=1, relu=nn.ReLU())
        self.change = change
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, self.inner(x))


def count(net: nn.Module, x: Tensor) -> Tensor:
    net.calls += 1
    return x * net.calls


def accumulate(net: nn.Module, x: Tensor) -> Tensor:
    net.total += 1
    return x * net.total


UNTRACEABLE = {
    "counts": (count, "changes attributes"),
    "remembers": (lambda net, x: setattr(net, "seen", x) or x, "changes attributes"),
    "torch random": (lambda net, x: x * torch.rand(()), ""),
    "python random": (lambda net, x: x * __import__("random").random(), "random numbers"),
    "numpy random": (lambda net, x: x * float(__import__("numpy").random.rand()), "random numbers"),
    "no_grad": (lambda net, x: torch.no_grad()(lambda: net.inner(x))() + x, "grad mode"),
    "autocast": (
        lambda net, x: torch.autocast("cpu", torch.bfloat16)(lambda: net.inner(x))().float() + x,
        "autocast",
    ),
    "checkpoint": (
        lambda net, x: torch.utils.checkpoint.checkpoint(net.inner, x, use_reentrant=False),
        "checkpointing",
    ),
    "branches on values": (lambda net, x: x if x.sum() > 0 else -x, ""),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_forwards_that_are_not_traced(name):
    change, reason = UNTRACEABLE[name]
    model = seeded(Outer(change)).eval()
    state = copy.deepcopy(vars(model))
    fast = swap(model)
    explanation = explain(fast)
    assert reason in explanation.untraced[""]
    assert [str(row.inference) for row in explanation.rows] == ["conv + bn + relu -> conv2d_relu"]
    assert vars(model).keys() == state.keys()
    assert model.calls == 0
    import random

    import numpy as np

    outputs = []
    with torch.no_grad():
        for net in (model, fast, model, fast):
            random.seed(1)
            np.random.seed(1)  # noqa: NPY002  the legacy state is what user code draws from
            torch.manual_seed(1)
            outputs.append(net(features()))
    tolerance = 2e-2 if name == "autocast" else 1e-4
    for ours, theirs in ((outputs[1], outputs[0]), (outputs[3], outputs[2])):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_buffers_that_a_forward_updates():
    model = seeded(Outer(accumulate)).eval()
    fast = swap(model)
    assert model.total == 0
    fast(features())
    model(features())
    assert model.total == fast.total == 2


def test_other_methods_run_too():
    class Net(Many):
        def forward_features(self, x: Tensor) -> Tensor:
            return self.a(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.forward_features(x).mean((2, 3))

    model = seeded(Net()).eval()
    fast = swap(model)
    with torch.no_grad():
        torch.testing.assert_close(
            fast.forward_features(features()), model.forward_features(features()), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(fast.a(features()), model.a(features()), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- changes after swap


def change_all(model: nn.Module, change: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.is_floating_point():
                    change(module, tensor)


def step(model: nn.Module, **options: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    model(image()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assign(model: nn.Module) -> None:
    model[0][0].weight.data = torch.randn(8, 3, 3, 3) * 0.3
    model[0][1].running_mean.data = torch.randn(8)


def numpy_write(module: nn.Module, tensor: Tensor) -> None:
    tensor.detach().numpy()[...] *= 1.5


def train(model: nn.Module) -> None:
    model.train()
    for seed in range(2):
        model(image(seed=seed))
    model.eval()


def each(change: Any) -> Any:
    return lambda model: change_all(model, change)


CHANGES = {
    "SGD": step,
    "SGD foreach": lambda model: step(model, foreach=True),
    "SGD fused": lambda model: step(model, fused=True),
    "load_state_dict": lambda model: model.load_state_dict(seeded(small_net(), 7).state_dict()),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(
        seeded(small_net(), 7).state_dict(), assign=True
    ),
    "copy_": torch.no_grad()(each(lambda module, t: t.copy_(t * 1.5))),
    "mul_ of one number": torch.no_grad()(lambda model: model[2].first[0].weight[3, 2, 1, 0].mul_(7)),
    "data.copy_": each(lambda module, t: t.data.copy_(t.data * 1.5)),
    "data.copy_ of one tensor": lambda model: model[2].first[0].weight.data.mul_(1.5),
    "data of one batch norm channel": lambda model: model[2].first[1].weight.data[3].zero_(),
    "data = new": assign,
    "data = transposed": lambda model: setattr(
        model[2].first[0].weight, "data", model[2].first[0].weight.data.transpose(2, 3)
    ),
    "numpy": each(numpy_write),
    "set_": torch.no_grad()(lambda model: model[0][0].weight.set_(torch.randn(8, 3, 3, 3))),
    "new Parameter": lambda model: setattr(model[0][0], "weight", nn.Parameter(torch.randn(8, 3, 3, 3))),
    "statistics": train,
    "reset_parameters": lambda model: [m.reset_parameters() for m in model.modules() if hasattr(m, "reset_parameters")],
    "double": lambda model: model.double(),
    "half and back": lambda model: model.half().float(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()) * 1.5, model.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("which", ["model", "fast"])
def test_changed_weights_are_seen_by_both(change, which):
    model = small_net()
    fast = swap(model)
    with torch.no_grad():
        fast(image()), fast(image())
    torch.manual_seed(0)
    change(model if which == "model" else fast)
    agree(fast, model, image().to(model[-1].weight.dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[0][1], "eps", 0.5),
        lambda model: setattr(model[0][0], "padding", (2, 2)),
        lambda model: setattr(model[0], "2", nn.Identity()),
        lambda model: setattr(model[0], "2", nn.GELU()),
        lambda model: model.__setitem__(3, nn.Conv2d(8, 6, 3)),
        lambda model: setattr(model[2], "join", torch.sub),
        lambda model: model[2].second.append(nn.Tanh()),
    ],
    ids=["eps", "padding", "relu replaced", "relu is gelu", "conv", "attribute", "appended"],
)
def test_changed_modules_are_seen(change):
    model = small_net()
    fast = swap(model)
    with torch.no_grad():
        fast(image())
    apart = copy.deepcopy(model)
    for net in (apart, fast):
        torch.manual_seed(0)
        change(net)
    agree(fast, apart, image())


def test_new_weights_are_prepared_when_they_stay(monkeypatch):
    fast = swap(small_net())
    calls = []
    monkeypatch.setattr(
        prepared,
        "_prepare",
        lambda conv, old=prepared._prepare: calls.append(conv) or old(conv),
    )
    with torch.no_grad():
        for _ in range(3):
            fast(image())
    first = len(calls)
    assert first == run_count(fast)
    with torch.no_grad():
        for _ in range(3):  # as in training: never twice the same weights
            fast[0][0].weight.mul_(1.1)
            fast(image())
        assert len(calls) == first
        fast(image())
    assert len(calls) == 2 * first


def test_moving_average_of_a_swapped_model():
    model = small_net()
    fast = swap(model)
    average = torch.optim.swa_utils.AveragedModel(fast, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(fast)
    step(fast)
    average.update_parameters(fast)
    reference = copy.deepcopy(small_net())
    reference.load_state_dict({k[7:]: v for k, v in average.state_dict().items() if k.startswith("module.")})
    agree(average.module, reference, image())


# ------------------------------------------------------------------------------------------------------- modes


def test_train_after_eval_after_train():
    model = small_net()
    fast = swap(model)
    with torch.no_grad():
        fast(image())
    for _ in range(2):
        agree_in_training(model.train(), image())
        model.eval()
        train(fast)
        agree(fast, model, image())


def test_frozen_batch_norms():
    model = small_net().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    agree_in_training(model, image())
    fast = swap(model)
    fast.train()
    fast[0][1].eval()
    model.train()
    model[0][1].eval()
    results = []
    for net in (copy.deepcopy(model), copy.deepcopy(fast)):
        results.append((net(image()), dict(net.named_buffers())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_dropout_draws_the_same(mode):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Conv2d(8, 4, 3))
    model.train(mode)
    model[2].train()
    fast = swap(model)
    with torch.no_grad():
        results = [torch.random.manual_seed(0) and net(image()) for net in (model, fast)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_gradients_in_evaluation_mode():
    agree_in_training(small_net(), image())


def test_gradients_of_some_parameters():
    model = small_net()
    for p in model.parameters():
        p.requires_grad_(False)
    model[3].weight.requires_grad_()
    fast = swap(model)
    fast(image()).sum().backward()
    grad, model[3].weight.grad = model[3].weight.grad, None
    model(image()).sum().backward()
    torch.testing.assert_close(grad, model[3].weight.grad)
    model[3].weight.requires_grad_(False)
    assert not fast(image()).requires_grad
    x = image().requires_grad_()
    (ours,) = torch.autograd.grad(fast(x).sum(), x)
    (theirs,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_an_optimizer_from_before_the_swap():
    model, reference = small_net().train(), small_net().train()
    # Not Adam, which turns a gradient that is zero but for rounding (a bias before a batch norm) into a full step.
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (model, reference)]
    fast = swap(model)
    losses = []
    for net, optimizer in zip((fast, reference), optimizers, strict=True):
        for i in range(3):
            loss = net(image(seed=i)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    agree(fast.eval(), reference.eval(), image())


# ---------------------------------------------------------------------------------------- dtypes and edge values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = small_net().to(dtype)
    agree(swap(model), model, image().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_autocast(dtype, join):
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self[0](x)
            return y, self[1](y), F.relu(self[1].second(x) + x)

    model = seeded(Net(ConvBN(8, 8, 1, relu=nn.ReLU6()), Block(join))).eval()
    fast = swap(model)
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(features().double())
        with torch.autocast("cpu", dtype):
            for _ in range(2):
                for ours, theirs, exact in zip(fast(features()), model(features()), oracle, strict=True):
                    assert ours.dtype == theirs.dtype
                    assert ours.stride() == theirs.stride()
                    error, allowed = ((t.double() - exact).abs().max() for t in (ours, theirs))
                    assert error <= 2 * allowed
    with torch.autocast("cpu", dtype):
        outputs = [net.train()(features()) for net in (model, fast)]
    for theirs, ours in zip(*outputs, strict=True):
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_edge_values(value, dtype):
    model = seeded(
        nn.Sequential(
            ConvBN(8, 8, 3, padding=1, relu=nn.ReLU()),
            ConvBN(8, 8, 1, relu=nn.ReLU6()),
            Block(torch.add),
        )
    )
    model = model.eval().to(dtype)
    x = features().to(dtype)
    x[0, 2, 1, 7] = value
    fast = swap(model)
    with torch.no_grad():
        for _ in range(2):
            ours, theirs = fast(x), model(x)
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.isinf(), theirs.isinf())
            assert ours.isnan().any()


def test_bad_inputs_fail_as_before():
    model = small_net()
    fast = swap(model)
    for x in (image(2, 4, 16, 16), image().double(), image()[0, 0]):
        with torch.no_grad():
            for net in (model, fast, fast):
                with pytest.raises(RuntimeError):
                    net(x)


def test_images_of_many_sizes():
    model = small_net()
    fast = swap(model)
    for size in (16, 18, 20, 22, 24, 26, 16):
        agree(fast, model, image(1, 3, size, 16))
        agree(fast, model, image(3, 3, size, 16))


# ---------------------------------------------------------------------------------- the rest of torch's machinery


def test_reference_backend():
    model = small_net()
    fast = swap(model)
    with fastconv.use_backend("reference"):
        agree(fast, model, image())


def test_without_onednn():
    model = small_net()
    fast = swap(model)
    with torch.backends.mkldnn.flags(enabled=False):
        agree(fast, model, image())
    agree(fast, model, image())


def test_inference_mode():
    model = small_net()
    fast = swap(model)
    with torch.inference_mode():
        fast(image())
    agree(fast, model, image())
    with torch.inference_mode():
        made_inside = small_net()
        fast = swap(made_inside)
        for _ in range(2):
            torch.testing.assert_close(fast(image()), made_inside(image()), rtol=1e-4, atol=1e-5)


def test_deepcopy_is_independent():
    model = small_net()
    fast = swap(model)
    with torch.no_grad():
        fast(image())
    twin = copy.deepcopy(fast)
    assert type(twin) is type(fast)
    assert run_count(twin) == run_count(fast)
    expected = copy.deepcopy(model)
    change_all(model, lambda module, t: t.data.mul_(2))
    agree(twin, expected, image())
    agree(fast, model, image())


def test_save_and_load():
    model = small_net()
    fast = swap(model)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert run_count(loaded) == run_count(fast)
    agree(loaded, model, image())


def test_swapping_twice():
    model = small_net()
    once = swap(model)
    twice = swap(once)
    assert type(twice) is type(once)
    agree(twice, model, image())


def test_a_module_that_is_one_layer():
    for layer in (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.LocalResponseNorm(3)):
        agree(swap(layer.eval()), layer, image())


def test_data_parallel_replicas():
    fast = swap(small_net())
    replica = fast._replicate_for_data_parallel()
    replica._modules = {}
    assert region_of(replica) is not region_of(fast)
    assert region_of(replica).module is replica


def test_threads():
    model = small_net()
    fast = swap(model)
    inputs = [image(1 + i % 3, 3, 16 + 2 * (i % 4), 16, seed=i) for i in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    failures = []

    def work(i: int) -> None:
        with torch.no_grad():
            for k in range(12):
                j = (i + k) % len(inputs)
                if not torch.allclose(fast(inputs[j]), expected[j], rtol=1e-4, atol=1e-5):
                    failures.append(j)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("mode", ["eval", "eval with gradients", "train"])
def test_compile(mode):
    torch._dynamo.reset()
    model = small_net().train(mode == "train")
    fast = swap(model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode != "eval"):
        for n in (2, 3):
            expected = copy.deepcopy(model)(image(n, 3, 16, 16))
            torch.testing.assert_close(compiled(image(n, 3, 16, 16)), expected, rtol=1e-4, atol=1e-5)
            if mode == "train":
                break
    if mode == "eval":
        with torch.no_grad():
            model[0][0].weight.mul_(2)
            torch.testing.assert_close(compiled(image()), model(image()), rtol=1e-4, atol=1e-5)


def test_export():
    fast = swap(small_net())
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(fast, (image(),), dynamic_shapes=({0: batch},))
    ops = [str(node.target) for node in program.graph.nodes if "fastconv" in str(node.target)]
    assert ops == [
        "fastconv.conv2d_relu.default",
        "fastconv.conv2d_relu.default",
        "fastconv.conv2d_add_relu.default",
        "fastconv.pointwise_conv2d.default",
    ]
    torch.testing.assert_close(
        program.module()(image(5, 3, 16, 16)), small_net()(image(5, 3, 16, 16)), rtol=1e-4, atol=1e-5
    )


TRANSFORMS = {
    "vmap": lambda net: torch.func.vmap(net)(image(3, 2, 3, 16, 16)),
    "grad": lambda net: torch.func.grad(lambda x: net(x).sum())(image()),
    "jvp": lambda net: torch.func.jvp(net, (image(),), (image(seed=2),))[1],
    "forward AD": lambda net: dual(net),
    "functional_call": lambda net: torch.func.functional_call(
        net, {k: v * 1.5 for k, v in net.named_parameters()}, (image(),)
    ),
    "stateless, twice": lambda net: [
        torch.func.functional_call(net, {k: v * s for k, v in net.named_parameters()}, (image(),)) for s in (1, 2)
    ][1],
    "double backward": lambda net: second_order(net),
    "jit.trace": lambda net: torch.jit.trace(net, image(), check_trace=False)(image(seed=3)),
    "fx.symbolic_trace": lambda net: torch.fx.symbolic_trace(net)(image()),
    "flop counter": lambda net: count_flops(net),
    "checkpoint": lambda net: torch.utils.checkpoint.checkpoint(net, image(), use_reentrant=False),
}


def dual(net: nn.Module) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        out = net(torch.autograd.forward_ad.make_dual(image(), image(seed=2)))
        return torch.autograd.forward_ad.unpack_dual(out).tangent


def second_order(net: nn.Module) -> Tensor:
    x = image().requires_grad_()
    (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


def count_flops(net: nn.Module) -> Tensor:
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        net(image())
    return torch.tensor(counter.get_total_flops())


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_transforms(transform, grad):
    model = small_net()
    fast = swap(model)
    with torch.set_grad_enabled(grad or transform is TRANSFORMS["double backward"]):
        fast(image())
        torch.testing.assert_close(transform(fast), transform(model), rtol=1e-3, atol=1e-4)

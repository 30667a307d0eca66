"""fastconv.swap of unusual models: what it leaves alone, and hooks that go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastconv
from fastconv.swapping import swap
from fastconv.swapping.explanation import explain
from support.swap_models import (
    ConvBN,
    agree,
    agree_in_training,
    features,
    image,
    seeded,
    small_net,
)

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

"""fastconv.swap of unusual models: what it leaves alone, and forwards of all kinds."""

from __future__ import annotations

import copy
import random
from collections import namedtuple
from typing import Any

import numpy as np
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
    tensors,
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
    "counts": (count, "writes the attribute calls"),
    "remembers": (lambda net, x: setattr(net, "seen", x) or x, "calls setattr"),
    "torch random": (lambda net, x: x * torch.rand(()), ""),
    "python random": (lambda net, x: x * __import__("random").random(), "random numbers"),
    "numpy random": (lambda net, x: x * float(np.random.rand()), "a RandomState"),  # noqa: NPY002
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

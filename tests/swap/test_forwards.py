"""fastconv.swap of unusual models: forwards of all kinds."""

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

from fastconv.swapping import swap
from fastconv.swapping.explanation import explain
from support.swap_models import (
    ConvBN,
    agree,
    features,
    image,
    seeded,
    tensors,
)

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

"""fastconv.swap of what goes into a forward, comes out of it, and of what parts a model may have."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv import explain, swap
from support.swap_calls import Reverse
from support.swap_models import Acting, features, seeded

# ------------------------------------------------------------------------------------------------- return values


class Point(NamedTuple):
    a: Any
    b: Any = None


class SubPoint(Point):
    pass


@dataclasses.dataclass
class Record:
    a: Any
    b: Any = None


class Output(OrderedDict):
    pass


RETURNS = {
    "OrderedDict": lambda s, h: OrderedDict([("out", h), ("aux", h + 1)]),
    "nested OrderedDict": lambda s, h: {"x": [OrderedDict(b=h, a=(h, None))], "y": 3},
    "dict": lambda s, h: {"z": h, "a": h * 2},
    "namedtuple": lambda s, h: Point(h, [h]),
    "subclass of a namedtuple": lambda s, h: SubPoint(h, h),
    "dataclass": lambda s, h: Record(h, {"k": h}),
    "subclass of dict": lambda s, h: Output(out=h),
    "list": lambda s, h: [h, (h,), [h]],
    "tuple": lambda s, h: (h, [h], {}),
    "size": lambda s, h: (h, h.shape),
    "namespace": lambda s, h: types.SimpleNamespace(h=h),
    "return type of torch": lambda s, h: torch.max(h, 1),
    "None": lambda s, h: None,
    "number": lambda s, h: (h, 1, "a", 2.5, True),
}


def structure(value: Any) -> Any:
    """Types, names, order and nesting, with the shapes of tensors."""
    kind = type(value)
    if isinstance(value, Tensor):
        return kind, tuple(value.shape)
    if dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace):
        return kind, structure(vars(value))
    if isinstance(value, dict):
        return kind, [(key, structure(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return kind, [structure(item) for item in value]
    return kind, value


@pytest.mark.parametrize("name", RETURNS)
def test_containers_keep_their_types(name: str) -> None:
    model = seeded(Acting(RETURNS[name], {})).eval()
    fast = swap(model)
    for training in (False, True):
        model.train(training)
        fast.train(training)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                assert structure(fast(features())) == structure(model(features()))


def test_ordered_dicts_are_traced() -> None:
    """What torchvision's segmentation models return."""
    explanation = explain(seeded(Acting(RETURNS["OrderedDict"], {})).eval())
    assert not explanation.untraced
    assert str(explanation.rows[0].inference) == "conv + relu -> conv2d_relu"


def test_a_backward_of_the_users_own() -> None:
    model = seeded(Acting(lambda s, h: F.relu(s.conv(Reverse.apply(h))), {})).eval()
    fast = swap(model)
    assert not explain(fast).untraced
    grads = []
    for net in (model, fast):
        x = features().requires_grad_()
        net(x).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------- arguments and what comes back


class Appends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, features: Any) -> Any:
        features.append(torch.relu(self.conv(features[-1])))
        return features


class Returns(Appends):
    def forward(self, features: Any) -> Any:
        return {"all": features, "last": torch.relu(self.conv(features[-1]))}


class Fills(Appends):
    def forward(self, features: Any) -> Any:
        features["h"] = torch.relu(self.conv(features["x"]))
        return features["h"]


class Parent(nn.Module):
    """Not traced itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Appends(), Appends()

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        self.one(features)
        if x.sum() > 1e9:
            return x
        self.two(features)
        return torch.cat(features)


def test_containers_that_are_passed() -> None:
    """What a forward does to them is seen by who passed them; what comes back is the very same container."""
    with torch.no_grad():
        for model in (Parent(), Appends(), Returns(), Fills()):
            fast = swap(seeded(model).eval())
            for _ in range(2):
                given = [{"x": features()} if isinstance(model, Fills) else [features()] for _ in range(2)]
                arguments = [features()] * 2 if isinstance(model, Parent) else given
                expected, got = model(arguments[0]), fast(arguments[1])
                assert len(given[0]) == len(given[1])
                assert (expected is given[0]) == (got is given[1])
                if isinstance(model, Returns):
                    assert got["all"] is given[1]
                if isinstance(model, Parent):
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_sign_of_a_zero_that_is_passed() -> None:
    class Scales(Appends):
        def forward(self, x: Tensor, by: float) -> Tensor:
            return torch.relu(self.conv(x)) * by

    model = seeded(Scales()).eval()
    fast = swap(model)
    with torch.no_grad():
        for by in (0.0, -0.0, float("nan"), float("nan")):
            assert torch.equal(torch.signbit(fast(features(), by)), torch.signbit(model(features(), by)))
    assert fast._fastconv_region._made <= 5  # a NaN is the same each time


@pytest.mark.parametrize("how", ["buffer", "attribute"])
def test_gradients_of_what_is_no_parameter(how: str) -> None:
    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 64, 3, padding=1).requires_grad_(False)
            delta = torch.zeros(1, 16, 1, 1, requires_grad=True)
            if how == "buffer":
                self.register_buffer("delta", delta)
            else:
                self.delta = delta

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x + self.delta))

    model = seeded(Shifts()).eval()
    fast = swap(model)
    assert not explain(fast).untraced
    x = torch.randn(2, 16, 32, 32)
    ours, theirs = (torch.autograd.grad(net(x).sum(), net.delta)[0] for net in (fast, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


class Twice(Appends):
    def forward(self, x: Tensor) -> Any:
        found = [torch.relu(self.conv(x))]
        return found, found


def test_a_container_that_is_returned_twice() -> None:
    one, two = swap(Twice())(features())
    assert one is two


# ------------------------------------------------------------------------------------------- parts of all kinds


class Goes(nn.Module):
    """Through its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.ReLU()])
        self.named = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 1), "act": nn.Identity()})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        for name, layer in self.named.items():
            x = layer(x) * len(name)
        return x


LAYERS = {
    "append": lambda net: net.layers.append(nn.Sigmoid()),
    "replace": lambda net: net.layers.__setitem__(1, nn.Tanh()),
    "delete": lambda net: net.layers.__delitem__(1),
    "other channels": lambda net: (net.layers.__setitem__(0, seeded(nn.Conv2d(8, 8, 3))), net.named.pop("conv")),
    "rename": lambda net: net.named.update({"activation": net.named.pop("act")}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_lists_that_change(name: str) -> None:
    model = seeded(Goes()).eval()
    fast = swap(model)
    assert not explain(fast).untraced
    with torch.no_grad():
        fast(features())
        for net in (fast, model):
            LAYERS[name](net)
        torch.testing.assert_close(fast(features()), model(features()), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda part: torch.jit.trace(part, features())])
def test_scripted_parts(compiled: Any) -> None:
    model = seeded(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), compiled(nn.Sequential(nn.Conv2d(8, 8, 1))))).eval()
    fast = swap(model)
    torch.testing.assert_close(fast(features()), model(features()), rtol=1e-4, atol=1e-5)
    assert str(explain(fast).rows[0].inference).startswith("conv + relu -> ")


class Hooked(nn.Module):
    """What a hook keeps is read by the forward around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.part = nn.Conv2d(8, 8, 1)
        self.kept, self.count = [], 0
        self.part.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output)
        self.count += 1

    def forward(self, x: Tensor) -> Any:
        self.kept.clear()
        x = self.part(self.first(x))
        return x * self.count, list(self.kept)


def test_hooks_that_the_forward_knows_of() -> None:
    model = seeded(Hooked()).eval()
    twin = copy.deepcopy(model)
    fast = swap(model)
    assert "hooks" in explain(fast).untraced[""]
    assert not explain(fast).untraced.keys() - {""}  # the other parts are traced
    for _ in range(3):
        torch.testing.assert_close(fast(features()), twin(features()), rtol=1e-4, atol=1e-5)


def test_classes_that_watch() -> None:
    """A registry of subclasses, a frozen class and one with slots of its own hear nothing of a swap."""
    known: list[str] = []

    class Registry(nn.Module):
        def __init_subclass__(cls, *, name: str, **more: Any) -> None:
            known.append(name)

    class Frozen(Registry, name="frozen"):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.ready = True

        def __setattr__(self, name: str, value: Any) -> None:
            if "ready" in vars(self):
                raise AttributeError(f"frozen: {name}")
            super().__setattr__(name, value)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x)) * (2 if type(self).__name__ == "Frozen" else 1)

    model = seeded(Frozen())
    fast = swap(model)
    assert known == ["frozen"]
    torch.testing.assert_close(fast(features()), model(features()), rtol=1e-4, atol=1e-5)
    assert isinstance(copy.deepcopy(fast), Frozen)


def circular(self: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias)


class Doubles(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class Refuses(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.shape[-1] == 12:
            raise ValueError("no")


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_that_compute_something_else(when: str) -> None:
    """A convolution patched for seamless images, a layer with a __call__ of its own, a norm with a check of its own."""

    def patch(net: nn.Module) -> None:
        net[0]._conv_forward = types.MethodType(circular, net[0])

    model = seeded(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), Doubles(8, 8, 1), nn.ReLU())).eval()
    if when == "before":
        patch(model)
    fast, twin = swap(model), copy.deepcopy(model)
    if when == "after":
        fast(features())
        for net in (fast, twin):
            patch(net)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(fast(features()), twin(features()), rtol=1e-4, atol=1e-5)
    refusing = swap(nn.Sequential(nn.Conv2d(8, 8, 1), Refuses(8)).eval())
    with torch.no_grad(), pytest.raises(ValueError, match="no"):
        refusing(features())


class Statistics(nn.Module):
    """Reads memory that something else writes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.register_buffer("st", torch.ones(2, 8, 12, 12))
        self.register_buffer("view", self.bn.running_var.view(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "norm":
            t = self.conv(x) + self.bn.running_mean[None, :, None, None]
            z = self.bn(x * 3 + 5)
            return torch.relu(t) + 0 * z
        if self.how == "argument":
            h = self.conv(x)
            self.st.mul_(0)
            return torch.relu(h)
        if self.how == "view":
            self.view.mul_(0.5)
        elif self.how == "foreach":
            torch._foreach_mul_([self.conv.weight.detach()], 0.5)
        else:
            F.batch_norm(x * 3 + 2, self.bn.running_mean, self.bn.running_var, training=True)
        return torch.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("how", ["norm", "argument", "view", "foreach", "batch_norm"])
def test_memory_that_a_forward_reads_and_writes(how: str, training: bool) -> None:
    model = seeded(Statistics(how)).train(training)
    twin = copy.deepcopy(model)
    fast = swap(model)
    with torch.no_grad():
        for _ in range(3):
            found, expected = (net(net.st if how == "argument" else features()) for net in (fast, twin))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

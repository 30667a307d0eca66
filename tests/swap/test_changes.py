"""A swapped model that is changed afterwards computes what eager computes after the same change."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastconv import swap
from support.swap_models import image, seeded


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU6()
        self.options = {"residual": True, "scales": [1]}

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x))
        if self.options["residual"]:
            h = h + x
        return self.finish(h) * self.options["scales"][0]

    def finish(self, h: Tensor) -> Tensor:
        return self.relu(h)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.block = Block()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.lrn = nn.LocalResponseNorm(3, 0.1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.twice = False

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        h = self.block(self.pool(F.relu(self.stem(x))))
        if self.twice:
            h = self.block(h)
        h = self.drop(self.lrn(F.relu(self.pointwise(self.depthwise(h)))))
        return self.head(h.mean((2, 3))) * scale


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 1.5


def _step(net: nn.Module) -> None:
    loss = net(image(2, 3, 8, 8, seed=5).to(next(net.parameters()).dtype)).square().mean()
    net.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad


CHANGES: dict[str, Callable[[Net], Any]] = {
    "weight_norm": lambda n: parametrizations.weight_norm(n.stem),
    "spectral_norm": lambda n: parametrizations.spectral_norm(n.block.first[0]),
    "orthogonal": lambda n: parametrizations.orthogonal(n.pointwise),
    "parametrization": lambda n: parametrize.register_parametrization(n.depthwise, "weight", Halved()),
    "parametrized bias": lambda n: parametrize.register_parametrization(n.block.second[0], "bias", Halved()),
    "parametrized batch norm": lambda n: parametrize.register_parametrization(n.block.second[1], "weight", Halved()),
    "old weight_norm": lambda n: torch.nn.utils.weight_norm(n.pointwise),
    "pruning": lambda n: prune.l1_unstructured(n.stem, "weight", 0.5),
    "pruned bias": lambda n: prune.l1_unstructured(n.block.first[0], "bias", 0.5),
    "no bias": lambda n: setattr(n.stem, "bias", None),
    "a bias": lambda n: setattr(n.depthwise, "bias", nn.Parameter(torch.ones(8, dtype=n.head.weight.dtype))),
    "no statistics": lambda n: (
        setattr(n.block.first[1], "running_mean", None),
        setattr(n.block.first[1], "running_var", None),
    ),
    "statistics": lambda n: n.block.second[1].running_var.mul_(2),
    "statistics of .data": lambda n: n.block.second[1].running_mean.data.add_(1),
    "no affine": lambda n: (setattr(n.block.second[1], "weight", None), setattr(n.block.second[1], "bias", None)),
    "eps": lambda n: setattr(n.block.first[1], "eps", 0.5),
    "padding mode": lambda n: (
        setattr(n.stem, "padding_mode", "circular"),
        setattr(n.stem, "_reversed_padding_repeated_twice", [1] * 4),
    ),
    "padding": lambda n: setattr(n.block.first[0], "padding", "same"),
    "stride": lambda n: setattr(n.depthwise, "stride", (2, 2)),
    "another pool": lambda n: setattr(n, "pool", nn.AvgPool2d(2)),
    "bounds of ReLU6": lambda n: setattr(n.block.relu, "max_val", 1.0),
    "in place": lambda n: setattr(n.block.relu, "inplace", True),
    "another activation": lambda n: setattr(n.block, "relu", nn.GELU()),
    "another conv": lambda n: setattr(n, "pointwise", seeded(nn.Conv2d(8, 8, 1), 3).to(n.head.weight.dtype)),
    "another batch norm": lambda n: n.block.first.__setitem__(1, nn.Identity()),
    "longer": lambda n: n.block.second.append(nn.ReLU()),
    "hook": lambda n: n.block.first[0].register_forward_hook(_hook),
    "hook of a block": lambda n: n.block.register_forward_hook(_hook),
    "hook before": lambda n: n.pointwise.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "patched conv": lambda n: setattr(
        n.stem, "forward", lambda x, m=n.stem: F.conv2d(x, m.weight, None, padding=1) * 2
    ),
    "patched block": lambda n: setattr(n.block, "forward", lambda x: x * 3),
    "patched method": lambda n: setattr(n.block, "finish", lambda h: h.tanh()),
    "option": lambda n: n.block.options.update(residual=False),
    "nested option": lambda n: n.block.options["scales"].__setitem__(0, 2),
    "flag": lambda n: setattr(n, "twice", True),
    "train": lambda n: n.train(),
    "eval": lambda n: n.eval(),
    "frozen batch norm": lambda n: (n.train(), n.block.first[1].eval()),
    "training batch norm": lambda n: (n.eval(), n.block.second[1].train()),
    "frozen": lambda n: n.stem.requires_grad_(False),
    "all frozen": lambda n: n.requires_grad_(False),
    "double": lambda n: n.double(),
    "channels_last": lambda n: n.to(memory_format=torch.channels_last),
    "step": _step,
    "weight of .data": lambda n: n.stem.weight.data.mul_(2),
    "new data": lambda n: setattr(n.stem.weight, "data", n.stem.weight.data.clone() * 2),
    "load": lambda n: n.load_state_dict(
        {k: v * 0.5 if v.is_floating_point() else v for k, v in n.state_dict().items()}
    ),
    "assigned": lambda n: n.load_state_dict(
        {k: v.clone() * 0.5 if v.is_floating_point() else v.clone() for k, v in n.state_dict().items()}, assign=True
    ),
}
FAILS_IN_EAGER = (RuntimeError, AttributeError, ValueError, TypeError, KeyError)


def outcome(net: nn.Module, x: Tensor, gradients: bool, **named: Any) -> dict[str, Any]:
    """What can be seen of a call, and of the gradients; or the kind of error."""
    x = x.to(net.head.weight.dtype).clone().requires_grad_(gradients)
    torch.manual_seed(0)
    net.zero_grad()
    try:
        with torch.set_grad_enabled(gradients):
            out = net(x, **named)
        seen = {"output": out}
        if out.requires_grad:
            torch.manual_seed(1)
            (out * torch.randn_like(out)).sum().backward()
            seen["input"] = x.grad
            seen |= {name: p.grad for name, p in net.named_parameters()}
    except FAILS_IN_EAGER as error:
        return {"error": type(error)}
    return seen | dict(net.named_buffers())


def assert_agree(got: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    assert got.keys() == expected.keys(), (what, expected.get("error"), got.get("error"))
    for name, value in expected.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            # float32's rounding, at the scale of the tensor: ReLUs may turn over what is nearly zero
            scale = max(1.0, float(value.detach().abs().max()))
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4 * scale, msg=f"{what}: {name}")
        else:
            assert torch.equal(got[name], value) if isinstance(value, Tensor) else got[name] == value, (what, name)


def model_of(seed: int = 0) -> Net:
    return seeded(Net(), seed).eval()


calls = st.tuples(st.booleans(), st.sampled_from([{}, {"scale": 2.0}]), st.integers(1, 3))


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), calls), min_size=1, max_size=4), calls | st.none())
def test_random_changes(changes: list[tuple[str, Any]], warm_up: Any) -> None:
    """Whatever is done to a model after the swap, in any order, called in between or not."""
    twin, fast = model_of().double(), swap(model_of().double())
    for name, call in [("nothing", warm_up), *changes]:
        what = " -> ".join(["nothing", *(change for change, _ in changes)])
        if name != "nothing":
            failures = []
            for net in (twin, fast):
                torch.manual_seed(2)
                try:
                    CHANGES[name](net)
                except FAILS_IN_EAGER as error:  # parametrized twice, say
                    failures.append(type(error))
            assert len(failures) in (0, 2), (what, failures)
        if call is not None:
            gradients, named, times = call
            for _ in range(times):
                x = image(2, 3, 8, 8)
                assert_agree(
                    outcome(fast, x, gradients, **named), outcome(twin, x, gradients, **named), f"{what} at {name}"
                )


@pytest.mark.parametrize("called", [False, True], ids=["never called", "called before"])
@pytest.mark.parametrize("name", CHANGES)
def test_each_change(name: str, called: bool) -> None:
    """In float32, where convolutions are prepared: each change alone, before and after a warm-up."""
    twin, fast = model_of(), swap(model_of())
    x = image(2, 3, 8, 8)
    for _ in range(2 * called):
        assert_agree(outcome(fast, x, False), outcome(twin, x, False), "before")
    for net in (twin, fast):
        torch.manual_seed(2)
        CHANGES[name](net)
    for gradients in (False, False, True):
        assert_agree(outcome(fast, x, gradients), outcome(twin, x, gradients), name)


def test_functional_call_and_threads() -> None:
    """Other weights for one call, and calls from several threads at once."""
    twin, fast = model_of(), swap(model_of())
    x = image(2, 3, 8, 8)
    other = {name: value * 0.5 for name, value in twin.named_parameters()}
    for _ in range(3):
        expected = torch.func.functional_call(twin, other, (x,))
        torch.testing.assert_close(torch.func.functional_call(fast, other, (x,)), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-5)

    fresh, results = swap(model_of()), []

    def call(gradients: bool) -> None:
        for _ in range(10):
            results.append(outcome_of_thread(fresh, x, gradients))

    def outcome_of_thread(net: nn.Module, x: Tensor, gradients: bool) -> Tensor:
        with torch.set_grad_enabled(gradients):
            return net(x).detach()

    threads = [threading.Thread(target=call, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    for result in results:
        torch.testing.assert_close(result, twin(x).detach(), rtol=1e-4, atol=1e-5)


class _Odd:
    """With a reference to a module, which no copy of the model should follow."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def test_unusual_attributes_survive_copies(tmp_path: Any) -> None:
    """A swapped model that holds them is copied and saved where the original is."""
    model = model_of()
    model.note = {"weak": None, "odd": _Odd(model.stem), "fn": F.relu, "nested": [model.block, {"b": model.block}]}
    fast = swap(model)
    assert fast.note["nested"][0] is fast.block
    assert fast.note["nested"][1]["b"] is fast.block
    assert model.note["nested"][0] is model.block
    x = image(2, 3, 8, 8)
    expected = model(x)
    clone = copy.deepcopy(fast)
    torch.testing.assert_close(clone(x), expected, rtol=1e-4, atol=1e-5)
    assert clone.note["nested"][0] is clone.block
    torch.save(fast, tmp_path / "fast.pt")
    loaded = torch.load(tmp_path / "fast.pt", weights_only=False)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    for attribute in (threading.Lock(), weakref.ref(model), (n for n in range(3)), open(__file__)):  # noqa: SIM115
        model.note = attribute
        held = swap(model)
        assert held.note is attribute
        torch.testing.assert_close(held(x), expected, rtol=1e-4, atol=1e-5)

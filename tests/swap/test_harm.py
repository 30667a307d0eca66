"""fastconv.swap must never harm: whatever a forward does besides computing, it goes on doing, and nothing is lost."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import inspect
import itertools
import logging
import os
import time
import types
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from fastconv import explain, swap
from support.swap_models import Acting, features, seeded

# ------------------------------------------------------------------------------------------------- side effects


COUNT, LOG = 0, []


def helper(h: Tensor) -> Tensor:
    return h * 2


class Settings:
    calls = 0


def counts_globally(s: Acting, h: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return h * COUNT


def counts_in_a_closure() -> Any:
    count = 0

    def act(s: Acting, h: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return h * count

    return act


def remembers_in_a_closure() -> Any:
    seen: list[Tensor] = []

    def act(s: Acting, h: Tensor) -> Tensor:
        seen.append(h)
        return h * len(seen)

    return act


def remembers_in_a_default() -> Any:
    def act(s: Acting, h: Tensor, seen: list[Tensor] = []) -> Tensor:  # noqa: B006
        seen.append(h)
        return h * len(seen)

    return act


def caches(s: Acting, h: Tensor) -> Tensor:
    if "k" not in s.cache:
        s.cache["k"] = s.b * 2
    return h * s.cache["k"]


def counts_in_a_class(s: Acting, h: Tensor) -> Tensor:
    Settings.calls += 1
    return h * Settings.calls


def stops_the_time(s: Acting, h: Tensor) -> Tensor:
    s.times.append(time.perf_counter())
    return h


def counts_in_an_object(s: Acting, h: Tensor) -> Tensor:
    s.state.n += 1
    return h * s.state.n


def counts_in_a_function(s: Acting, h: Tensor) -> Tensor:
    helper.calls = getattr(helper, "calls", 0) + 1
    return helper(h)


def imports(s: Acting, h: Tensor) -> Tensor:
    from support import swap_models

    return h * len(swap_models.__name__)


def in_evaluation(s: Acting, h: Tensor) -> Tensor:
    mode = s.norm.training
    s.norm.eval()
    h = s.norm(h)
    s.norm.train(mode)
    return h


def in_evaluation_by_attribute(s: Acting, h: Tensor) -> Tensor:
    s.norm.training = False
    h = s.norm(h)
    s.norm.training = True
    return h


def hooks(s: Acting, h: Tensor) -> Tensor:
    handle = s.conv.register_forward_hook(lambda module, args, output: output * 3)
    h = s.conv(h)
    handle.remove()
    return h


def limits_a_norm(s: Acting, h: Tensor) -> Tensor:
    s.conv.weight.data = torch.renorm(s.conv.weight.data, p=2, dim=0, maxnorm=0.1)
    return s.conv(h)


def clamps_a_weight(s: Acting, h: Tensor) -> Tensor:
    s.conv.weight.data.clamp_(-0.01, 0.01)
    return s.conv(h)


def halves_the_weights(s: Acting, h: Tensor) -> Tensor:
    for parameter in s.conv.parameters():
        parameter.data *= 0.5
    return s.conv(h)


def notes_on_a_value(s: Acting, h: Tensor) -> Tensor:
    h.note = 1
    return h


@functools.lru_cache(None)
def kept(n: int) -> int:
    return n * COUNT


def exchanges_weights(s: Acting, h: Tensor) -> Tensor:
    return torch.func.functional_call(s.conv, s.weights, (h,))


class Quiet:
    def __enter__(self) -> None:
        print("entered")

    def __exit__(self, *_: object) -> bool:
        print("left")
        return True


def quietly(s: Acting, h: Tensor) -> Tensor:
    with Quiet():
        h = h.view(3, 5, 7)
    return h * 2


@contextlib.contextmanager
def between() -> Any:
    print("entered")
    yield
    print("left")


def between_prints(s: Acting, h: Tensor) -> Tensor:
    with between():
        return h * 2 if torch.is_grad_enabled() else h


def prints_finally(s: Acting, h: Tensor) -> Tensor:
    try:
        return h * 2 if torch.is_grad_enabled() else h
    finally:
        print("left")


def returns_finally(s: Acting, h: Tensor) -> Tensor:
    try:
        if h.sum() > 0:
            h = h * 2
    finally:
        return h  # noqa: B012


def forgets_refusals(s: Acting, h: Tensor) -> Tensor:
    """A refusal that code of torch's own catches still counts."""
    outputs: list[bool] = []
    with contextlib.ExitStack() as stack:
        stack.push(lambda *_: True)
        outputs.append(bool(h.sum() > 0))
    return h * (2 + len(outputs))


class Slots:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = [0]


def logs(s: Acting, h: Tensor) -> Tensor:
    logging.getLogger(__name__).warning("called")
    return h


def writes_a_tensor(s: Acting, h: Tensor) -> Tensor:
    s.total.add_(1)
    return h * s.total


# What the forward does, the state that it has, and a word of the reason.
SIDE_EFFECTS = {
    "dict and list": (lambda s, h: (s.saved.update(h=h), s.log.append(h), h)[-1], {"saved": {}, "log": []}, "changes"),
    "nested": (lambda s, h: (s.saved["a"][0].append(h), h)[-1], {"saved": {"a": ([], 1)}}, "the attribute saved"),
    "set": (lambda s, h: (s.names.add("called"), h)[-1], {"names": set()}, "the attribute names"),
    "defaultdict": (
        lambda s, h: (s.seen["x"].append(h), h)[-1],
        {"seen": collections.defaultdict(list)},
        "the attribute seen",
    ),
    "deque": (lambda s, h: (s.last.append(h), h)[-1], {"last": collections.deque(maxlen=2)}, "the attribute last"),
    "cache": (caches, {"cache": {}}, "the attribute cache"),
    "OrderedDict": (lambda s, h: (s.cache.update(h=h), h)[-1], {"cache": OrderedDict(a=1)}, "the attribute cache"),
    "array": (lambda s, h: (s.n.__iadd__(1), h)[-1], {"n": np.zeros(2)}, "the attribute n"),
    "slots": (lambda s, h: (s.state.n.append(1), h)[-1], {"state": Slots()}, "the attribute state"),
    "attribute": (lambda s, h: (setattr(s, "h", h), h)[-1], {}, "calls setattr"),
    "object": (counts_in_an_object, {"state": types.SimpleNamespace(n=0)}, "writes the attribute n"),
    "__dict__": (lambda s, h: (s.__dict__["log"].append(h), h)[-1], {"log": []}, "uses __dict__"),
    "submodules": (
        lambda s, h: (s.parts.clear(), h)[-1],
        {"parts": nn.ModuleDict({"act": nn.ReLU()})},
        "attributes of the modules: act",
    ),
    "buffers": (
        lambda s, h: (s._buffers.update(st=s.st + 1), h * s.st)[-1],
        {"st": nn.Buffer(torch.zeros(1))},
        "uses _buffers",
    ),
    "partial": (lambda s, h: (s.p(), h)[-1], {"p": functools.partial(print, "called")}, "a partial print"),
    "map": (lambda s, h: (list(map(print, ["called"])), h)[-1], {}, "passes print on"),
    "cached": (lambda s, h: h * kept(2), {}, "a function that keeps its results"),
    "other weights": (exchanges_weights, {"weights": {"bias": torch.ones(8)}}, "functional_call"),
    "mode": (in_evaluation, {"norm": nn.BatchNorm2d(8)}, "changes a module (eval)"),
    "mode as attribute": (in_evaluation_by_attribute, {"norm": nn.BatchNorm2d(8)}, "writes the attribute training"),
    "hook": (hooks, {}, "changes a module (register_forward_hook)"),
    "max norm": (limits_a_norm, {}, "writes the attribute data"),
    "clamped weight": (clamps_a_weight, {}, "writes conv.weight"),
    "weights": (halves_the_weights, {}, "writes the attribute data"),
    "note": (notes_on_a_value, {}, "writes the attribute note"),
    "function": (counts_in_a_function, {}, "writes the attribute calls"),
    "import": (imports, {}, "imports support"),
    "context manager": (quietly, {}, "a context manager of its own"),
    "generator as context": (between_prints, {}, "a context manager of its own"),
    "finally": (prints_finally, {}, "handles exceptions"),
    "return in finally": (returns_finally, {}, "handles exceptions"),
    "exit stack": (forgets_refusals, {}, "a value that is computed"),
    "iterator": (lambda s, h: h * next(s.numbers), {"numbers": itertools.count(1)}, "the attribute numbers"),
    "global": (counts_globally, {}, "the global COUNT"),
    "list of the module": (lambda s, h: (LOG.append(h), h)[-1], {}, "the global LOG"),
    "closure": (counts_in_a_closure, {}, "enclosing function"),
    "list of a closure": (remembers_in_a_closure, {}, "enclosing function"),
    "default argument": (remembers_in_a_default, {}, "a default argument"),
    "class": (counts_in_a_class, {}, "writes the attribute calls"),
    "print": (lambda s, h: (print("called"), h)[-1], {}, "calls print"),
    "log": (logs, {}, "uses logging"),
    "time": (stops_the_time, {"times": []}, "calls time"),
    "environment": (lambda s, h: h * float(os.environ.get("HOME", "") != ""), {}, "uses os"),
    "files": (lambda s, h: (open(os.devnull).close(), h)[-1], {}, "calls"),
    "tensor": (writes_a_tensor, {"total": torch.zeros(())}, "writes a tensor"),
    "grad mode": (lambda s, h: h * 2 if torch.is_grad_enabled() else h, {}, "is_grad_enabled"),
    "deterministic": (
        lambda s, h: h * 2 if torch.backends.cudnn.deterministic else h,
        {},
        "torch.backends",
    ),
    "default dtype": (lambda s, h: h * 2 if torch.get_default_dtype() == torch.float32 else h, {}, "default_dtype"),
    "parameters": (lambda s, h: h.to(next(s.parameters()).dtype), {}, "calls next"),
    "exception": (lambda s, h: _handles(h), {}, "handles exceptions"),
    "any exception": (lambda s, h: _handles_all(h), {}, "handles exceptions"),
}


def _handles(h: Tensor) -> Tensor:
    try:
        return h.view(3, 5, 7)
    except RuntimeError:
        return h * 2


def _handles_all(h: Tensor) -> Tensor:
    with torch.autograd.profiler.record_function("h"):
        try:
            return h.view(3, 5, 7)
        except:  # noqa: E722
            return h * 2


def content(value: Any) -> Any:
    """What a container or an object holds, down to plain values, tensors by their numbers."""
    if isinstance(value, Tensor):
        assert not isinstance(value, fx.Proxy)
        return tuple(value.shape), value.double().sum().item()
    if isinstance(value, dict):
        return type(value), [(key, content(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set, collections.deque)):
        return type(value), [content(item) for item in value]
    if isinstance(value, types.SimpleNamespace):
        return content(vars(value))
    if isinstance(value, Slots):
        return value.n
    if isinstance(value, (itertools.count, np.ndarray)):
        return repr(value)
    return value if isinstance(value, (int, float, str, type(None))) else type(value)


def state_of(net: nn.Module) -> Any:
    return {name: content(value) for name, value in vars(net).items() if not name.startswith("_fastconv")}


def world() -> Any:
    return COUNT, content(LOG), Settings.calls, getattr(helper, "calls", 0)


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_side_effects(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing happens at the swap; afterwards all of it, in the copy as in eager; and the parts are swapped."""
    act, state, reason = SIDE_EFFECTS[name]
    makes = not inspect.signature(act).parameters  # an act, with state of its own
    model = seeded(Acting(act() if makes else act, copy.deepcopy(state))).eval()
    before, around = state_of(model), world()
    fast = swap(model)
    explanation = explain(fast)
    assert reason in explanation.untraced[""], explanation.untraced
    assert (state_of(model), state_of(fast), world()) == (before, before, around)
    assert capsys.readouterr() == ("", "")
    assert [row.module for row in explanation.rows] == ["conv"]

    twin = copy.deepcopy(model)
    twin.act = act() if makes else act
    for gradients in (False, True, True):
        with torch.set_grad_enabled(gradients):
            _reset_world()
            expected = twin(features())
            after = world()
            _reset_world()
            got = fast(features())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert world() == after
        assert state_of(fast).keys() == state_of(twin).keys()
        if name != "time":
            assert rounded(state_of(fast)) == rounded(state_of(twin))
    if gradients and got.requires_grad:
        for net, out in ((fast, got), (twin, expected)):
            net.zero_grad()
            out.sum().backward()
        assert (fast.b.grad is None) == (twin.b.grad is None)


def _reset_world() -> None:
    global COUNT
    COUNT, Settings.calls, helper.calls = 0, 0, 0
    LOG.clear()


def rounded(state: Any) -> Any:
    """Of sums of tensors, what does not depend on the order of summing."""
    if isinstance(state, dict):
        return {name: rounded(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [rounded(value) for value in state]
    return pytest.approx(state, rel=1e-3, abs=1e-2) if isinstance(state, float) else state

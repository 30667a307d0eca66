"""fastconv.swap must never harm: whatever a forward does besides computing, it goes on doing, and nothing is lost."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import inspect
import itertools
import json
import logging
import os
import subprocess
import sys
import time
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from swap_calls import Reverse
from swap_models import features, seeded
from torch import Tensor, fx, nn

from fastconv import explain, swap

# ------------------------------------------------------------------------------------------ traced values in C++


@pytest.mark.slow
def test_every_function_of_a_traced_value() -> None:
    """Indexing, constructors, in-place and factory functions: traced and as eager, or not traced, with a reason."""
    script = Path(__file__).parent / "swap_calls.py"
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, f"{lines[-1]}\n{ran.stderr[-2000:]}"
    decoder = json.JSONDecoder()
    outcomes = {}
    for line in lines:
        name, end = decoder.raw_decode(line)
        outcomes[name] = json.loads(line[end:])
    assert len(outcomes) > 2000
    differing = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome.startswith("differs")]
    assert not differing, "\n".join(differing)
    assert "" not in outcomes.values()
    # Not by leaving everything alone.
    traced = {name for name, outcome in outcomes.items() if outcome == "traced"}
    assert traced >= {"Reverse", "Pair", "[slice]", "torch.relu", "F.gelu", ".flatten()", "operator.neg", "matmul"}


# ------------------------------------------------------------------------------------------------- side effects


class Net(nn.Module):
    """A part that can be swapped, and whatever else the forward does."""

    def __init__(self, act: Any, state: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.b = nn.Parameter(torch.ones(8, 1, 1))
        self.act = act
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.act(self, self.relu(self.conv(x)))


FLAG, COUNT, LOG = True, 0, []
CONFIG = {"scale": 2}


class Settings:
    scale = 2
    calls = 0


def counts_globally(s: Net, h: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return h * COUNT


def counts_in_a_closure() -> Any:
    count = 0

    def act(s: Net, h: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return h * count

    return act


def remembers_in_a_closure() -> Any:
    seen: list[Tensor] = []

    def act(s: Net, h: Tensor) -> Tensor:
        seen.append(h)
        return h * len(seen)

    return act


def remembers_in_a_default() -> Any:
    def act(s: Net, h: Tensor, seen: list[Tensor] = []) -> Tensor:  # noqa: B006
        seen.append(h)
        return h * len(seen)

    return act


def caches(s: Net, h: Tensor) -> Tensor:
    if "k" not in s.cache:
        s.cache["k"] = s.b * 2
    return h * s.cache["k"]


def counts_in_a_class(s: Net, h: Tensor) -> Tensor:
    Settings.calls += 1
    return h * Settings.calls


def stops_the_time(s: Net, h: Tensor) -> Tensor:
    s.times.append(time.perf_counter())
    return h


def counts_in_an_object(s: Net, h: Tensor) -> Tensor:
    s.state.n += 1
    return h * s.state.n


def logs(s: Net, h: Tensor) -> Tensor:
    logging.getLogger(__name__).warning("called")
    return h


def writes_a_tensor(s: Net, h: Tensor) -> Tensor:
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
    "attribute": (lambda s, h: (setattr(s, "h", h), h)[-1], {}, "changes attributes"),
    "object": (counts_in_an_object, {"state": types.SimpleNamespace(n=0)}, "the attribute state"),
    "iterator": (lambda s, h: h * next(s.numbers), {"numbers": itertools.count(1)}, "the attribute numbers"),
    "global": (counts_globally, {}, "the global COUNT"),
    "list of the module": (lambda s, h: (LOG.append(h), h)[-1], {}, "the global LOG"),
    "closure": (counts_in_a_closure, {}, "enclosing function"),
    "list of a closure": (remembers_in_a_closure, {}, "enclosing function"),
    "default argument": (remembers_in_a_default, {}, "a default argument"),
    "class": (counts_in_a_class, {}, "Settings.calls"),
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
    "default dtype": (lambda s, h: h * 2 if torch.get_default_dtype() is torch.float32 else h, {}, "default_dtype"),
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
    if isinstance(value, itertools.count):
        return repr(value)
    return value if isinstance(value, (int, float, str, type(None))) else type(value)


def state_of(net: nn.Module) -> Any:
    return {name: content(value) for name, value in vars(net).items() if not name.startswith("_fastconv")}


def world() -> Any:
    return FLAG, COUNT, content(LOG), content(CONFIG), Settings.scale, Settings.calls


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_side_effects(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing happens at the swap; afterwards all of it, in the copy as in eager; and the parts are swapped."""
    act, state, reason = SIDE_EFFECTS[name]
    makes = not inspect.signature(act).parameters  # an act, with state of its own
    model = seeded(Net(act() if makes else act, copy.deepcopy(state))).eval()
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
        if name != "time":
            assert world() == after
            assert state_of(fast).keys() == state_of(twin).keys()
    if gradients and got.requires_grad:
        for net, out in ((fast, got), (twin, expected)):
            net.zero_grad()
            out.sum().backward()
        assert (fast.b.grad is None) == (twin.b.grad is None)


def _reset_world() -> None:
    global COUNT
    COUNT, Settings.calls = 0, 0
    LOG.clear()


# --------------------------------------------------------------------------------- content that counts, and changes


def _set_flag(value: bool) -> None:
    global FLAG
    FLAG = value


# A forward that reads something, its state, and what changes it.
READS = {
    "dict": (
        lambda s, h: h * 2 if s.flag["skip"] else h,
        {"flag": {"skip": False}},
        lambda s: s.flag.update(skip=True),
    ),
    "list": (lambda s, h: sum([h] * s.l[0]), {"l": [2]}, lambda s: s.l.__setitem__(0, 3)),
    "object": (
        lambda s, h: h * s.state.n,
        {"state": types.SimpleNamespace(n=2)},
        lambda s: setattr(s.state, "n", 3),
    ),
    "getattr": (lambda s, h: h * getattr(s, "fl" + "ag")["n"], {"flag": {"n": 2}}, lambda s: s.flag.update(n=3)),
    "attribute": (lambda s, h: h * s.n, {"n": 2}, lambda s: setattr(s, "n", 3)),
    "new attribute": (lambda s, h: h * (3 if hasattr(s, "n") else 2), {}, lambda s: setattr(s, "n", 3)),
    "global": (lambda s, h: h * 2 if FLAG else h, {}, lambda s: _set_flag(False)),
    "global dict": (lambda s, h: h * CONFIG["scale"], {}, lambda s: CONFIG.update(scale=3)),
    "class": (lambda s, h: h * Settings.scale, {}, lambda s: setattr(Settings, "scale", 3)),
    "helper": (lambda s, h: helper(h), {}, lambda s: globals().update(helper=lambda h: h * 3)),
    "module of Python": (
        lambda s, h: h * 2 if sys.modules[__name__].FLAG else h,
        {},
        lambda s: _set_flag(False),
    ),
    "method": (lambda s, h: s.scaled(h), {}, lambda s: setattr(s, "scaled", lambda h: h * 3)),
}


def helper(h: Tensor) -> Tensor:
    return h * 2


class Scaled(Net):
    def scaled(self, h: Tensor) -> Tensor:
        return h * 2


@pytest.mark.parametrize("name", READS)
def test_content_is_read_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, state, change = READS[name]
    monkeypatch.setattr(Settings, "scale", 2)
    monkeypatch.setitem(CONFIG, "scale", 2)
    monkeypatch.setitem(globals(), "FLAG", True)
    monkeypatch.setitem(globals(), "helper", helper)
    fast = swap(seeded(Scaled(act, copy.deepcopy(state))).eval())
    twin = copy.deepcopy(fast)
    for module in twin.modules():
        module.__class__ = getattr(type(module), "fastconv_plain_class", type(module))
    for changes in (False, True):
        if changes:
            change(fast)
            change(twin)
        for gradients in (False, False, True):
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(fast(features()), twin(features()), rtol=1e-4, atol=1e-5)


def test_programs_come_back_for_content_that_was_seen() -> None:
    """Not left alone because of a dict: traced for each content."""
    act, state, change = READS["dict"]
    fast = swap(seeded(Net(act, copy.deepcopy(state))).eval())
    assert not explain(fast).untraced
    change(fast)
    assert not explain(fast).untraced


def test_a_forward_that_fails_is_not_traced_for_ever() -> None:
    calls = []

    def act(s: Net, h: Tensor) -> Tensor:
        calls.append(isinstance(h, fx.Proxy))
        s.n += 1
        return h

    fast = swap(seeded(Net(act, {"n": 0})).eval())
    for _ in range(20):
        fast(features())
    assert fast.n == 20
    assert not any(calls)  # `calls` is a variable of an enclosing function, and put back


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
    model = seeded(Net(RETURNS[name], {})).eval()
    fast = swap(model)
    for training in (False, True):
        model.train(training)
        fast.train(training)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                assert structure(fast(features())) == structure(model(features()))


def test_ordered_dicts_are_traced() -> None:
    """What torchvision's segmentation models return."""
    explanation = explain(seeded(Net(RETURNS["OrderedDict"], {})).eval())
    assert not explanation.untraced
    assert str(explanation.rows[0].inference) == "conv + relu -> conv2d_relu"


def test_a_backward_of_the_users_own() -> None:
    model = seeded(Net(lambda s, h: F.relu(s.conv(Reverse.apply(h))), {})).eval()
    fast = swap(model)
    assert not explain(fast).untraced
    grads = []
    for net in (model, fast):
        x = features().requires_grad_()
        net(x).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- not a module

NOT_MODULES = {
    "None": (None, "got NoneType, needed a torch.nn.Module; pass the model itself"),
    "tensor": (torch.ones(2), "got Tensor, needed"),
    "class": (nn.Conv2d, "got the class Conv2d, needed a torch.nn.Module; make a module of it: Conv2d(...)"),
    "function": (helper, "got function helper, needed a torch.nn.Module; put what it computes into the forward"),
    "builtin": (torch.relu, "got builtin_function_or_method relu, needed"),
    "partial": (functools.partial(helper), "got partial, needed"),
    "list": ([nn.ReLU()], "got list, needed"),
    "state_dict": (nn.Conv2d(1, 1, 1).state_dict(), "got OrderedDict, needed"),
}


@pytest.mark.parametrize("name", NOT_MODULES)
@pytest.mark.parametrize("function", [swap, explain])
def test_what_is_not_a_module(function: Any, name: str) -> None:
    value, message = NOT_MODULES[name]
    with pytest.raises(TypeError) as caught:
        function(value)
    assert str(caught.value).startswith(f"fastconv.{function.__name__}: {message}")


# ------------------------------------------------------------------------------------- while other things go on


@pytest.mark.parametrize("profiler", ["none", "function", "cProfile"])
def test_profilers_go_on(profiler: str) -> None:
    import cProfile

    events = []

    def note(*args: Any) -> None:
        events.append(args[1])

    profile = cProfile.Profile()
    if profiler == "function":
        sys.setprofile(note)
    elif profiler == "cProfile":
        profile.enable()
    try:
        fast = swap(seeded(Net(lambda s, h: h, {})).eval())
        assert (sys.getprofile() is note) == (profiler == "function")
        seen = len(events)
        helper(torch.ones(1))
        assert (len(events) > seen) == (profiler == "function")
    finally:
        sys.setprofile(None)
        profile.disable()
    assert fast(features()).shape == (2, 8, 12, 12)
    assert not explain(fast).untraced  # also where it had to wait for the profiler's end
    if profiler == "cProfile":
        assert any("helper" in str(entry.code) for entry in profile.getstats())
    assert "type" not in globals()

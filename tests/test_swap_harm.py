"""fastconv.swap must never harm: whatever a forward does besides computing, it goes on doing, and nothing is lost."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import json
import logging
import operator
import os
import random
import subprocess
import sys
import threading
import time
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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


def counts_in_a_function(s: Net, h: Tensor) -> Tensor:
    helper.calls = getattr(helper, "calls", 0) + 1
    return helper(h)


def imports(s: Net, h: Tensor) -> Tensor:
    import swap_models

    return h * len(swap_models.__name__)


def in_evaluation(s: Net, h: Tensor) -> Tensor:
    mode = s.norm.training
    s.norm.eval()
    h = s.norm(h)
    s.norm.train(mode)
    return h


def in_evaluation_by_attribute(s: Net, h: Tensor) -> Tensor:
    s.norm.training = False
    h = s.norm(h)
    s.norm.training = True
    return h


def hooks(s: Net, h: Tensor) -> Tensor:
    handle = s.conv.register_forward_hook(lambda module, args, output: output * 3)
    h = s.conv(h)
    handle.remove()
    return h


def limits_a_norm(s: Net, h: Tensor) -> Tensor:
    s.conv.weight.data = torch.renorm(s.conv.weight.data, p=2, dim=0, maxnorm=0.1)
    return s.conv(h)


def clamps_a_weight(s: Net, h: Tensor) -> Tensor:
    s.conv.weight.data.clamp_(-0.01, 0.01)
    return s.conv(h)


def halves_the_weights(s: Net, h: Tensor) -> Tensor:
    for parameter in s.conv.parameters():
        parameter.data *= 0.5
    return s.conv(h)


def notes_on_a_value(s: Net, h: Tensor) -> Tensor:
    h.note = 1
    return h


@functools.lru_cache(None)
def kept(n: int) -> int:
    return n * COUNT


def exchanges_weights(s: Net, h: Tensor) -> Tensor:
    return torch.func.functional_call(s.conv, s.weights, (h,))


class Quiet:
    def __enter__(self) -> None:
        print("entered")

    def __exit__(self, *_: object) -> bool:
        print("left")
        return True


def quietly(s: Net, h: Tensor) -> Tensor:
    with Quiet():
        h = h.view(3, 5, 7)
    return h * 2


@contextlib.contextmanager
def between() -> Any:
    print("entered")
    yield
    print("left")


def between_prints(s: Net, h: Tensor) -> Tensor:
    with between():
        return h * 2 if torch.is_grad_enabled() else h


def prints_finally(s: Net, h: Tensor) -> Tensor:
    try:
        return h * 2 if torch.is_grad_enabled() else h
    finally:
        print("left")


def returns_finally(s: Net, h: Tensor) -> Tensor:
    try:
        if h.sum() > 0:
            h = h * 2
    finally:
        return h  # noqa: B012


def forgets_refusals(s: Net, h: Tensor) -> Tensor:
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
    "import": (imports, {}, "imports swap_models"),
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
    return FLAG, COUNT, content(LOG), content(CONFIG), Settings.scale, Settings.calls, getattr(helper, "calls", 0)


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


# What is set for the whole process, and what tells of it.
PROCESS = {
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "determinism": (lambda: torch.use_deterministic_algorithms(True), torch.are_deterministic_algorithms_enabled),
    "precision": (lambda: torch.set_float32_matmul_precision("high"), torch.get_float32_matmul_precision),
    "print options": (lambda: torch.set_printoptions(precision=2), lambda: torch._tensor_str.PRINT_OPTS.precision),
    "grad mode": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "seed": (lambda: torch.manual_seed(3), torch.initial_seed),
}


@pytest.mark.parametrize("name", PROCESS)
def test_the_state_of_the_process(name: str) -> None:
    """Neither set by a swap nor frozen in a graph."""
    sets, tells = PROCESS[name]
    before = tells()
    fast = swap(seeded(Net(lambda s, h: (sets(), h)[-1], {})).eval())
    assert explain(fast).untraced[""]
    assert tells() == before
    if name == "determinism":
        assert "are_deterministic" in explain(Net(lambda s, h: h * tells(), {})).untraced[""]


def test_gradients_that_are_asked_for() -> None:
    """Parameters keep requires_grad and grad, whatever a forward would do to them."""
    for change in (
        lambda s: s.conv.requires_grad_(False),
        lambda s: s.zero_grad(),
        lambda s: s.b.requires_grad_(False),
    ):
        model = seeded(Net(lambda s, h, change=change: (change(s), h)[-1], {})).eval()
        model.conv.weight.grad = torch.ones_like(model.conv.weight)
        explain(swap(model))
        assert model.conv.weight.requires_grad
        assert model.b.requires_grad
        assert model.conv.weight.grad is not None


# --------------------------------------------------------------------------------- content that counts, and changes


def _set_flag(value: bool) -> None:
    global FLAG
    FLAG = value


def helper(h: Tensor) -> Tensor:
    return h * 2


def times(h: Tensor, by: dict[str, int]) -> Tensor:
    return h * by["n"]


class Base:
    scale = 2

    @classmethod
    def default(cls) -> int:
        return cls.scale


class Derived(Base):
    class Inner:
        scale = 2

    def by_scale(self, h: Tensor) -> Tensor:
        return h * self.scale


class Own(Base):
    def __init__(self) -> None:
        self.n = 2

    def by_n(self, h: Tensor) -> Tensor:
        return h * self.n


DERIVED = Derived()


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
    "method of the class": (
        lambda s, h: s.scaled(h),
        {},
        lambda s: setattr(Scaled, "scaled", lambda self, h: h * 3),
    ),
    "base class": (lambda s, h: h * Derived.scale, {}, lambda s: setattr(Base, "scale", 3)),
    "class attribute of an object": (lambda s, h: h * DERIVED.scale, {}, lambda s: setattr(Base, "scale", 3)),
    "class attribute in a method": (lambda s, h: DERIVED.by_scale(h), {}, lambda s: setattr(Derived, "scale", 3)),
    "class method": (lambda s, h: h * Base.default(), {}, lambda s: setattr(Base, "scale", 3)),
    "nested class": (lambda s, h: h * Derived.Inner.scale, {}, lambda s: setattr(Derived.Inner, "scale", 3)),
    "class of the module": (lambda s, h: h * s.factor, {}, lambda s: setattr(Scaled, "factor", 3)),
    "bound method": (lambda s, h: s.f(h), {"f": Own().by_n}, lambda s: setattr(s.f.__self__, "n", 3)),
    "partial": (
        lambda s, h: s.f(h),
        {"f": functools.partial(times, by={"n": 2})},
        lambda s: s.f.keywords["by"].update(n=3),
    ),
    "attribute of a function": (lambda s, h: h * helper.by, {}, lambda s: setattr(helper, "by", 3)),
    "attribute of a layer": (lambda s, h: h * s.drop.p, {"drop": nn.Dropout(0.5)}, lambda s: setattr(s.drop, "p", 0.9)),
    "numbers of a tensor": (
        lambda s, h: h * (2 if torch.allclose(s.t, torch.zeros(2)) else 3),
        {"t": torch.zeros(2)},
        lambda s: s.t.add_(1),
    ),
    "how many are not zero": (lambda s, h: h * len(s.t.nonzero()), {"t": torch.ones(2)}, lambda s: s.t[0].zero_()),
    "parameters": (
        lambda s, h: h * len([p for p in s.parameters() if p.requires_grad]),
        {},
        lambda s: s.requires_grad_(False),
    ),
    "attrgetter": (lambda s, h: h * operator.attrgetter("l")(s)[0], {"l": [2]}, lambda s: s.l.__setitem__(0, 3)),
    # These depend on a traced value itself, in ways that Python answers without asking it.
    "callable": (lambda s, h: h * 2 if callable(h) else h, {}, lambda s: None),
    "weights of attention": (
        lambda s, h: h * (2 if s.attention(*[h.flatten(2)] * 3, need_weights=False)[1] is None else 1),
        {"attention": nn.MultiheadAttention(144, 2)},
        lambda s: None,
    ),
    "shape in a set": (lambda s, h: h * 2 if h.shape[2] in {12, 13} else h, {}, lambda s: None),
    "type as a key": (lambda s, h: h * {torch.float32: 3.0}.get(h.dtype, 1.0), {}, lambda s: None),
    "which type": (lambda s, h: h * 2 if h.dtype is torch.float32 else h, {}, lambda s: None),
    "no gradient": (lambda s, h: h * 2 if h.grad_fn is None else h, {}, lambda s: None),
    "in words": (lambda s, h: h * {"(12,)": 3}.get(str((h.shape[2],)), 1), {}, lambda s: None),
}


class Scaled(Net):
    factor = 2

    def scaled(self, h: Tensor) -> Tensor:
        return h * 2


@pytest.mark.parametrize("name", READS)
def test_content_is_read_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, state, change = READS[name]
    for cls in (Settings, Base, Derived.Inner):
        monkeypatch.setattr(cls, "scale", 2)
    if "scale" in vars(Derived):
        del Derived.scale
    monkeypatch.setattr(Scaled, "factor", 2)
    monkeypatch.setattr(Scaled, "scaled", Scaled.scaled)
    monkeypatch.setattr(helper, "by", 2, raising=False)
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


def test_another_threads_numbers_and_attributes() -> None:
    """A swap neither rewinds the generators that a thread draws from, nor takes its changes for the forward's."""
    model = seeded(Net(lambda s, h: h, {})).eval()
    model.register_buffer("n", torch.zeros(()))
    drawn, ends = [], threading.Event()

    def work() -> None:
        while not ends.is_set():
            drawn.append((random.random(), torch.rand(()).item()))
            model.n = torch.tensor(float(len(drawn)))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        reasons = [explain(swap(model)).untraced for _ in range(10)]
    finally:
        ends.set()
        thread.join()
    assert reasons == [{}] * 10
    assert len(set(drawn)) == len(drawn)
    assert model.n == len(drawn)


def test_threads_that_call_at_once_share_a_trace() -> None:
    fast = swap(seeded(Net(lambda s, h: h, {})).eval())
    fast.new = 1
    made = fast._fastconv_region._made
    threads = [threading.Thread(target=fast, args=(features(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fast._fastconv_region._made == made + 1


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


def rounded(state: Any) -> Any:
    """Of sums of tensors, what does not depend on the order of summing."""
    if isinstance(state, dict):
        return {name: rounded(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [rounded(value) for value in state]
    return pytest.approx(state, rel=1e-3, abs=1e-2) if isinstance(state, float) else state

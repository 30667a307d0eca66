"""fastconv.swap of forwards that depend on more than their arguments: it is looked at again before every call."""

from __future__ import annotations

import copy
import functools
import gc
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fastconv import explain, swap
from support.swap_models import Acting, features, seeded

FLAG = True
CONFIG = {"scale": 2}
LATE: Any = None


class Settings:
    scale = 2


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


class Scaled(Acting):
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
    fast = swap(seeded(Acting(act, copy.deepcopy(state))).eval())
    assert not explain(fast).untraced
    change(fast)
    assert not explain(fast).untraced


def _load(n: int) -> dict[str, Any]:
    """What a module of this text has; its code is equal each time."""
    content = {"__name__": "loaded", "n": n}
    exec("def times(h):\n    return h * n\n\ndef make(n):\n    return lambda h: h * n", content)
    return content


LOADED = {
    "text, globals": lambda: (_load(2)["times"], _load(3)["times"]),
    "text, variables": lambda: (_load(0)["make"](2), _load(0)["make"](3)),
    "code, globals": lambda: (times := _load(2)["times"], types.FunctionType(times.__code__, _load(3))),
    "code, variables": lambda: map(_load(0)["make"], (2, 3)),
    "code, globals and variables": lambda: (
        made := _load(0)["make"](2),
        types.FunctionType(made.__code__, _load(0), closure=(types.CellType(3),)),
    ),
}


@pytest.mark.parametrize("make", LOADED.values(), ids=LOADED)
def test_functions_are_told_apart(make: Callable[[], Iterable[types.FunctionType]]) -> None:
    """By more than their code: what each reads is looked at."""
    first, second = make()
    model = seeded(Acting(lambda s, h: s.fs[1](s.fs[0](h)), {"fs": (first, second)})).eval()
    fast = swap(model)
    assert not explain(fast).untraced
    for function in (first, second):
        if function.__closure__:
            function.__closure__[0].cell_contents = 5
        else:
            function.__globals__["n"] = 5
        torch.testing.assert_close(fast(features()), model(features()), rtol=1e-4, atol=1e-5)


def _count(monkeypatch: pytest.MonkeyPatch, then: Callable[[], Any] = lambda: None) -> list[Any]:
    """What all objects are searched for, from now on; and what happens right after each search."""
    searches: list[Any] = []
    search = gc.get_referrers

    def get_referrers(*objects: Any) -> list[Any]:
        searches.append(objects)
        found = search(*objects)
        then()
        return found

    monkeypatch.setattr(gc, "get_referrers", get_referrers)
    return searches


def test_all_objects_are_searched_once_in_a_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = _count(monkeypatch)
    acts = [lambda h: h + 1, lambda h: h * 2, lambda h: h - 3]
    swap(Acting(lambda s, h: acts[2](acts[1](acts[0](h))), {}))
    assert len(searches) == 2  # in either mode


def late(h: Tensor) -> Tensor:
    return LATE(h)


def test_functions_that_another_thread_makes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(n: int) -> Callable[[Tensor], Tensor]:
        return lambda h: h * n

    monkeypatch.setitem(globals(), "LATE", None)
    searches = _count(monkeypatch, lambda: globals().update(LATE=globals()["LATE"] or make(2)))
    bias = 1
    model = seeded(Acting(lambda s, h: late(h + bias), {})).eval()
    fast = swap(model)
    assert searches  # for the lambda, of which `bias` is a variable
    assert not explain(fast).untraced
    LATE.__closure__[0].cell_contents = 3
    torch.testing.assert_close(fast(features()), model(features()), rtol=1e-4, atol=1e-5)


def test_functions_that_were_not_read_do_not_stay_alive() -> None:
    content = _load(2)
    fast = swap(Acting(lambda s, h: s.f(h), {"f": content["make"](2)}))
    assert not explain(fast).untraced
    function = weakref.ref(content.pop("times"))
    gc.collect()
    assert function() is None


def test_a_forward_that_fails_is_not_traced_for_ever() -> None:
    calls = []

    def act(s: Acting, h: Tensor) -> Tensor:
        calls.append(isinstance(h, fx.Proxy))
        s.n += 1
        return h

    fast = swap(seeded(Acting(act, {"n": 0})).eval())
    for _ in range(20):
        fast(features())
    assert fast.n == 20
    assert not any(calls)  # `calls` is a variable of an enclosing function, and put back

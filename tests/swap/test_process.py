"""fastconv.swap and its process: state that is set for all of it, threads, profilers, what kills it."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastconv import explain, swap
from support.swap_models import Acting, features, seeded

# ------------------------------------------------------------------------------------------ traced values in C++


@pytest.mark.slow
def test_every_function_of_a_traced_value() -> None:
    """Indexing, constructors, in-place and factory functions: traced and as eager, or not traced, with a reason."""
    script = Path(__file__).parents[1] / "support" / "swap_calls.py"
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
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


def helper(h: Tensor) -> Tensor:
    return h + 1


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
    fast = swap(seeded(Acting(lambda s, h: (sets(), h)[-1], {})).eval())
    assert explain(fast).untraced[""]
    assert tells() == before
    if name == "determinism":
        assert "are_deterministic" in explain(Acting(lambda s, h: h * tells(), {})).untraced[""]


def test_gradients_that_are_asked_for() -> None:
    """Parameters keep requires_grad and grad, whatever a forward would do to them."""
    for change in (
        lambda s: s.conv.requires_grad_(False),
        lambda s: s.zero_grad(),
        lambda s: s.b.requires_grad_(False),
    ):
        model = seeded(Acting(lambda s, h, change=change: (change(s), h)[-1], {})).eval()
        model.conv.weight.grad = torch.ones_like(model.conv.weight)
        explain(swap(model))
        assert model.conv.weight.requires_grad
        assert model.b.requires_grad
        assert model.conv.weight.grad is not None


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
        fast = swap(seeded(Acting(lambda s, h: h, {})).eval())
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
    model = seeded(Acting(lambda s, h: h, {})).eval()
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
    fast = swap(seeded(Acting(lambda s, h: h, {})).eval())
    fast.new = 1
    made = fast._fastconv_region._made
    threads = [threading.Thread(target=fast, args=(features(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fast._fastconv_region._made == made + 1

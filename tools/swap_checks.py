"""Is what `fastconv.swap` makes of a model the same model? All that can be compared, on one model."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

import fastconv
import synthetic
from fastconv.measure import timing
from fastconv.swapping.explanation import traced_parts
from fastconv.swapping.patterns.convolution import is_convolution
from fastconv.swapping.regions import programs_of
from fastconv.swapping.tracing.modules import REGION
from model_contents import (
    bits,
    changed_bits,
    contents,
    differences,
    everything,
    holds_an_object,
    same_bits,
    tensors_of,
    valued,
)
from output_values import (
    DISCRETE,
    WITHOUT_ORACLE,
    compare_values,
    equal,
    leaves,
    other_nature,
    short,
    skeleton,
    to_double,
)
from swap_report import Eager, Report, line_of, run_eager, run_model
from swap_steps import change_weights, compare_step
from zoo import Subject, Unusable, build, in_layout

LAYOUTS = ("contiguous", "channels_last")


def examine(name: str, *, quick: bool = False, announce: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All checks of one model of the zoo, as a record for JSON.

    Args:
        quick: one size, one layout, one training step, no times.
        announce: is told which check begins.
    """
    announce("build")
    try:
        subject = build(name)
    except Unusable as error:
        return {"name": name, "status": "unusable", "why": str(error)[:300], "findings": []}
    report = Report(name, announce)
    model, calls = subject.model, subject.calls[: 1 if quick else None]
    layouts = LAYOUTS[: 1 if quick else None]
    fast = _swap(report, model)
    if fast is not None:
        _examine(report, subject, fast, calls, layouts, quick)
    return report.record()


def _examine(
    report: Report, subject: Subject, fast: nn.Module, calls: list[Any], layouts: tuple[str, ...], quick: bool
) -> None:
    model = subject.model
    with report.check("model after a run of the copy") as found:
        _compare_model(subject, fast, calls[0], found)
    with report.check("proxies") as found:
        for text in _proxies(fast):
            found(text)
    with report.check("what is swapped"):
        _describe(report, fast)
    with report.check("outputs") as found:
        for i, args in enumerate(calls):
            for layout in layouts:
                _compare_outputs(subject, fast, in_layout(args, layout), f"call {i}, {layout}", found)
    with report.check("outputs with gradients") as found:
        _compare_outputs(subject, fast, calls[0], "", found, grad=True)
    with report.check("NaN") as found:
        _compare_nan(subject, fast, found)
    if not quick:
        with report.check("copies") as found:
            _compare_copies(subject, found)
    with report.check("effects") as found:
        _compare_effects(subject, found)
    for mode in ("training",) if quick else ("training", "evaluation"):
        with report.check(f"step in {mode}") as found:
            compare_step(subject, mode == "training", found)
    # From here on weights and attributes are others.
    with report.check("new weights and attributes") as found:
        change_weights(model)
        for one in (model, fast):
            synthetic.change(one)
            one.train()  # as for a step: some models then forget what they have computed from their weights
            one.eval()
        _compare_outputs(subject, fast, calls[0], "after a step", found)
    if not quick:
        with report.check("times"):
            _measure(report, subject, fast)


# ------------------------------------------------------------------------------------------------------- swap


def _swap(report: Report, model: nn.Module) -> nn.Module | None:
    fast = None
    before, weights = contents(model), bits(model)
    random_state = torch.get_rng_state()
    with report.check("swap") as found:
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fast = fastconv.swap(model)
        report.facts["swap_s"] = round(time.perf_counter() - start, 2)
        for warning in caught:
            found(f"warns: {str(warning.message).splitlines()[0]}")
        if not torch.equal(random_state, torch.get_rng_state()):
            found("draws random numbers")
    with report.check("model after swap") as found:
        for text in differences(before, contents(model)) + changed_bits(weights, bits(model)):
            found(text)
    if fast is None:
        return None
    with report.check("state_dict") as found:
        ours, theirs = fast.state_dict(), model.state_dict()
        if list(ours) != list(theirs):
            found(f"other keys: {sorted(ours.keys() ^ theirs.keys())[:5] or 'in another order'}")
        for kind in ("named_parameters", "named_buffers", "named_modules"):
            mine, original = dict(getattr(fast, kind)()), dict(getattr(model, kind)())
            if list(mine) != list(original):
                found(f"other {kind}")
            elif kind != "named_modules" and any(mine[name] is not original[name] for name in mine):
                found(f"{kind}: not the same objects")
        if not isinstance(fast, type(model)):
            found("the copy is of another class")
    return fast


def _compare_model(subject: Subject, fast: nn.Module, args: Any, found: Callable[[str], None]) -> None:
    """What a run of the copy changes in the model, beyond what the two share: the numbers in buffers that a run of the
    model changes, and objects other than containers."""
    model, twin = subject.model, copy.deepcopy(subject.model)
    before, weights = contents(model), bits(model)
    run_eager(twin, in_layout(args, "contiguous"), subject.settings)
    changed = {name for name, value in tensors_of(twin) if name in weights and not same_bits(weights[name], value)}
    run_model(fast, in_layout(args, "contiguous"), subject.settings)
    for text in differences(before, contents(model)) + changed_bits(weights, bits(model), changed):
        shared = changed if "_buffers" in text else holds_an_object(text, before)
        if not shared:
            found(text)


def _proxies(model: nn.Module) -> list[str]:
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name != REGION and any(issubclass(type(one), fx.Proxy) for one in everything(value)):
                found.append(f"{path}.{name}")
    return [f"{len(found)} attributes hold torch.fx proxies: {', '.join(found[:3])}"] if found else []


# ---------------------------------------------------------------------------------------------------- outputs


def _compare_outputs(
    subject: Subject,
    fast: nn.Module,
    args: Any,
    where: str,
    found: Callable[[str], None],
    *,
    grad: bool = False,
) -> None:
    """Twice: weights that have changed are made ready at the second call."""
    settings = subject.settings
    for run in ("first run", "second run"):
        # Of the model as it is now: a forward may change buffers, which the two share.
        model, expected_args, given = copy.deepcopy(subject.model), copy.deepcopy(args), copy.deepcopy(args)
        oracle = _oracle(subject, args, settings, grad)
        expected = run_eager(model, expected_args, settings, grad=grad)
        got = run_model(fast, given, settings, grad=grad)
        texts = compare_values(expected, got, oracle, WITHOUT_ORACLE)
        if texts and oracle is not None:
            # Swapped networks compute in channels_last, where eager's own error may be another.
            other = copy.deepcopy(subject.model).to(memory_format=torch.channels_last)
            baseline = run_eager(other, in_layout(args, "channels_last"), settings, grad=grad)
            texts = compare_values(expected, got, oracle, WITHOUT_ORACLE, baseline)
        if texts == [DISCRETE]:
            texts = _compare_in_double(subject, args, grad)
        texts += [f"argument {text}" for text in compare_values(expected_args, given, None)]
        if texts:
            # The nature of outputs does not depend on where it was seen.
            place = "" if texts[0].startswith("returns") else f" ({', '.join(filter(None, [where, run]))})"
            found(f"{'; '.join(texts[:3])}{place}")
            return


def _oracle(subject: Subject, args: Any, settings: dict[str, Any], grad: bool) -> Any:
    """The outputs of float64; None if the model cannot do that."""
    try:
        return run_model(copy.deepcopy(subject.model).double(), to_double(args), settings, grad=grad)
    except Exception:
        return None


def _compare_in_double(subject: Subject, args: Any, grad: bool) -> list[str]:
    """For outputs that rounding decides, such as which boxes are kept: there is less of it."""
    model, settings = copy.deepcopy(subject.model).double(), subject.settings
    expected = run_eager(copy.deepcopy(model), to_double(args), settings, grad=grad)
    got = run_model(fastconv.swap(model), to_double(args), settings, grad=grad)
    texts = compare_values(expected, got, None)
    if texts:
        nearly = to_double(args)
        for _, image in leaves(nearly):
            if image.is_floating_point():
                image *= 1 + 1e-14 * torch.randn_like(image)
        if compare_values(expected, run_eager(copy.deepcopy(model), nearly, settings, grad=grad), None):
            raise Eager("rounding decides what it returns, in float64, too")
    return [f"in float64: {text}" for text in texts]


def _compare_nan(subject: Subject, fast: nn.Module, found: Callable[[str], None]) -> None:
    """A NaN in the middle of the first image, an Inf in its corner."""
    args = copy.deepcopy(subject.calls[0])
    image = next(iter(leaves(args)))[1]
    image[(0,) * (image.dim() - 2) + (image.shape[-2] // 2, image.shape[-1] // 2)] = torch.nan
    image[(0,) * image.dim()] = torch.inf
    expected = run_eager(copy.deepcopy(subject.model), copy.deepcopy(args), subject.settings)
    got = run_model(fast, args, subject.settings)
    nature = other_nature(expected, got)
    if nature:
        found(nature)
        return
    for (path, one), (_, two) in zip(leaves(expected), leaves(got), strict=True):
        for what in (torch.isnan, torch.isinf):
            if one.is_floating_point() and not torch.equal(what(one), what(two)):
                counts = int(what(two).sum()), int(what(one).sum())
                found(f"{path or 'output'}: {what.__name__} is true for {counts[0]} elements, in eager for {counts[1]}")


def _compare_copies(subject: Subject, found: Callable[[str], None]) -> None:
    """Of a fresh copy, saved and loaded, where the model itself can be."""
    fast = fastconv.swap(subject.model)
    for name, duplicate in (("deepcopy", copy.deepcopy), ("pickle", _pickled), ("torch.save", _saved)):
        try:
            duplicate(subject.model)
        except Exception:
            continue
        with contextlib.suppress(Eager):
            _compare_outputs(subject, duplicate(fast), subject.calls[0], name, found)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ---------------------------------------------------------------------------------------------------- effects


def _compare_effects(subject: Subject, found: Callable[[str], None]) -> None:
    """What two runs leave behind: in the modules' attributes, in the generators, in the world."""
    model = copy.deepcopy(subject.model).double()
    twin = copy.deepcopy(model)
    try:
        theirs, world = _effects(model, subject)
    except Exception as error:
        raise Eager(f"in float64: {line_of(error)}") from error
    # Swapped only now: a forward that seeds a generator leaves it as a trace does.
    ours, our_world = _effects(fastconv.swap(twin), subject)
    for text in [f"{path} is missing" for path in sorted(theirs.keys() - ours.keys())][:3]:
        found(text)
    for text in [f"{path} is there, not so in eager" for path in sorted(ours.keys() - theirs.keys())][:3]:
        found(text)
    changed = [path for path in theirs.keys() & ours.keys() if not equal(theirs[path], ours[path])]
    for path in sorted(changed)[:3]:
        found(f"{path} is {short(ours[path])}, in eager {short(theirs[path])}")
    for what, value in world.items():
        if not equal(value, our_world[what]):
            found(f"{what}: {short(our_world[what])}, in eager {short(value)}")


def _effects(model: nn.Module, subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
    synthetic.LOG.clear()
    printed = io.StringIO()
    torch.manual_seed(1)
    random.seed(1)
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(2):
            model(*to_double(subject.calls[0]), **subject.settings)
    return _values(model), {
        "printed": printed.getvalue(),
        "logged": list(synthetic.LOG),
        "warnings": [str(warning.message) for warning in caught],
        "torch's random state": torch.get_rng_state(),
        "Python's random state": random.getstate(),
    }


def _values(model: nn.Module) -> dict[str, Any]:
    """The attributes of all modules, as values that can be compared between two models."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in (REGION, "_modules") and not name.endswith("_hooks"):
                found[f"{path}.{name}"] = valued(value)
    return found


# ---------------------------------------------------------------------------------------- figures and findings


def _describe(report: Report, fast: nn.Module) -> None:
    explanation = fastconv.explain(fast)
    report.facts["layers"] = [len(explanation.swapped), len(explanation.rows)]
    report.facts["untraced"] = {path or "the model": reason for path, reason in explanation.untraced.items()}
    report.facts["convolutions"] = dict(Counter(_followed(fast)))


def _followed(fast: nn.Module) -> Iterator[str]:
    """For every convolution: what is computed with it in inference, what comes then, and why that is not taken."""
    called: set[int] = set()
    for _, part in traced_parts(fast, {}):
        program = programs_of(part, False).inference
        modules = dict(part.named_modules(remove_duplicate=False))
        for node, reason in program.findings.skipped.items():
            conv = modules.get(node.target) if node.op == "call_module" else node
            if id(conv) not in called:  # a shared one has several nodes
                yield f"as before: {reason}"
            called.add(id(conv))
        for match in program.findings.matches:
            convs = {id(modules[node.target]) for node in match.layers if is_convolution(modules.get(node.target))}
            if not convs:
                continue
            called |= convs
            chunks = [chunk.strip(" +") for chunk in f"{match.pattern} ".split("conv ")[1:]]
            for chunk in chunks[:-1]:
                yield f"{_joined(chunk)}, then: a 1x1 convolution"
            then = " and ".join(sorted({_what(reader, match.nodes[-1], modules) for reader in match.nodes[-1].users}))
            yield f"{_joined(chunks[-1])}, then: {then or 'nothing'}{f' ({match.reason})' if match.reason else ''}"
    for module in fast.modules():
        if is_convolution(module) and id(module) not in called:
            yield "as before: not in a traced part"


def _joined(chunk: str) -> str:
    return f"conv + {chunk}" if chunk else "conv"


def _what(reader: fx.Node, node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The outermost module that the reader is in and the node is not; else the module or function itself."""
    around = node.meta.get("nn_module_stack", {})
    for key, (_, cls) in reader.meta.get("nn_module_stack", {}).items():
        if key not in around:
            return getattr(cls, "fastconv_plain_class", cls).__name__
    if reader.op == "call_module":
        return type(modules[reader.target]).__name__
    return "the end" if reader.op == "output" else str(getattr(reader.target, "__name__", reader.target))


def _measure(report: Report, subject: Subject, fast: nn.Module) -> None:
    """Medians of a few runs that take turns; rough, as other processes may run."""
    model, args = copy.deepcopy(subject.model), subject.calls[0]

    def call(network: nn.Module) -> Callable[[], Any]:
        return lambda: run_model(network, copy.deepcopy(args), subject.settings)

    run_eager(model, copy.deepcopy(args), subject.settings)
    calls = {"eager_ms": call(model), "swapped_ms": call(fast)}
    for warm_up in calls.values():
        warm_up()
    results = {name: timing.Result() for name in calls}
    timing.take_turns(calls, results, allowance=0)
    for name, result in results.items():
        report.facts[name] = round(1e3 * result.median, 2)
    report.facts["input"] = skeleton(args)

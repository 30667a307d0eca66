"""Is what `fastconv.swap` makes of a model the same model? All that can be compared, on one model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import pickle
import random
import re
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

import fastconv
import synthetic
from fastconv.measure.tolerance import compare
from fastconv.swapping.explanation import traced_parts
from fastconv.swapping.patterns.convolution import is_convolution
from fastconv.swapping.regions import programs_of
from fastconv.swapping.tracing.modules import REGION
from zoo import Subject, Unusable, build, in_layout

LAYOUTS = ("contiguous", "channels_last")
_TIMED_RUNS = 5
_CLOSE = 1e-8  # of float64 results, in units of the largest number of the tensor
_WITHOUT_ORACLE = 300 * torch.finfo(torch.float32).eps  # the policy's cap, for models that cannot do float64
_FLOOR = 1e-11  # for tensors that are 0 but for rounding, in units of the largest number of all


class Report:
    """What is known about a model so far.

    Attributes:
        findings: what differs: a line, with the checks that came upon it.
        skipped: by check, why it could not be made: the original does not do it either.
        facts: figures and what was swapped.
    """

    def __init__(self, name: str, announce: Callable[[str], None]) -> None:
        self.name = name
        self.findings: dict[str, list[str]] = {}
        self.skipped: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self._announce = announce

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[Callable[[str], None]]:
        """Yields what takes a finding; an error within the block is one, too, but for `_Eager`."""
        self._announce(name)
        try:
            yield lambda text: self._found(name, text)
        except _Eager as error:
            self.skipped[name] = str(error)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
            self._found(name, f"{_line(error)}, at {place}")

    def _found(self, check: str, text: str) -> None:
        text = re.sub(r"<eval_with_key>\.\d+:\d+", "a traced forward", text)
        checks = self.findings.setdefault(text, [])
        if check not in checks:
            checks.append(check)

    def record(self) -> dict[str, Any]:
        status = "findings" if self.findings else "ok"
        findings = [[", ".join(checks), text] for text, checks in self.findings.items()]
        return {"name": self.name, "status": status, "findings": findings, "skipped": self.skipped, **self.facts}


class _Eager(Exception):
    """The original cannot do it."""


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
            _compare_step(subject, mode == "training", found)
    # From here on weights and attributes are others.
    with report.check("new weights and attributes") as found:
        _change_weights(model)
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
    before, weights = _contents(model), _bits(model)
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
        for text in _differences(before, _contents(model)) + _changed_bits(weights, _bits(model)):
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
    before, weights = _contents(model), _bits(model)
    _eager(twin, in_layout(args, "contiguous"), subject.settings)
    changed = {name for name, value in _tensors_of(twin) if name in weights and not _same_bits(weights[name], value)}
    _run(fast, in_layout(args, "contiguous"), subject.settings)
    for text in _differences(before, _contents(model)) + _changed_bits(weights, _bits(model), changed):
        shared = changed if "_buffers" in text else _is_object(text, before)
        if not shared:
            found(text)


def _is_object(text: str, before: dict[str, Any]) -> bool:
    """Whether the change is of an object that is none of torch's and no container."""
    value, _ = before.get(text.removesuffix(" has changed"), (None, None))
    return hasattr(value, "__dict__") and not isinstance(value, (dict, list, set, Tensor, nn.Module))


def _contents(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on the modules, by path: what it is, and what is in it."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"{path}: class"] = type(module)
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = (value, _frozen(value))
    return found


def _frozen(value: Any, depth: int = 4) -> Any:
    """The objects that a value holds, in containers and plain objects."""
    if depth == 0:
        return value
    if isinstance(value, dict):
        return [(key, item, _frozen(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, list | tuple | set):
        return [(item, _frozen(item, depth - 1)) for item in value]
    if _is_plain_object(value):
        return _frozen(vars(value), depth - 1)
    return value


def _is_plain_object(value: Any) -> bool:
    return (
        not isinstance(value, Tensor | nn.Module | type)
        and not type(value).__module__.startswith(("torch", "builtins"))
        and isinstance(getattr(value, "__dict__", None), dict)
    )


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    found = [f"{path} is gone" for path in before.keys() - after.keys()]
    found += [f"{path} is new" for path in after.keys() - before.keys()]
    found += [f"{path} has changed" for path in before.keys() & after.keys() if not _same(before[path], after[path])]
    return sorted(found)[:5]


def _same(one: Any, other: Any) -> bool:
    """Whether they are the same object, or containers (made by `_frozen`) of the same ones."""
    if one is other:
        return True
    if type(one) in (list, tuple) and type(other) is type(one) and len(one) == len(other):
        return all(map(_same, one, other))
    return isinstance(one, int | float | str | bytes) and type(one) is type(other) and one == other


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in _tensors_of(model)}


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _changed_bits(before: dict[str, Tensor], after: dict[str, Tensor], apart_from: Iterable[str] = ()) -> list[str]:
    same = {name for name, value in before.items() if name in after and _same_bits(value, after[name])}
    return [f"{name}: other numbers" for name in sorted(before.keys() - same - set(apart_from))][:5]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_raw(one), _raw(other))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _proxies(model: nn.Module) -> list[str]:
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name != REGION and any(issubclass(type(one), fx.Proxy) for one in _everything(value)):
                found.append(f"{path}.{name}")
    return [f"{len(found)} attributes hold torch.fx proxies: {', '.join(found[:3])}"] if found else []


def _everything(value: Any, depth: int = 6) -> Iterator[Any]:
    yield value
    # Not isinstance: proxies lie about what they are.
    cls = type(value)
    if depth and not issubclass(cls, Tensor | nn.Module | type | fx.Proxy):
        parts: Any = ()
        if issubclass(cls, dict):
            parts = [*value.keys(), *value.values()]
        elif issubclass(cls, list | tuple | set):
            parts = value
        elif _is_plain_object(value):
            parts = vars(value).values()
        for part in parts:
            yield from _everything(part, depth - 1)


# ---------------------------------------------------------------------------------------------------- outputs


def _run(model: nn.Module, args: Any, settings: dict[str, Any], *, grad: bool = False) -> Any:
    torch.manual_seed(1)
    random.seed(1)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return model(*args, **settings)


def _eager(model: nn.Module, args: Any, settings: dict[str, Any], *, grad: bool = False) -> Any:
    try:
        return _run(model, args, settings, grad=grad)
    except Exception as error:
        raise _Eager(_line(error)) from error


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
        expected = _eager(model, expected_args, settings, grad=grad)
        got = _run(fast, given, settings, grad=grad)
        texts = _compare_values(expected, got, oracle, _WITHOUT_ORACLE)
        if texts and oracle is not None:
            # Swapped networks compute in channels_last, where eager's own error may be another.
            other = copy.deepcopy(subject.model).to(memory_format=torch.channels_last)
            baseline = _eager(other, in_layout(args, "channels_last"), settings, grad=grad)
            texts = _compare_values(expected, got, oracle, _WITHOUT_ORACLE, baseline)
        if texts == [_DISCRETE]:
            texts = _compare_in_double(subject, args, grad)
        texts += [f"argument {text}" for text in _compare_values(expected_args, given, None)]
        if texts:
            # The nature of outputs does not depend on where it was seen.
            place = "" if texts[0].startswith("returns") else f" ({', '.join(filter(None, [where, run]))})"
            found(f"{'; '.join(texts[:3])}{place}")
            return


def _oracle(subject: Subject, args: Any, settings: dict[str, Any], grad: bool) -> Any:
    """The outputs of float64; None if the model cannot do that."""
    try:
        return _run(copy.deepcopy(subject.model).double(), to_double(args), settings, grad=grad)
    except Exception:
        return None


_DISCRETE = "rounding decides what is in the outputs"


def _compare_in_double(subject: Subject, args: Any, grad: bool) -> list[str]:
    """For outputs that rounding decides, such as which boxes are kept: there is less of it."""
    model, settings = copy.deepcopy(subject.model).double(), subject.settings
    expected = _eager(copy.deepcopy(model), to_double(args), settings, grad=grad)
    got = _run(fastconv.swap(model), to_double(args), settings, grad=grad)
    texts = _compare_values(expected, got, None)
    if texts:
        nearly = to_double(args)
        for _, image in leaves(nearly):
            if image.is_floating_point():
                image *= 1 + 1e-14 * torch.randn_like(image)
        if _compare_values(expected, _eager(copy.deepcopy(model), nearly, settings, grad=grad), None):
            raise _Eager("rounding decides what it returns, in float64, too")
    return [f"in float64: {text}" for text in texts]


def _compare_values(expected: Any, got: Any, oracle: Any, close: float = _CLOSE, baseline: Any = None) -> list[str]:
    """What is different in nature, layout or value.

    Values keep to the policy of `fastconv.measure.tolerance` where an oracle is given, else they are equal but for
    `close`. The result is [_DISCRETE] where eager's own outputs are beyond what the policy allows. Twice the error of
    `baseline` is allowed, by default that of the expected outputs.
    """
    nature = _nature(expected, got)
    if nature:
        return [nature]
    if _aliases(expected) != _aliases(got):
        return [f"other values are the same object: {_aliases(got)}, in eager {_aliases(expected)}"]
    pairs = list(zip(leaves(expected), leaves(got), strict=True))
    found = [
        f"{path} has strides {two.stride()}, eager's {one.stride()}"
        for (path, one), (_, two) in pairs
        if one.layout is torch.strided and one.stride() != two.stride()
    ]
    if oracle is None:
        found += [f"{path}: {text}" for (path, one), (_, two) in pairs for text in _unequal(one, two, close=close)]
        return found
    exact = [tensor for _, tensor in leaves(oracle)]
    if [t.shape for t in exact] != [one.shape for (_, one), _ in pairs] or any(
        not one.is_floating_point() and not torch.equal(one, t) for ((_, one), _), t in zip(pairs, exact, strict=True)
    ):
        return [_DISCRETE]
    bases = [tensor for _, tensor in leaves(expected if baseline is None else baseline)]
    for ((path, one), (_, two)), best, base in zip(pairs, exact, bases, strict=True):
        if one.is_floating_point():
            if not compare(one, best.double(), one).ok:
                return [_DISCRETE]
            verdict = compare(two, best.double(), base)
            if not verdict.ok:
                found.append(f"{path or 'output'}: {verdict}")
        else:
            found += [f"{path}: {text}" for text in _unequal(one, two)]
    return found


def _unequal(expected: Tensor, got: Tensor, scale: float = 0.0, close: float = _CLOSE) -> Iterator[str]:
    if not expected.is_floating_point():
        if not torch.equal(expected, got):
            yield "other values"
        return
    eps = max(close, 8 * torch.finfo(expected.dtype).eps)
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(expected.isnan(), got.isnan()):
        yield "other NaN or Inf"
    elif finite.any():
        one, two = expected.detach()[finite].double(), got.detach()[finite].double()
        error, largest = float((one - two).abs().max()), float(one.abs().max())
        if error > eps * largest + _FLOOR * scale:
            yield f"differs by {error:.3g}, the largest is {largest:.3g}"


def _compare_nan(subject: Subject, fast: nn.Module, found: Callable[[str], None]) -> None:
    """A NaN in the middle of the first image, an Inf in its corner."""
    args = copy.deepcopy(subject.calls[0])
    image = next(iter(leaves(args)))[1]
    image[(0,) * (image.dim() - 2) + (image.shape[-2] // 2, image.shape[-1] // 2)] = torch.nan
    image[(0,) * image.dim()] = torch.inf
    expected = _eager(copy.deepcopy(subject.model), copy.deepcopy(args), subject.settings)
    got = _run(fast, args, subject.settings)
    nature = _nature(expected, got)
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
        with contextlib.suppress(_Eager):
            _compare_outputs(subject, duplicate(fast), subject.calls[0], name, found)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return type(value)((key, to_double(item)) for key, item in value.items())
    return type(value)(map(to_double, value)) if isinstance(value, list | tuple) else value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output with their paths, in order."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for name, item in _items(value):
        yield from leaves(item, f"{path}{name}")


def skeleton(value: Any, *, shapes: bool = True) -> str:
    """Types, names and order, and of tensors dtypes and shapes, without the numbers."""
    if isinstance(value, Tensor):
        kind = "Parameter" if isinstance(value, nn.Parameter) else "Tensor"
        return f"{kind} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if shapes else kind
    items = _items(value)
    if items or isinstance(value, dict | list | tuple):
        inner = ", ".join(f"{name}={skeleton(item, shapes=shapes)}" for name, item in items)
        return f"{type(value).__name__}({inner})"
    if issubclass(type(value), fx.Proxy):
        return "torch.fx proxy"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int | float | str | slice) else type(value).__name__


def _nature(expected: Any, got: Any) -> str:
    """How two outputs differ apart from numbers; empty if they do not."""
    for shapes in (False, True):
        theirs, ours = skeleton(expected, shapes=shapes), skeleton(got, shapes=shapes)
        if theirs != ours:
            return f"returns {_differing(ours, theirs)}, eager {_differing(theirs, ours)}"
    return ""


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", getattr(value, name)) for name in value._fields]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def _differing(text: str, other: str) -> str:
    """The part of a long text from where the other differs."""
    if len(text) < 80:
        return text
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
    return f"...{text[max(0, same - 20) : same + 60]}..."


def _aliases(value: Any) -> list[list[str]]:
    """Which of the tensors are one object."""
    groups: dict[int, list[str]] = {}
    for path, tensor in leaves(value):
        groups.setdefault(id(tensor), []).append(path)
    return [paths for paths in groups.values() if len(paths) > 1]


# ---------------------------------------------------------------------------------------------------- effects


def _compare_effects(subject: Subject, found: Callable[[str], None]) -> None:
    """What two runs leave behind: in the modules' attributes, in the generators, in the world."""
    model = copy.deepcopy(subject.model).double()
    twin = copy.deepcopy(model)
    try:
        theirs, world = _effects(model, subject)
    except Exception as error:
        raise _Eager(f"in float64: {_line(error)}") from error
    # Swapped only now: a forward that seeds a generator leaves it as a trace does.
    ours, our_world = _effects(fastconv.swap(twin), subject)
    for text in [f"{path} is missing" for path in sorted(theirs.keys() - ours.keys())][:3]:
        found(text)
    for text in [f"{path} is there, not so in eager" for path in sorted(ours.keys() - theirs.keys())][:3]:
        found(text)
    changed = [path for path in theirs.keys() & ours.keys() if not _equal(theirs[path], ours[path])]
    for path in sorted(changed)[:3]:
        found(f"{path} is {_short(ours[path])}, in eager {_short(theirs[path])}")
    for what, value in world.items():
        if not _equal(value, our_world[what]):
            found(f"{what}: {_short(our_world[what])}, in eager {_short(value)}")


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
                found[f"{path}.{name}"] = _valued(value)
    return found


def _valued(value: Any, depth: int = 6) -> Any:
    cls = type(value)
    if issubclass(cls, fx.Proxy):
        return "a torch.fx proxy"
    if isinstance(value, Tensor | int | float | str | bytes | type(None)):
        return value
    if depth and isinstance(value, dict):
        return (cls.__name__, [(str(key), _valued(item, depth - 1)) for key, item in value.items()])
    if depth and isinstance(value, list | tuple):
        return (cls.__name__, [_valued(item, depth - 1) for item in value])
    if depth and _is_plain_object(value):
        return (cls.__name__, [(key, _valued(item, depth - 1)) for key, item in vars(value).items()])
    return cls.__name__


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return not list(_unequal(one, other))
    if type(one) in (list, tuple) and type(other) is type(one):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == other or abs(one - other) <= _CLOSE * abs(one) or (one != one and other != other)
    return type(one) is type(other) and one == other


def _short(value: Any) -> str:
    text = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    text = " ".join(text.split())
    return text if len(text) < 80 else f"{text[:77]}..."


# --------------------------------------------------------------------------------------------------- training


def _compare_step(subject: Subject, training: bool, found: Callable[[str], None]) -> None:
    """In float64, where rounding hardly ever flips a ReLU: outputs, all gradients, statistics."""
    model = copy.deepcopy(subject.model).double()
    fast = fastconv.swap(copy.deepcopy(model))
    args = subject.training if training else subject.calls[0]
    try:
        expected = _step(model, to_double(args), subject.settings, training)
    except Exception as error:
        raise _Eager(_line(error)) from error
    got = _step(fast, to_double(args), subject.settings, training)
    nature = _nature(expected["output"], got["output"])
    if nature:
        found(nature)
        return
    for kind in expected:
        theirs, ours = _by_path(expected[kind]), _by_path(got[kind])
        if theirs.keys() != ours.keys():
            found(f"{kind}: not the same are there: {sorted(theirs.keys() ^ ours.keys())[:3]}")
            continue
        floats = [t for t in theirs.values() if t.is_floating_point() and t.numel()]
        scale = max((float(t.detach().abs().nan_to_num(0, 0, 0).max()) for t in floats), default=0.0)
        wrong = [(path, text) for path, one in theirs.items() for text in _unequal(one, ours[path], scale)]
        if wrong:
            path, text = wrong[0]
            found(f"{kind} {path}: {text}; {len(wrong)} of {len(theirs)} differ")


def _step(model: nn.Module, args: Any, settings: dict[str, Any], training: bool) -> dict[str, Any]:
    model.train(training)
    images = [t for _, t in leaves(args[:1]) if t.is_floating_point()]
    for image in images:
        image.requires_grad_()
    inputs = [image * 1 for image in images]  # a leaf must not be overwritten, as some forwards do
    output = _run(model, (_with_leaves(args[0], iter(inputs)), *args[1:]), settings, grad=True)
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), dtype=torch.float64)
    for _, tensor in leaves(output):
        if tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            loss = loss + (tensor * weights).sum()
    if not loss.requires_grad:
        raise RuntimeError("no output has a gradient")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "output": output,
        "gradient of": gradients,
        "gradient of the input": {str(i): image.grad for i, image in enumerate(images) if image.grad is not None},
        "buffer": dict(model.named_buffers()),
    }


def _with_leaves(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors) if value.is_floating_point() else value
    return type(value)(_with_leaves(item, tensors) for item in value) if isinstance(value, list | tuple) else value


def _by_path(value: Any) -> dict[str, Tensor]:
    return dict(leaves(value))


def _change_weights(model: nn.Module) -> None:
    """A step of an optimizer, with gradients of noise, and other statistics."""
    torch.manual_seed(3)
    parameters = [p for p in model.parameters() if p.is_floating_point() and p.requires_grad]
    for parameter in parameters:
        parameter.grad = 0.05 * torch.randn_like(parameter) * parameter.detach().abs().mean()
    torch.optim.SGD(parameters, lr=1.0).step()
    for parameter in parameters:
        parameter.grad = None
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1)


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
    """Medians of interleaved runs; rough, as other processes may run."""
    model, args = copy.deepcopy(subject.model), subject.calls[0]
    _eager(model, copy.deepcopy(args), subject.settings)
    seconds: dict[str, list[float]] = {"eager_ms": [], "swapped_ms": []}
    for _ in range(1 + _TIMED_RUNS):
        for name, network in (("eager_ms", model), ("swapped_ms", fast)):
            given = copy.deepcopy(args)
            start = time.perf_counter()
            _run(network, given, subject.settings)
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        report.facts[name] = round(1e3 * statistics.median(values[1:]), 2)
    report.facts["input"] = skeleton(args)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"

"""What was measured on this machine, and what ``auto`` takes for a call by it.

A call's class is looked up in the tables in force, see `fastconv.operators.tables`. One that they do not hold gets
what was measured for the nearest size of the same family, at most `FARTHEST` times as many pixels or as few, where
nothing that was measured of the family speaks against that kernel's results.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, kernels, table_files
from .precision import allow_tf32
from .shape_classes import ShapeClass, shape_class
from .tables import Candidate, Entry, Table

FARTHEST = 4.0
_CHOICES_KEPT = 4096

_in_force: dict[tuple[torch.device, int], tuple[Table, ...]] = {}
_choices: dict[Any, Choice] = {}
_generation = 0
_listeners: list[Callable[[str, Sequence[Any]], None]] = []
_EMPTY = Table({"device": ""})


def generation() -> int:
    """Another number whenever other tables may be in force than before."""
    return _generation


def forget() -> None:
    """Has the tables read again at the next call."""
    global _generation
    _generation += 1
    _in_force.clear()
    _choices.clear()


def use(device: torch.device, *found: Table) -> None:
    """Puts these tables in force for the device, in place of those in files, until `forget`."""
    forget()
    _in_force[_key(device)] = found
    _disable()


@contextlib.contextmanager
def asked(listener: Callable[[str, Sequence[Any]], None]) -> Iterator[None]:
    """Inside, `listener` is told of every call that is looked up; where no table is in force, an empty one is."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def in_force(device: torch.device) -> tuple[Table, ...]:
    """The tables for calls on this device, the one that counts first; read at the first call."""
    found = _read(device)
    return found if found or not _listeners else (_EMPTY,)


def _read(device: torch.device) -> tuple[Table, ...]:
    key = _key(device)
    found = _in_force.get(key)
    if found is None:
        has_tables = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
        found = tuple(table for _, table in table_files.in_force(device)) if has_tables else ()
        _in_force[key] = found
        _disable()
    return found


def _disable() -> None:
    """What a table that is in force for any device has disabled runs on none: the switch is the process's."""
    every = [table for tables in tuple(_in_force.values()) for table in tables]
    kernels.disable({name for table in every for name in table.disabled})


def _key(device: torch.device) -> tuple[torch.device, int]:
    """A CPU's times are those of so many threads."""
    return device, torch.get_num_threads() if device.type == "cpu" else 0


class Choice(NamedTuple):
    """What is to run a call.

    Attributes:
        candidate: None where nothing was measured that would tell. Only what any caller can run: not the convolutions
            that `fastconv.swap` prepares, see `prepared_pays`.
        backward_is_aten: whether aten was the best for all of its backward, too, as far as that was measured.
    """

    candidate: Candidate | None
    backward_is_aten: bool


_UNKNOWN = Choice(None, True)


def choice(operator: str, args: Sequence[Any]) -> Choice:
    """For a call of an operator."""
    signature = _signature(operator, args)
    if signature is None:
        return _UNKNOWN
    for listener in _listeners:
        listener(operator, args)
    try:
        return _choices[signature]
    except KeyError:
        pass
    found, device = entry(operator, args), _device(args)
    chosen = _UNKNOWN if found is None else Choice(_best(found, device), _backward_is_aten(found, device))
    if len(_choices) >= _CHOICES_KEPT:
        _choices.clear()
    _choices[signature] = chosen
    return chosen


def prepared_pays(operator: str, args: Sequence[Any]) -> bool | None:
    """Whether a convolution prepared by `fastconv.swap` was faster than all else; None where that was not measured."""
    if _signature(operator, args) is None:
        return None
    for listener in _listeners:
        listener(operator, args)
    found = entry(operator, args)
    if found is None or not any(one.backend == backends.PREPARED for one in found.candidates):
        return None
    best = _best(found, _device(args), prepared=True)
    return best is not None and best.backend == backends.PREPARED


def entry(operator: str, args: Sequence[Any]) -> Entry | None:
    """What was measured of the call's class, or of the nearest one; refusals of the whole family are in it."""
    if _signature(operator, args) is None:
        return None
    wanted = shape_class(operator, args)
    for table in in_force(_device(args)):
        found = _nearest(table, wanted)
        if found is not None:
            return found
    return None


def _nearest(table: Table, wanted: ShapeClass) -> Entry | None:
    exact = table.entries.get((wanted.operator, wanted.family, wanted.size))
    if exact is not None and exact.complete:
        return exact
    family = [
        one
        for one in table.entries.values()
        if one.complete and (one.operator, one.family) == (wanted.operator, wanted.family)
    ]

    def distance(one: Entry) -> float:
        pixels = math.prod(one.size)
        return abs(math.log(pixels / wanted.pixels)) if pixels and wanted.pixels else math.inf

    nearest = min(family, key=distance, default=None)
    if nearest is None or distance(nearest) > math.log(FARTHEST):
        return None
    wrong = {_name(one) for entry in family for one in entry.candidates if one.outcome != "ok"}
    kept = tuple(one for one in nearest.candidates if _name(one) not in wrong)
    return replace(nearest, candidates=kept)


def _name(candidate: Candidate) -> tuple[str, str]:
    return candidate.backend, repr(sorted(candidate.variant.items()))


def usable(entry: Entry, device: torch.device, *, prepared: bool = False) -> Iterator[Candidate]:
    """Of an entry's candidates those that may run here and now, the best first."""
    tables = in_force(device)
    allow_lost_nan = any(table.allow_lost_nan for table in tables)
    disabled = {name for table in tables for name in table.disabled}
    needs_determinism = torch.are_deterministic_algorithms_enabled()
    for one in entry.candidates:
        if (
            one.outcome == "ok"
            and (one.keeps_nan or allow_lost_nan)
            and disabled.isdisjoint(value for value in one.variant.values() if isinstance(value, str))
            and (one.deterministic or not needs_determinism or one.backend == "reference")
            and (not one.variant or one.backend == "triton" or kernels.library_of(one.backend) is not None)
            and (one.backend != "cudnn" or torch.backends.cudnn.benchmark)  # only the engine that was judged
            and (prepared if one.backend == backends.PREPARED else backends.is_possible(one.backend, device))
        ):
            yield one


def _best(entry: Entry, device: torch.device, *, prepared: bool = False) -> Candidate | None:
    return next(usable(entry, device, prepared=prepared), None)


def _backward_is_aten(forward: Entry, device: torch.device) -> bool:
    entries = [_nearest(table, ShapeClass(*one)) for table in in_force(device) for one in forward.backward]
    best = [_best(one, device) for one in entries if one is not None]
    return all(one is None or one.backend == "reference" for one in best)


def _device(args: Sequence[Any]) -> torch.device:
    first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    return first.device


def _signature(operator: str, args: Sequence[Any]) -> Any:
    """All that the choice depends on; None for what has no class: sizes that are not numbers, as while a graph is made,
    what vmap maps over, and tensors of other kinds, which the op will refuse."""
    try:
        parts = [_part(value) for value in args]
        on_cpu = _device(args).type == "cpu"
        settings = torch.get_num_threads() if on_cpu else (allow_tf32(), torch.backends.cudnn.benchmark)
        return operator, *parts, torch.are_deterministic_algorithms_enabled(), settings
    except _NoClass:
        return None


class _NoClass(Exception):
    pass


def _part(value: Any) -> Any:
    if isinstance(value, Tensor):
        shape = value.shape
        if (
            value.layout is not torch.strided
            or any(type(side) is not int for side in shape)
            or torch._C._functorch.is_batchedtensor(value)
        ):
            raise _NoClass
        return shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_part, value))
    if isinstance(value, torch.SymInt):
        raise _NoClass
    return value

"""Whether a GPU's instructions do what the kernels were proved with, before any kernel is tried.

The cases run in the worker, one request each: one that crashes or hangs costs the instruction that it tries, nothing
else. A kernel that uses an instruction that differs is disabled by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..operators import backends, kernels
from . import conformance_cases
from .processes import Died, Worker


@dataclass(frozen=True)
class Conformance:
    """Of one backend on one device.

    Attributes:
        kernels: each with the instructions that it uses.
        differs: the instructions that differ from what they should do, with the first case that says so, and how.
    """

    backend: str
    kernels: dict[str, tuple[str, ...]]
    differs: dict[str, str]

    @property
    def disabled(self) -> dict[str, str]:
        """The kernels that use what differs, with the reason."""
        return {
            kernel: f"{instruction} differs on this GPU: {self.differs[instruction]}"
            for kernel, used in self.kernels.items()
            for instruction in [next((one for one in used if one in self.differs), None)]
            if instruction is not None
        }


# -------------------------------------------------------------------------------------------- the worker's end


def answers(request: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """To the requests of `check`: ``{"among": names or None}`` lists the backends that have cases, with those for the
    device, ``{"backend": name, "case": name}`` runs one.

    A process whose device reports an error ends: nothing that it says after that counts.
    """
    if "case" not in request:
        for backend in backends.available():
            is_asked = request["among"] is None or backend in request["among"]
            if is_asked and kernels.library_of(backend) is not None and backends.is_possible(backend, device):
                uses = {kernel["name"]: kernel["uses"] for kernel in kernels.table(backend)}
                cases = conformance_cases.possible(conformance_cases.cases(backend), device)
                tried = {name: case.uses for name, case in cases.items()}
                yield {"backend": backend, "cases": tried, "kernels": uses}
        return
    case = conformance_cases.cases(request["backend"])[request["case"]]
    wanted = conformance_cases.expected()[case.name]
    try:
        output = conformance_cases.run_case(request["backend"], case, device)
    except RuntimeError as error:
        print(str(error).strip().partition("\n")[0], file=sys.stderr)
        sys.exit(1)
    yield {"differs": conformance_cases.difference(case, output, wanted)}


# -------------------------------------------------------------------------------------------- the parent's end


def check(
    worker: Worker, among: Iterable[str] | None, patience: float, known: Iterable[str] = ()
) -> Iterator[Conformance]:
    """Tries the instructions of the backends that can run on the worker's device, but for those that are known.

    Args:
        among: only these backends; None for all.
        patience: seconds that a case may take.

    Raises:
        Died: the worker does not even say what there is.
    """
    request = {"among": None if among is None else list(among)}
    for found in list(worker.ask({"conformance": request}, patience)):
        if "failed" in found:
            raise Died(found["failed"])
        backend = found["backend"]
        if backend in known:
            continue
        cases = {name: tuple(uses) for name, uses in found["cases"].items()}
        whys = {name: _difference(worker, {"backend": backend, "case": name}, patience) for name in cases}
        yield Conformance(backend, {name: tuple(used) for name, used in found["kernels"].items()}, _blamed(cases, whys))


def _blamed(cases: Mapping[str, tuple[str, ...]], whys: Mapping[str, str]) -> dict[str, str]:
    """Of the cases that differ, and why, the instructions: of several in a case not those that passed one of their own,
    unless all of them did."""
    alone = {uses[0] for name, uses in cases.items() if len(uses) == 1 and not whys[name]}
    blamed: dict[str, str] = {}
    for name, uses in cases.items():
        for instruction in set(uses) - alone or uses if whys[name] else ():
            blamed.setdefault(instruction, whys[name])
    return blamed


def _difference(worker: Worker, request: dict[str, str], patience: float) -> str:
    try:
        (answer,) = worker.ask({"conformance": request}, patience)
    except Died as error:
        return f"{request['case']}: its process {error}"
    return str(answer["differs"] if "differs" in answer else f"{request['case']}: {answer['failed']}")

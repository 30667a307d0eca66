"""The operators by what was measured on this machine: imported when a table is in force, see
`fastconv.operators.measured`.

Two namespaces have an operator of each name. ``fastconv_measured`` hands a call on to the candidate of the table, below
autograd; so each pass is chosen on its own, and a candidate's block sizes or kernels hold for that call alone.
``fastconv_auto`` is for torch.compile: while a graph is made it turns into what the choice is for these sizes, a
constant of the graph: plain aten, which Inductor sees through, or an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .. import ops  # whose operators these are
from ..aten_kernels import OPERATORS
from ..operators import auto, backends, registration
from ..operators.schemas import SCHEMAS
from ..operators.tables import Candidate
from ..operators.variants import applied


def _measured(name: str) -> Callable[..., Any]:
    """Runs the candidate of a call's class."""
    operator, _, overload = name.partition(".")

    def kernel(*args: Any) -> Any:
        candidate = auto.one_pass(operator, args[:-1] if overload else args)
        namespace = backends.namespace(candidate.backend)
        if namespace is None:
            return OPERATORS[name](*args)
        with _variant_of(candidate):
            return getattr(getattr(getattr(torch.ops, namespace), operator), overload or "default")(*args)

    return kernel


# Made once for each candidate, which is kept so that no other one gets its identity: making one costs microseconds.
_contexts: dict[int, tuple[Candidate, AbstractContextManager[None]]] = {}
_CONTEXTS_KEPT = 4096


def _variant_of(candidate: Candidate) -> AbstractContextManager[None]:
    found = _contexts.get(id(candidate))
    if found is None:
        if len(_contexts) >= _CONTEXTS_KEPT:
            _contexts.clear()
        found = _contexts[id(candidate)] = candidate, applied(candidate.backend, candidate.variant)
    return found[1]


def _chosen(name: str) -> Callable[..., Any]:
    """Becomes what the choice is for the sizes of a graph that is being made."""

    def kernel(*args: Any) -> Any:
        return registration.public(name).on(auto.choose(name, args))(*args)

    return kernel


_measured_library = torch.library.Library(auto.MEASURED, "DEF")
_chosen_library = torch.library.Library(auto.CHOSEN, "DEF")
for _name, _schema in SCHEMAS.items():
    _measured_library.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _measured_library.impl(_name, _measured(_name), _key)
    if _name in ops.__all__:
        _chosen_library.define(_name + _schema)
        _chosen_library.impl(_name, _chosen(_name), "CompositeImplicitAutograd")
registration.add_namespace(auto.MEASURED)

"""What ``auto`` does with a call where a table of this machine is in force: the namespace whose operator is called."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from . import backends, kernels, measured
from .destinations import tensors
from .tables import Candidate

MODULE = "fastconv.auto_kernels"
# Namespaces of that module, which says what they are for.
MEASURED, CHOSEN = "fastconv_measured", "fastconv_auto"
_DEFAULTS = {name: Candidate(name, outcome="ok") for name in ("cpu", "reference")}


def is_on(backend: str | None, device: torch.device) -> bool:
    """Whether a call with this ``backend=`` is for the tables to decide.

    Where a backend with CUDA kernels is asked for, the tables still say which of these must not run.
    """
    if backends.is_auto(backend):
        return _prepare(device)
    if _has_kernels(backends.current() if backend is None else backend):
        _prepare(device)
    return False


def _prepare(device: torch.device) -> bool:
    """Whether a table is in force; then also what runs by it is there. What is exported runs on other machines."""
    # Asked here, as Dynamo of torch 2.11 takes it to be true in whatever it traces.
    if torch.compiler.is_exporting() or not measured.in_force(device):
        return False
    importlib.import_module(MODULE)
    return True


def _has_kernels(backend: object) -> bool:
    return isinstance(backend, str) and kernels.library_of(backend) is not None


# See fastconv.operators.backends.
_prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(operator: str, args: Sequence[Any]) -> str | None:
    """The namespace for a call, None for plain aten. In training each pass may have its own."""
    candidate, backward_is_aten = measured.choice(operator, args)
    if candidate is None:
        return backends.namespace(backends.default(args[0].device))
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors(args))
    if candidate.backend == "reference":
        return None if not needs_grad or backward_is_aten else MEASURED
    return MEASURED if needs_grad or candidate.variant else backends.namespace(candidate.backend)


def one_pass(operator: str, args: Sequence[Any]) -> Candidate:
    """What runs one pass of a call."""
    return measured.choice(operator, args).candidate or _DEFAULTS[backends.default(tensors(args)[0].device)]

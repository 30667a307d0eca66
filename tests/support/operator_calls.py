"""Calls of operators that the cases make, forward and backward, as a qualification collects them."""

from __future__ import annotations

import torch

from fastconv.measure.calls import Layer, mapped, named_tensors
from fastconv.qualification.calls import OperatorCall
from fastconv.qualification.collecting import recording
from support.cases import CASES

CPU = torch.device("cpu")


def calls_of(layer: Layer, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> list[OperatorCall]:
    """The forward and the backward of a case."""
    arguments = mapped(layer.tensors(dtype, layout, CPU), lambda tensor: tensor.requires_grad_())
    with recording() as collected:
        outputs = layer(arguments, None)
        leaves = [tensor for _, tensor in named_tensors(arguments)]
        torch.autograd.grad(outputs, leaves, [torch.randn_like(out) for out in outputs])
    return list(collected.calls.values())


def of(op: str, name: str, layout: str = "channels_last") -> list[OperatorCall]:
    """The forward and the backward of one case."""
    (case,) = [case for case in CASES if (case.op, case.name) == (op, name)]
    return calls_of(case, layout)


def first_of_each() -> list[OperatorCall]:
    found: dict[str, OperatorCall] = {}
    for case in CASES:
        if case.op not in found and len(case.shapes["input"]) == 4:
            for call in calls_of(case, "channels_last"):
                found.setdefault(call.operator, call)
    return list(found.values())


def with_relu6() -> dict[str, OperatorCall]:
    """All of the cases in which a ReLU6 is."""
    cases = [case for case in CASES if "relu6" in case.options.values() and len(case.shapes["input"]) > 3]
    return {f"{case.name}-{call.operator}": call for case in cases for call in calls_of(case)}


CALLS = first_of_each()

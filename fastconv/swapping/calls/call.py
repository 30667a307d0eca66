"""What all calls have that stand in a graph for nodes of a forward.

A call refers to the user's modules and reads them when it is called. It holds no tensors of its own, so that what it
computes follows every change of the parameters, is differentiable, and can be compiled and exported. What a call for
inference holds besides is `Prepared`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ...operators import auto, backends, measured, table_text

OperatorCall = tuple[str, tuple[Any, ...]]


class Prepared(Protocol):
    """Weights made ready for inference, which `fastconv.swapping.staleness.PreparedWeights` keeps up to date."""

    def sources(self) -> list[tuple[dict[str, Tensor | None], str]]:
        """Where the tensors that are prepared live: dictionary and name."""

    def settings(self) -> tuple[Any, ...]:
        """What else the prepared weights depend on."""

    def prepare(self) -> None:
        """Makes them ready as they are now."""


class Call(abc.ABC):
    """A function of tensors, which returns new memory; of several results, a tuple.

    Attributes:
        __name__: what generated code calls it.
    """

    __name__: str
    __call__: Callable[..., Any]

    @property
    def prepared(self) -> Sequence[Prepared]:
        """What it keeps ready. A call that has any may return channels_last whatever its inputs are, see
        `fastconv.swapping.layout`."""
        return ()

    @abc.abstractmethod
    def op(self) -> str:
        """The name of the op that it runs, for explanations."""

    def operator_call(self, *inputs: Any) -> OperatorCall | None:
        """The operator that it comes down to for these inputs, and its arguments, for explanations; None where that is
        not one."""
        return None

    def kernel(self, *inputs: Any) -> str:
        """What runs for these inputs, in words."""
        return kernel_of(self.op(), inputs[0], self.operator_call(*inputs))


def result_of(results: tuple[Tensor, ...], index: int) -> Tensor:
    """One of a call's several results: in graphs, to be told from what a forward takes of a value."""
    return results[index]


def kernel_of(op: str, input: Tensor, call: OperatorCall | None) -> str:
    """What runs for an op, in words."""
    backend = backends.choose(None, input)
    if call is not None and auto.is_on(None, input.device):
        found = measured.choice(*call).candidate
        backend = backend if found is None else table_text.name(found.backend, found.variant)
    return f"{op} {str(input.dtype).removeprefix('torch.')}, {backend}"

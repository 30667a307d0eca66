"""activation(a + b), of sums that no convolution takes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..calls.addition import FusedAdd
from ..matching.activations import ATTRIBUTES, take_activation
from ..matching.effects import Effect
from ..matching.matcher import Match, Matcher


@dataclass(eq=False)
class Addition(Match):
    activation: str = "none"

    takes = "another addition takes it"
    attributes = ATTRIBUTES

    @classmethod
    def at(cls, node: fx.Node, matcher: Matcher) -> Addition | None:
        operands = addition_of(node) if matcher.match_of(node) is None else None
        if operands is None or not all(isinstance(value, fx.Node) for value in operands):
            return None
        if matcher.effects.of[node] is Effect.IN_PLACE and not matcher.effects.is_private(operands[0]):
            return None
        match = cls([node], ["add"])
        match.activation = take_activation(match, matcher)
        return None if match.activation == "none" else match

    def call(self, fold: bool) -> FusedAdd:
        return FusedAdd(self.activation)


def addition_of(node: fx.Node) -> tuple[Any, Any] | None:
    """The operands, if the node is a plain addition of two different values."""
    functions = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    methods = node.op == "call_method" and node.target in ("add", "add_")
    if not (functions or methods) or len(node.args) != 2 or node.kwargs or node.args[0] is node.args[1]:
        return None
    return node.args[0], node.args[1]

"""A local response norm, with the activation before it if nobody else reads what goes into that, or what comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx, nn

from ..calls.normalization import FusedLRN
from ..matching.activations import ATTRIBUTES, activation_of
from ..matching.effects import Effect
from ..matching.matcher import Match, Matcher


@dataclass(eq=False)
class Normalization(Match):
    module: nn.LocalResponseNorm | None  # None for a call of the function
    activation: str = "none"

    takes = "the LRN takes the activation"
    attributes = ATTRIBUTES

    @classmethod
    def at(cls, node: fx.Node, matcher: Matcher) -> Normalization | None:
        if not _is_lrn(node, matcher):
            return None
        module = matcher.module(node)
        (value,) = node.all_input_nodes
        activation = activation_of(value, matcher)
        if (
            activation is not None
            and len(value.users) == 1
            and matcher.effects.is_private(value.all_input_nodes[0])
            and matcher.match_of(value) is None
        ):
            return cls([value, node], [activation, "lrn"], module, activation)
        return cls([node], ["lrn"], module)

    @property
    def layers(self) -> list[fx.Node]:
        return self.nodes[-1:]

    def call(self, fold: bool) -> FusedLRN:
        (node,) = self.layers
        named = {name: value for name, value in node.kwargs.items() if name != "input"}
        return FusedLRN(self.module, node.args[1:], named, self.activation)


def _is_lrn(node: fx.Node, matcher: Matcher) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_function":
        return node.target is F.local_response_norm
    return type(matcher.module(node)) is nn.LocalResponseNorm and matcher.effects.of[node] is Effect.NEW

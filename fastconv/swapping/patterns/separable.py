"""A depthwise convolution and the 1x1 convolution that alone reads it, each with what it has taken."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from ..calls.convolution import is_depthwise, is_pointwise
from ..calls.separable import FusedSeparable, PreparedSeparable
from ..matching.matcher import Match, Matcher
from .convolution import Convolution


@dataclass(eq=False)
class Separable(Match):
    depthwise: Convolution
    pointwise: Convolution

    takes = Convolution.takes

    @classmethod
    def at(cls, node: fx.Node, matcher: Matcher) -> Separable | None:
        one = matcher.match_of(node)
        if not isinstance(one, Convolution) or node is not one.nodes[0]:
            return None
        readers = list(one.nodes[-1].users)
        two = matcher.match_of(readers[0]) if len(readers) == 1 else None
        if not isinstance(two, Convolution) or readers[0] is not two.nodes[0] or not _are_separable(one, two):
            return None
        return cls(one.nodes + two.nodes, one.parts + two.parts, one, two, reason=two.reason)

    @property
    def layers(self) -> list[fx.Node]:
        return self.depthwise.layers + self.pointwise.layers

    @property
    def depends_on(self) -> list[tuple[nn.Module, str]]:
        of_pointwise = [(self.pointwise.conv, name) for name in ("groups", "stride", "padding")]
        return [(self.depthwise.conv, "groups"), *of_pointwise]

    def call(self, fold: bool) -> FusedSeparable:
        kind = PreparedSeparable if fold else FusedSeparable
        return kind(self.depthwise.convolution(fold), self.pointwise.convolution(fold))


def _are_separable(one: Convolution, two: Convolution) -> bool:
    return (
        is_depthwise(one.conv)
        and is_pointwise(two.conv)
        and tuple(two.conv.stride) == (1, 1)
        and not any(match.has_residual or match.pool is not None for match in (one, two))
    )

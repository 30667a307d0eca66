"""What can be fused: a file for each pattern, with how it matches and which call replaces it.

A pattern is a subclass of `fastconv.swapping.matching.matcher.Match` in `PATTERNS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from ..matching.effects import ATTRIBUTES
from ..matching.matcher import Match, Matcher
from .addition import Addition
from .convolution import Convolution
from .normalization import Normalization
from .separable import Separable

# In the order in which they are looked for; of those that want the same node, the first has it.
PATTERNS: tuple[type[Match], ...] = (
    Normalization,  # before the convolutions, as an activation costs less in the LRN after it
    Convolution,
    Addition,  # those that no convolution has taken
    Separable,  # made of convolutions
)


@dataclass(frozen=True)
class Findings:
    """What can be fused in a graph.

    Attributes:
        matches: in the order of their first nodes.
        skipped: convolutions left alone, each with the reason.
    """

    matches: list[Match]
    skipped: dict[fx.Node, str]


def attributes() -> list[str]:
    """The attributes of layers on which it depends what is found; all others are read at every call."""
    return list(dict.fromkeys([*ATTRIBUTES, *(name for pattern in PATTERNS for name in pattern.attributes)]))


def find(graph: fx.Graph, modules: dict[str, nn.Module], *, fold: bool) -> Findings:
    """All fusions in the graph. Nothing is changed here.

    Args:
        graph: a traced forward.
        modules: the modules that its call_module nodes name.
        fold: whether batch norms in evaluation mode may be folded into convolutions.
    """
    matcher = Matcher(graph, modules, fold)
    for pattern in PATTERNS:
        for node in reversed(graph.nodes) if pattern.from_the_end else graph.nodes:
            match = pattern.at(node, matcher)
            if match is not None and matcher.is_sound(match):
                matcher.take(match)
    order = matcher.effects.order
    return Findings(sorted(matcher.matches, key=lambda match: order[match.nodes[0]]), matcher.skipped)

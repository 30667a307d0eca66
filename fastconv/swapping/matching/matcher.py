"""Who reads a value, and which nodes one call may stand for: what patterns are written over.

A value goes on in one of three ways. A *chain*: it has one reader, which a match may grow by (`Matcher.next`).
*Siblings*: several nodes read it, and may run at once (`Matcher.siblings`). A *join*: with others, it goes into a
concatenation (`Matcher.join`). Each is given only where the graph proves that nobody can tell the difference: nothing
overwrites what a call reads at another time than the nodes that it stands for, and what lies within has no other
reader.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx, nn

from ..calls.call import Call
from .effects import CONCATENATIONS, Effect, Effects


@dataclass(eq=False)
class Match(abc.ABC):
    """Nodes that one call replaces. A subclass is a pattern: `at` is how it matches, `call` what replaces it.

    Attributes:
        nodes: in graph order.
        parts: what they do, in words, as "conv" and "relu".
        reason: why it is not larger; empty if there is nothing to say.
        from_the_end: whether nodes are tried from the last to the first.
        takes: what others are told who would have had one of the nodes.
        attributes: those of layers on which it depends whether it matches, beside effects.
    """

    nodes: list[fx.Node]
    parts: list[str]
    reason: str = field(default="", kw_only=True)

    from_the_end: ClassVar[bool] = False
    takes: ClassVar[str] = "another pattern takes it"
    attributes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abc.abstractmethod
    def at(cls, node: fx.Node, matcher: Matcher) -> Match | None:
        """The match that this node leads to, if it does to any.

        It may have all the nodes of another match, in whose place it then is. A layer that a user would expect in it,
        and that cannot be, is noted by `Matcher.skip`.
        """

    @abc.abstractmethod
    def call(self, fold: bool) -> Call | None:
        """What computes the results of the `arguments`; None if the nodes are better left alone.

        Args:
            fold: for inference, with prepared weights; else differentiable.
        """

    @property
    def depends_on(self) -> Sequence[tuple[nn.Module, str]]:
        """Further attributes, of its own layers, without which it would not hold and which the call does not read."""
        return ()

    @property
    def pattern(self) -> str:
        return " + ".join(self.parts)

    @property
    def layers(self) -> list[fx.Node]:
        """The nodes that it goes by in explanations, the one that stands for all first; of several results, each its
        own."""
        return self.nodes[:1]

    @property
    def results(self) -> list[fx.Node]:
        """The nodes whose values others read, in graph order; the call returns a tuple where there are several."""
        return self.nodes[-1:]

    @property
    def arguments(self) -> list[fx.Node]:
        """The values that the call takes."""
        return [value for value, _ in self.reads()]

    def reads(self) -> list[tuple[fx.Node, fx.Node]]:
        """The values that come from outside, each with the node that reads it."""
        return [(value, node) for node in self.nodes for value in node.all_input_nodes if value not in self.nodes]


@dataclass(frozen=True)
class Join:
    """A concatenation.

    Attributes:
        node: what concatenates.
        values: all that it concatenates, in order.
        dim: along which dimension.
    """

    node: fx.Node
    values: tuple[fx.Node, ...]
    dim: int


class Matcher:
    """A graph, and what has been found in it.

    Args:
        graph: a traced forward.
        modules: the modules that its call_module nodes name.
        fold: whether batch norms in evaluation mode may be folded into convolutions.

    Attributes:
        effects: what the nodes do to memory.
        matches: what has been found, in the order in which it was.
        skipped: nodes left alone, each with the reason.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], fold: bool) -> None:
        self.fold = fold
        self.effects = Effects(graph, modules)
        self.matches: list[Match] = []
        self.skipped: dict[fx.Node, str] = {}
        self._modules = modules
        self._calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self._taken: dict[fx.Node, Match] = {}

    # What a node is

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that the node calls."""
        return self._modules[node.target] if node.op == "call_module" else None

    def times_called(self, node: fx.Node) -> int:
        """How often the graph calls the module that the node calls."""
        return self._calls[node.target]

    def describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self._modules[node.target]).__name__
        return "the end of the forward" if node.op == "output" else str(getattr(node.target, "__name__", node.target))

    # What has been found

    def match_of(self, node: fx.Node) -> Match | None:
        """The match that has the node."""
        return self._taken.get(node)

    def is_sound(self, match: Match) -> bool:
        """Whether one call can stand for the nodes, made where the first result is: what it reads is there by then, and
        the same as for the nodes that read it; and what it does not return has no other reader."""
        order, nodes, first = self.effects.order, set(match.nodes), match.results[0]
        inner = nodes - set(match.results)
        if any(reader not in nodes for node in inner for reader in node.users):
            return False
        return not any(
            order[value] > order[first] or self.effects.is_written(value, *sorted((node, first), key=order.__getitem__))
            for value, node in match.reads()
        )

    def take(self, match: Match) -> None:
        """Keeps a match, in place of those that are part of it."""
        parts = {id(part): part for part in map(self.match_of, match.nodes) if part is not None}
        for part in parts.values():
            if not set(part.nodes) <= set(match.nodes):
                raise ValueError(f"{match.pattern} takes one of the nodes of {part.pattern}, and not all")
        self.matches = [known for known in self.matches if id(known) not in parts] + [match]
        self._taken.update(dict.fromkeys(match.nodes, match))

    def skip(self, node: fx.Node, reason: str) -> None:
        self.skipped[node] = reason

    # Chains

    def next(self, match: Match) -> fx.Node | None:
        """The one node that reads the match's result, if it may grow by that; else the match gets the reason."""
        readers = list(match.nodes[-1].users)
        if len(readers) != 1:
            match.reason = "its result has several readers" if readers else "nobody reads its result"
            return None
        (reader,) = readers
        taken = self.match_of(reader)
        if taken is not None:
            match.reason = taken.takes
            return None
        if any(self.effects.is_written(value, node, reader) for value, node in match.reads()):
            match.reason = "its input may be overwritten before the next step"
            return None
        return reader

    # Siblings

    def siblings(self, value: fx.Node, node: fx.Node, is_kind: Callable[[fx.Node], bool]) -> list[fx.Node]:
        """The readers of a value that are of a kind and meet the same content as one of them does, in graph order.

        Args:
            value: what is read.
            node: one of its readers, and of the kind.
            is_kind: whether a reader is of the kind.

        Returns:
            The nodes, `node` among them, between the first and the last of which nothing overwrites the value,
            themselves included; `node` alone if that overwrites it.
        """
        readers = sorted(value.users, key=self.effects.order.__getitem__)
        found = [reader for reader in readers if is_kind(reader)]
        at = found.index(node)
        start = stop = at
        while start > 0 and not self._parts(found[start - 1], found[start], value):
            start -= 1
        while stop < len(found) - 1 and not self._parts(found[stop], found[stop + 1], value):
            stop += 1
        return found[start : stop + 1]

    def _parts(self, one: fx.Node, other: fx.Node, value: fx.Node) -> bool:
        """Whether two readers may meet different contents, or one of them makes them so."""
        writes = self.effects.writes
        return writes(one, value) or writes(other, value) or self.effects.is_written(value, one, other)

    # Joins

    def join(self, values: Sequence[fx.Node], dim: int = 1) -> Join | None:
        """The concatenation along a dimension that all the values go into, each once and nowhere else.

        None if there is none: one of them has another reader or is read twice, something may overwrite one of them
        before the concatenation, the dimension is another or counted from the end, or something other than nodes is
        concatenated.
        """
        readers = {reader for value in values for reader in value.users}
        if len(readers) != 1:
            return None
        (node,) = readers
        joined = _concatenation(node) if self.effects.of[node] is Effect.NEW else None
        if joined is None or joined.dim != dim or any(joined.values.count(value) != 1 for value in values):
            return None
        return None if any(self.effects.is_written(value, value, node) for value in values) else joined


def _concatenation(node: fx.Node) -> Join | None:
    if node.op != "call_function" or node.target not in CONCATENATIONS:
        return None
    args = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    values, dim = args.get("tensors"), args.get("dim", args.get("axis", 0))
    if not isinstance(values, Sequence) or not all(isinstance(value, fx.Node) for value in values):
        return None
    return Join(node, tuple(values), dim) if type(dim) is int else None

"""What patterns are written over: chains, siblings and joins in small graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fastconv.swapping.matching.matcher import Match, Matcher
from fastconv.swapping.tracing.tracer import trace


class Net(nn.Module):
    """A forward over 1x1 convolutions a, b, c and d."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        for name in "abcd":
            self.add_module(name, nn.Conv2d(8, 8, 1))
        self.run = run

    def forward(self, *args: Tensor) -> Any:
        return self.run(self, *args)


def matched(run: Callable[..., Any], inputs: int = 1) -> tuple[Matcher, dict[str, fx.Node]]:
    """A matcher over the graph of a forward, and the nodes by their names."""
    net = Net(run).eval()
    graph, _ = trace(net, (torch.empty(0),) * inputs, {})
    return Matcher(graph, dict(net.named_modules()), fold=True), {node.name: node for node in graph.nodes}


@dataclass(eq=False)
class Some(Match):
    """Nodes that are given."""

    def call(self, fold: bool) -> Any:
        raise NotImplementedError

    @classmethod
    def at(cls, node: fx.Node, matcher: Matcher) -> None:
        return None


# ---------------------------------------------------------------------------------------------------- siblings


def _between(change: Callable[..., Any]) -> Callable[..., Any]:
    """Convolutions a and b, then c, of one value, and something between that does something to it."""

    def run(net: Net, x: Tensor, *others: Tensor) -> Any:
        value = net.d(x)
        return net.a(value), net.b(value), change(value, x, *others), net.c(value)

    return run


SIBLINGS = {
    "nothing": (lambda v, x: x, ["abc"]),
    "another reader": (lambda v, x: v + 1, ["abc"]),
    "a shape": (lambda v, x: v.shape, ["abc"]),
    "of another value": (lambda v, x: torch.sort(x * 2), ["abc"]),
    "overwritten": (lambda v, x: v.mul_(2), ["ab", "c"]),
    "overwritten by a view": (lambda v, x: v.flatten(1).mul_(2), ["ab", "c"]),
    "overwritten by an alias": (lambda v, x: v.relu_().add_(1), ["ab", "c"]),
    "unknown": (lambda v, x: torch.sort(v), ["ab", "c"]),
    "out=": (lambda v, x: torch.add(x, 1, out=v), ["ab", "c"]),
}


@pytest.mark.parametrize(("change", "expected"), SIBLINGS.values(), ids=SIBLINGS)
def test_siblings(change, expected):
    """Every node is a sibling of the same ones, whichever it is asked of."""
    matcher, nodes = matched(_between(change))
    for group in expected:
        for name in group:
            found = matcher.siblings(nodes["d"], nodes[name], lambda node: node.name in "abc")
            assert [node.name for node in found] == list(group)


def test_siblings_of_what_the_caller_may_have_twice():
    """Two arguments may be one tensor."""

    def run(net: Net, x: Tensor, y: Tensor) -> Any:
        return net.a(x), y.mul_(2), net.b(x), net.c(x)

    matcher, nodes = matched(run, inputs=2)
    found = matcher.siblings(nodes["input_0"], nodes["c"], lambda node: node.op == "call_module")
    assert [node.name for node in found] == ["b", "c"]


def test_siblings_are_of_the_kind_and_no_writers():
    def run(net: Net, x: Tensor) -> Any:
        value = net.d(x)
        return net.a(value), torch.relu(value), net.b(value), torch.relu_(value), value.sigmoid()

    matcher, nodes = matched(run)
    value = nodes["d"]
    assert matcher.siblings(value, nodes["b"], lambda node: node.op == "call_module") == [nodes["a"], nodes["b"]]
    assert matcher.siblings(value, nodes["relu_"], lambda node: True) == [nodes["relu_"]]
    assert matcher.siblings(value, nodes["sigmoid"], lambda node: True) == [nodes["sigmoid"]]
    assert matcher.siblings(value, nodes["relu"], lambda node: True) == [nodes["a"], nodes["relu"], nodes["b"]]


# ------------------------------------------------------------------------------------------------------- joins

JOINS = {
    "cat": lambda net, a, b, c: torch.cat([a, b, c], 1),
    "concat": lambda net, a, b, c: torch.concat((a, b, c), dim=1),
    "concatenate": lambda net, a, b, c: torch.concatenate([a, b, c], 1),
    "axis": lambda net, a, b, c: torch.concatenate([a, b, c], axis=1),
    "keywords": lambda net, a, b, c: torch.cat(tensors=[a, b, c], dim=1),
    "and no more than a shape of another": lambda net, a, b, c: (torch.cat([a, b, c], 1), net.d(a * 0).shape)[0],
}
NO_JOINS = {
    "rows": lambda net, a, b, c: torch.cat([a, b, c], 2),
    "no dim": lambda net, a, b, c: torch.cat([a, b, c]),
    "from the end": lambda net, a, b, c: torch.cat([a, b, c], -3),
    "a dim that is computed": lambda net, a, b, c: torch.cat([a, b, c], net.d.weight.dim() - 3),
    "another reader": lambda net, a, b, c: (torch.cat([a, b, c], 1), b + 1),
    "returned": lambda net, a, b, c: (torch.cat([a, b, c], 1), a),
    "read twice": lambda net, a, b, c: torch.cat([a, b, b, c], 1),
    "joined twice": lambda net, a, b, c: torch.cat([a, b, c], 1) + torch.cat([a, b, c], 1),
    "one is not": lambda net, a, b, c: (torch.cat([a, c], 1), b * 2),
    "stacked": lambda net, a, b, c: torch.stack([a, b, c], 1),
    "out=": lambda net, a, b, c: torch.cat([a, b, c], 1, out=net.d(a.detach())),
}


@pytest.mark.parametrize("join", [JOINS[name] for name in list(JOINS)[:5]], ids=list(JOINS)[:5])
def test_joins(join):
    matcher, nodes = matched(lambda net, x: join(net, net.a(x), net.b(x), net.c(x)))
    values = [nodes[name] for name in "abc"]
    for some in (values, values[::-1], values[1:]):
        found = matcher.join(some)
        assert found is not None
        assert found.node.name.startswith("conc") or found.node.name == "cat"
        assert (list(found.values), found.dim) == (values, 1)
        assert matcher.join(some, dim=2) is None


@pytest.mark.parametrize("join", NO_JOINS.values(), ids=NO_JOINS)
def test_what_is_no_join(join):
    matcher, nodes = matched(lambda net, x: join(net, net.a(x), net.b(x), net.c(x)))
    assert matcher.join([nodes[name] for name in "abc"]) is None


def test_joins_of_values_that_others_read():
    """Of what else is concatenated nothing is asked."""
    matcher, nodes = matched(lambda net, x: (y := net.c(x), torch.cat([net.a(x), x, y, net.b(x)], 1)))
    found = matcher.join([nodes["a"], nodes["b"]])
    assert [value.name for value in found.values] == ["a", "input_0", "c", "b"]
    assert matcher.join([nodes["a"], nodes["c"]]) is None


def test_joins_of_values_that_are_overwritten():
    def run(net: Net, x: Tensor) -> Any:
        a, b = net.a(x), net.b(x)
        view, inner = a.flatten(1), b.relu_()
        view.mul_(2)
        return torch.cat([inner, net.c(x)], 1), view

    matcher, nodes = matched(run)
    assert matcher.join([nodes["relu_"], nodes["c"]]).node is nodes["cat"]

    def written(net: Net, x: Tensor) -> Any:
        a = net.a(x)
        inner = a.relu_()
        a.mul_(2)
        return torch.cat([inner, net.c(x)], 1)

    matcher, nodes = matched(written)
    assert matcher.join([nodes["relu_"], nodes["c"]]) is None


def test_a_list_that_is_computed_is_no_join():
    matcher, nodes = matched(lambda net, x: torch.cat(net.a(x).chunk(2), 1))
    assert matcher.join([nodes["chunk"]]) is None


# ----------------------------------------------------------------------------------------------------- matches


def test_a_match_is_taken_as_a_whole():
    matcher, nodes = matched(lambda net, x: net.c(net.b(net.a(x))))
    a, b, c = (nodes[name] for name in "abc")
    small = Some([a, b], ["a", "b"])
    matcher.take(small)
    with pytest.raises(ValueError, match=r"b \+ c takes one of the nodes of a \+ b, and not all"):
        matcher.take(Some([b, c], ["b", "c"]))
    assert matcher.matches == [small]
    large = Some([a, b, c], ["a", "b", "c"])
    matcher.take(large)
    assert matcher.matches == [large]
    assert {matcher.match_of(node) for node in (a, b, c)} == {large}


def test_chains():
    matcher, nodes = matched(lambda net, x: (y := net.b(net.a(x)), torch.sort(y), net.c(y)))
    match = Some([nodes["a"]], ["a"])
    assert matcher.next(match) is nodes["b"]
    match.nodes.append(nodes["b"])
    assert matcher.next(match) is None
    assert match.reason == "its result has several readers"


class Several(Some):
    @property
    def results(self) -> list[fx.Node]:
        return self.nodes


SOUND = {
    "siblings": (lambda net, x: (net.a(x), net.b(x)), True),
    "a step between": (lambda net, x: (net.a(x), net.c(x), net.b(x)), True),
    "overwritten between": (lambda net, x: (net.a(x), x.mul_(2), net.b(x)), False),
    "not there yet": (lambda net, x: (net.a(x), net.b(net.d(x))), False),
}


@pytest.mark.parametrize(("run", "expected"), SOUND.values(), ids=SOUND)
def test_what_one_call_may_stand_for(run, expected):
    matcher, nodes = matched(run)
    assert matcher.is_sound(Several([nodes["a"], nodes["b"]], ["a", "b"])) is expected


def test_what_lies_within_a_match_has_no_other_reader():
    matcher, nodes = matched(lambda net, x: (y := net.a(x), net.b(y)))
    assert not matcher.is_sound(Some([nodes["a"], nodes["b"]], ["a", "b"]))

"""Patterns that are added: one over siblings with several results, one over a join, each a class and a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fastconv import explain
from fastconv.swapping import patterns, swap
from fastconv.swapping.calls.call import Call
from fastconv.swapping.calls.convolution import FusedConv, is_pointwise
from fastconv.swapping.matching.matcher import Match, Matcher
from fastconv.swapping.patterns.convolution import Convolution
from support.swap_models import ConvBN, agree, agree_in_training, features, seeded


class Parallel(Call):
    """Convolutions of one input, as a tuple."""

    __name__ = "parallel"

    def __init__(self, convs: list[FusedConv]) -> None:
        self.convs = convs

    @property
    def prepared(self) -> list[Any]:
        return [one for conv in self.convs for one in conv.prepared]

    def __call__(self, input: Tensor) -> tuple[Tensor, ...]:
        return tuple(conv(input) for conv in self.convs)

    def op(self) -> str:
        return "parallel"


@dataclass(eq=False)
class Siblings(Match):
    """1x1 convolutions of one value, each with what it has taken."""

    convs: list[Convolution]

    @classmethod
    def at(cls, node: fx.Node, matcher: Matcher) -> Siblings | None:
        def is_kind(node: fx.Node) -> bool:
            match = matcher.match_of(node)
            return isinstance(match, Convolution) and is_pointwise(match.conv) and not match.has_residual

        if not is_kind(node):
            return None
        found = matcher.siblings(node.args[0], node, is_kind)
        if len(found) < 2:
            return None
        order = matcher.effects.order
        convs = sorted(map(matcher.match_of, found), key=lambda conv: order[conv.nodes[-1]])
        nodes = sorted((one for conv in convs for one in conv.nodes), key=order.__getitem__)
        return cls(nodes, [part for conv in convs for part in conv.parts], convs)

    @property
    def layers(self) -> list[fx.Node]:
        return [conv.nodes[0] for conv in self.convs]

    @property
    def results(self) -> list[fx.Node]:
        return [conv.nodes[-1] for conv in self.convs]

    @property
    def arguments(self) -> list[fx.Node]:
        return super().arguments[:1]

    def call(self, fold: bool) -> Call:
        return Parallel([conv.convolution(fold) for conv in self.convs])


class Slices(Call):
    """Convolutions, and values as they are, written side by side."""

    __name__ = "slices"

    def __init__(self, convs: list[FusedConv | None]) -> None:
        self.convs = convs

    @property
    def prepared(self) -> list[Any]:
        return [one for conv in self.convs if conv is not None for one in conv.prepared]

    def __call__(self, *inputs: Tensor) -> Tensor:
        pairs = zip(inputs, self.convs, strict=True)
        return torch.cat([value if conv is None else conv(value) for value, conv in pairs], 1)

    def op(self) -> str:
        return "slices"


@dataclass(eq=False)
class Joined(Match):
    """Convolutions that go into one concatenation, which may have other values."""

    values: list[tuple[fx.Node, Convolution | None]]  # what is read, and which convolution of it is concatenated

    @classmethod
    def at(cls, node: fx.Node, matcher: Matcher) -> Joined | None:
        operands = {one: matcher.match_of(one) for one in node.all_input_nodes}
        convs = {
            one: match
            for one, match in operands.items()
            if isinstance(match, Convolution) and one is match.nodes[-1] and not match.has_residual
        }
        join = matcher.join(list(convs)) if convs else None
        if join is None or join.node is not node:
            return None
        nodes = sorted([*(n for conv in convs.values() for n in conv.nodes), node], key=matcher.effects.order.get)
        values = [(convs[one].nodes[0].args[0], convs[one]) if one in convs else (one, None) for one in join.values]
        return cls(nodes, ["cat"], values)

    @property
    def layers(self) -> list[fx.Node]:
        return self.nodes[-1:]

    @property
    def arguments(self) -> list[fx.Node]:
        return [value for value, _ in self.values]

    def call(self, fold: bool) -> Call:
        return Slices([None if conv is None else conv.convolution(fold) for _, conv in self.values])


class Inception(nn.Module):
    """Branches of 1x1 convolutions of one value, some of them followed by others, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(8, 8, 3, padding=1, relu=nn.ReLU())
        self.one, self.two, self.three = (ConvBN(8, n, 1, relu=nn.ReLU(inplace=True)) for n in (4, 6, 2))
        self.after = ConvBN(6, 8, 3, padding=1, relu=nn.ReLU())
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.one(x), self.after(self.two(x)), self.pool(x), self.three(x)], 1)


class Overwriting(Inception):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        one = self.one(x)
        x.mul_(2)
        return torch.cat([one, self.after(self.two(x)), self.three(x)], 1)


@pytest.mark.parametrize("added", [(Siblings,), (Joined,), (Siblings, Joined), (Joined, Siblings)])
@pytest.mark.parametrize("model", [Inception, Overwriting])
def test_patterns_that_are_added(model, added, monkeypatch):
    monkeypatch.setattr(patterns, "PATTERNS", (*patterns.PATTERNS, *added))
    net = seeded(model()).eval()
    fast = swap(net)
    explanation = explain(fast, features())
    ops = {row.module: (str(row.inference), row.training.op) for row in explanation.rows}
    if added[0] is Siblings:
        first, second = ("two.0", "three.0") if model is Overwriting else ("one.0", "two.0")
        words = " + ".join(["conv + bn + relu"] * (2 if model is Overwriting else 3))
        assert ops[first][0] == f"{words} -> parallel"
        assert ops[second][0] == f"with {first} -> parallel"
        shapes = {kernel.module: kernel.shapes for kernel in explanation.kernels}
        assert shapes["two.0"] == "(2, 8, 12, 12) -> (2, 6, 12, 12)"
        assert shapes["three.0"] == "(2, 8, 12, 12) -> (2, 2, 12, 12)"
    elif model is Inception:
        assert ops["<cat>"][0] == "cat -> slices"
    else:  # one of the convolutions reads what is overwritten before the others run
        assert "slices" not in str(explanation)
    agree(fast, net, features())
    agree(fast, net, features().contiguous(memory_format=torch.channels_last))
    if model is Inception:  # the other has no gradient in eager, either
        agree_in_training(net, features())
        agree_in_training(net.train(), features())

"""A convolution, and as much of what follows it as can be attached: batch norm, addition, activation, max pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..calls.convolution import FusedConv
from ..calls.prepared import PreparedConv
from ..matching.activations import ATTRIBUTES, take_activation
from ..matching.effects import Effect
from ..matching.matcher import Match, Matcher
from ..tracing.modules import has_hooks, runs_forward_of
from .addition import addition_of

_FUNCTIONAL = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d)


@dataclass(eq=False)
class Convolution(Match):
    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None = None
    has_residual: bool = False
    activation: str = "none"
    pool: Callable[[Tensor], Tensor] | None = None

    from_the_end = True  # of two convolutions whose results are added, the later one takes the addition
    takes = "another convolution takes the addition"
    attributes = (*ATTRIBUTES, "padding_mode", "num_features", "affine")

    @classmethod
    def at(cls, node: fx.Node, matcher: Matcher) -> Convolution | None:
        if matcher.match_of(node) is not None:
            return None
        if node.op == "call_function" and node.target in _FUNCTIONAL:
            matcher.skip(node, "it is a function, not a module")
        conv = matcher.module(node)
        if not is_convolution(conv):
            return None
        reason = _refusal(node, matcher)
        if reason is not None:
            matcher.skip(node, reason)
            return None
        match = cls([node], ["conv"], conv)
        match._take_bn(matcher)
        match._take_add(matcher)
        match.activation = take_activation(match, matcher)
        match._take_pool(matcher)
        return match

    def call(self, fold: bool) -> FusedConv | None:
        return self.convolution(fold) if fold or len(self.nodes) > 1 else None

    def convolution(self, fold: bool) -> FusedConv:
        """As `call`, whether it pays or not."""
        kind = PreparedConv if fold else FusedConv
        return kind(self.conv, self.bn, self.activation, self.has_residual, self.pool)

    def _take_bn(self, matcher: Matcher) -> None:
        node = matcher.next(self)
        bn = None if node is None else matcher.module(node)
        if not runs_forward_of(bn, nn.BatchNorm2d):
            return
        self.reason = _unfoldable(bn, self.conv) or ("" if matcher.fold else "a batch norm follows")
        if has_hooks(bn):
            self.reason = "the batch norm after it has hooks"
        elif matcher.times_called(node) > 1:
            self.reason = "the batch norm after it is shared"
        if not self.reason:
            self.bn = bn
            self.nodes.append(node)
            self.parts.append("bn")

    def _take_add(self, matcher: Matcher) -> None:
        node = None if self.reason else matcher.next(self)
        operands = None if node is None else addition_of(node)
        if operands is None:
            return
        value = self.nodes[-1]
        residual = operands[1] if operands[0] is value else operands[0]
        if not isinstance(residual, fx.Node):
            return
        overwrites = matcher.effects.of[node] is Effect.IN_PLACE and operands[0] is residual
        if overwrites and not matcher.effects.is_private(residual):
            self.reason = "the addition overwrites a value that others read"
            return
        self.has_residual = True
        self.nodes.append(node)
        self.parts.append("add")

    def _take_pool(self, matcher: Matcher) -> None:
        """In inference the activation can come after the pool, where there is less of it to compute."""
        if not matcher.fold or self.activation == "none":
            return
        node = matcher.next(self)
        self.pool = None if node is None else _max_pool(node, matcher)
        if self.pool is not None:
            self.nodes.append(node)
            self.parts.append("max_pool")
        self.reason = ""


def is_convolution(module: nn.Module | None) -> bool:
    """Whether the module is a convolution of any kind, supported or not."""
    cls = type(module)
    return isinstance(module, nn.modules.conv._ConvNd) or (
        cls.__module__.startswith("torch.ao.") and "Conv" in cls.__name__
    )


def _refusal(node: fx.Node, matcher: Matcher) -> str | None:
    """Why this convolution cannot be called any other way; None if it can."""
    conv, calls = matcher.module(node), matcher.times_called(node)
    if type(conv).__module__.startswith("fastconv."):
        return "it is a fastconv layer already"
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        return "its parameters are lazy: run the model once, then swap it"
    if has_hooks(conv):
        return "it has hooks"
    if not runs_forward_of(conv, nn.Conv2d):
        return f"{type(conv).__name__} is not supported"
    if "weight" not in conv._parameters:
        return "its weight is computed at every call (parametrization)"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r} is not supported"
    if not conv.weight.is_floating_point():
        return f"dtype {conv.weight.dtype} is not supported"
    if calls > 1:
        return f"it is shared: called {calls} times"
    if len(node.args) != 1 or node.kwargs:
        return "it is called with keyword arguments"
    return None


def _unfoldable(bn: nn.BatchNorm2d, conv: nn.Conv2d) -> str:
    """Why this batch norm cannot be folded into the weights; empty if it can."""
    if bn.training:
        return "the batch norm after it is training"
    if bn.running_mean is None or bn.running_var is None:
        return "the batch norm after it keeps no running statistics"
    if bn.num_features != conv.out_channels:
        return "the batch norm after it has another number of channels"
    if bn.affine and "weight" not in bn._parameters:
        return "the batch norm after it computes its parameters at every call (parametrization)"
    return ""


def _max_pool(node: fx.Node, matcher: Matcher) -> Callable[[Tensor], Tensor] | None:
    """The max pool that the node computes of its first argument."""
    if matcher.effects.of[node] is not Effect.NEW:
        return None
    module = matcher.module(node)
    if type(module) is nn.MaxPool2d and not module.return_indices:
        return module
    if node.target is F.max_pool2d and node.all_input_nodes == [*node.args[:1]]:
        settings: Any = node.args[1:]
        named: Any = node.kwargs
        return lambda value: F.max_pool2d(value, *settings, **named)
    return None

"""Finds what can be fused in a graph, and says for every other convolution why it cannot.

Nothing is changed here: a `Group` names the nodes that one fused call can stand for. It does so only where the graph
proves that nobody can tell the difference: each inner value has one reader, nothing overwrites what the call reads
later than before, and what was overwritten in place is read by nobody else.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .effects import Effect, Effects, argument
from .fused import is_depthwise, is_pointwise
from .tracing import has_hooks, runs_forward_of


@dataclass
class Group:
    """Nodes that one call replaces: in graph order, the last of which has the result."""

    nodes: list[fx.Node]
    parts: list[str]  # what they do, in words: "conv", "bn", "add", "relu", "relu6", "max_pool", "lrn"
    conv: nn.Conv2d | None = None
    bn: nn.BatchNorm2d | None = None
    residual: fx.Node | None = None
    activation: str = "none"
    pool: Callable[[Tensor], Tensor] | None = None  # a max pool that follows the activation
    pointwise: Group | None = None  # the 1x1 convolution that follows a depthwise one
    reason: str = ""  # why it is not larger

    @property
    def pattern(self) -> str:
        return " + ".join(self.parts)

    @property
    def layer(self) -> fx.Node:
        """The node that the group goes by: the LRN's, else the first."""
        return self.nodes[-1] if self.parts[-1] == "lrn" else self.nodes[0]

    def reads(self) -> list[tuple[fx.Node, fx.Node]]:
        """The values that come from outside, each with the node that reads it."""
        return [(value, node) for node in self.nodes for value in node.all_input_nodes if value not in self.nodes]

    @property
    def is_fused(self) -> bool:
        return len(self.parts) > 1 or self.parts == ["lrn"]


@dataclass
class Findings:
    groups: list[Group] = field(default_factory=list)
    skipped: dict[fx.Node, str] = field(default_factory=dict)  # convolutions left alone, with the reason


def find(graph: fx.Graph, modules: dict[str, nn.Module], *, fold: bool) -> Findings:
    """All fusions in the graph.

    Args:
        graph: a traced forward.
        modules: the modules that its call_module nodes name.
        fold: whether batch norms in evaluation mode may be folded into convolutions.
    """
    return _Finder(graph, modules, fold).find()


def is_convolution(module: nn.Module | None) -> bool:
    """Whether the module is a convolution of any kind, supported or not."""
    cls = type(module)
    return isinstance(module, nn.modules.conv._ConvNd) or (
        cls.__module__.startswith("torch.ao.") and "Conv" in cls.__name__
    )


_FUNCTIONAL = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d)


class _Finder:
    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], fold: bool) -> None:
        self.graph = graph
        self.modules = modules
        self.fold = fold
        self.effects = Effects(graph, modules)
        self.calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self.taken: dict[fx.Node, str] = {}  # what is in a group, with the reason that this gives to others

    def find(self) -> Findings:
        found = Findings()
        # Before the convolutions, as an activation costs less in the LRN after it.
        found.groups += [self._normalization(node) for node in self.graph.nodes if self._lrn(node)]
        # Of two convolutions whose results are added, the later one takes the addition.
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and node.target in _FUNCTIONAL:
                found.skipped[node] = "it is a function, not a module"
            if not is_convolution(self._module(node)):
                continue
            reason = self._refusal(node)
            if reason is not None:
                found.skipped[node] = reason
            else:
                found.groups.append(self._grow(node))
        for node in self.graph.nodes:
            group = None if node in self.taken else self._sum(node)
            if group is not None:
                self._take(group, "another addition takes it")
                found.groups.append(group)
        found.groups = self._separable(found.groups)
        found.groups.sort(key=lambda group: self.effects.order[group.nodes[0]])
        return found

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def _refusal(self, node: fx.Node) -> str | None:
        """Why this convolution cannot be called any other way; None if it can."""
        conv = self.modules[node.target]
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
        if self.calls[node.target] > 1:
            return f"it is shared: called {self.calls[node.target]} times"
        if len(node.args) != 1 or node.kwargs:
            return "it is called with keyword arguments"
        return None

    def _grow(self, node: fx.Node) -> Group:
        group = Group([node], ["conv"], conv=self.modules[node.target])
        for step in (self._take_bn, self._take_add, self._take_activation, self._take_pool):
            step(group)
        self._take(group, "another convolution takes the addition")
        return group

    def _take(self, group: Group, reason: str) -> None:
        self.taken.update(dict.fromkeys(group.nodes, reason))

    def _only_reader(self, group: Group) -> fx.Node | None:
        """The one node that reads the group's result, if the group may grow by it."""
        readers = list(group.nodes[-1].users)
        if len(readers) != 1:
            group.reason = "its result has several readers" if readers else "nobody reads its result"
            return None
        (reader,) = readers
        if reader in self.taken:
            group.reason = self.taken[reader]
            return None
        if any(self.effects.is_written(value, node, reader) for value, node in group.reads()):
            group.reason = "its input may be overwritten before the next step"
            return None
        return reader

    def _take_bn(self, group: Group) -> None:
        node = self._only_reader(group)
        bn = None if node is None else self._module(node)
        if not runs_forward_of(bn, nn.BatchNorm2d):
            return
        group.reason = _unfoldable(bn, group.conv) or ("" if self.fold else "a batch norm follows")
        if has_hooks(bn):
            group.reason = "the batch norm after it has hooks"
        elif self.calls[node.target] > 1:
            group.reason = "the batch norm after it is shared"
        if not group.reason:
            group.bn = bn
            group.nodes.append(node)
            group.parts.append("bn")

    def _take_add(self, group: Group) -> None:
        node = None if group.reason else self._only_reader(group)
        operands = None if node is None else _addition(node)
        if operands is None:
            return
        value = group.nodes[-1]
        residual = operands[1] if operands[0] is value else operands[0]
        if not isinstance(residual, fx.Node):
            return
        overwrites = self.effects.of[node] is Effect.IN_PLACE and operands[0] is residual
        if overwrites and not self.effects.is_private(residual):
            group.reason = "the addition overwrites a value that others read"
            return
        group.residual = residual
        group.nodes.append(node)
        group.parts.append("add")

    def _take_activation(self, group: Group) -> None:
        node = None if group.reason else self._only_reader(group)
        activation = None if node is None else self._activation(node)
        if activation == "relu6" and not self.fold and self.effects.is_ever_written(node):
            # In eager, in place or not, the gradient comes from the input.
            group.reason = "its ReLU6 may be overwritten, and the fused one needs it for the gradient"
        elif activation is not None:
            group.activation = activation
            group.nodes.append(node)
            group.parts.append(activation)
        elif node is not None:
            group.reason = f"{self._describe(node)} follows"

    def _take_pool(self, group: Group) -> None:
        """In inference the activation can come after the pool, where there is less of it to compute."""
        if not self.fold or group.activation == "none":
            return
        node = self._only_reader(group)
        group.pool = None if node is None else self._max_pool(node)
        if group.pool is not None:
            group.nodes.append(node)
            group.parts.append("max_pool")
        group.reason = ""

    def _separable(self, groups: list[Group]) -> list[Group]:
        """Joins depthwise convolutions and the 1x1 convolutions that alone read them."""
        first = {group.nodes[0]: group for group in groups if group.conv is not None}
        joined: list[Group] = []
        for group in list(first.values()):
            readers = list(group.nodes[-1].users)
            after = first.get(readers[0]) if len(readers) == 1 else None
            if after is None or not self._are_separable(group, after):
                continue
            group.pointwise = after
            group.nodes, group.parts = group.nodes + after.nodes, group.parts + after.parts
            group.reason = after.reason
            joined.append(after)
        return [group for group in groups if not any(group is after for after in joined)]

    def _are_separable(self, group: Group, after: Group) -> bool:
        return (
            is_depthwise(group.conv)
            and is_pointwise(after.conv)
            and tuple(after.conv.stride) == (1, 1)
            and group.residual is None
            and group.pool is None
            and after.pool is None
            and after.residual is None
            and not any(self.effects.is_written(value, node, after.nodes[-1]) for value, node in group.reads())
        )

    def _normalization(self, node: fx.Node) -> Group:
        """An LRN, with the activation before it if nobody else reads what goes into that, or what comes out."""
        group = Group([node], ["lrn"])
        (value,) = node.all_input_nodes
        activation = self._activation(value)
        if activation is not None and len(value.users) == 1 and self.effects.is_private(value.all_input_nodes[0]):
            group = Group([value, node], [activation, "lrn"], activation=activation)
        self._take(group, "the LRN takes the activation")
        return group

    def _sum(self, node: fx.Node) -> Group | None:
        operands = _addition(node)
        if operands is None or not all(isinstance(value, fx.Node) for value in operands):
            return None
        if self.effects.of[node] is Effect.IN_PLACE and not self.effects.is_private(operands[0]):
            return None
        group = Group([node], ["add"], residual=operands[1])
        self._take_activation(group)
        return group if group.is_fused and len(group.nodes) > 1 else None

    def _lrn(self, node: fx.Node) -> bool:
        if len(node.all_input_nodes) != 1:
            return False
        if node.op == "call_function":
            return node.target is F.local_response_norm
        return type(self._module(node)) is nn.LocalResponseNorm and self.effects.of[node] is Effect.NEW

    def _activation(self, node: fx.Node) -> str | None:
        """ "relu" or "relu6", if that is what the node computes of its first argument."""
        if self.effects.of[node] not in (Effect.NEW, Effect.IN_PLACE):
            return None
        if node.op == "call_module":
            module = self.modules[node.target]
            if type(module) is nn.ReLU:
                return "relu"
            if isinstance(module, nn.Hardtanh):  # ReLU6 is one
                return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
        elif node.op == "call_method" or node.target in (torch.relu, torch.relu_, F.relu_):
            known = node.target in ("relu", "relu_", torch.relu, torch.relu_, F.relu_)
            return "relu" if known and len(node.args) == 1 and not node.kwargs else None  # else it fails, and is to
        elif node.target is F.relu:
            return "relu"
        elif node.target is F.relu6:
            return "relu6"
        elif node.target is F.hardtanh:
            bounds = argument(node, "min_val"), argument(node, "max_val")
            return "relu6" if bounds == (0, 6) else None
        return None

    def _max_pool(self, node: fx.Node) -> Callable[[Tensor], Tensor] | None:
        """The max pool that the node computes of its first argument."""
        module = self._module(node)
        if type(module) is nn.MaxPool2d and self.effects.of[node] is Effect.NEW and not module.return_indices:
            return module
        if (
            node.target is F.max_pool2d
            and self.effects.of[node] is Effect.NEW
            and node.all_input_nodes == [*node.args[:1]]
        ):
            settings: Any = node.args[1:]
            named: Any = node.kwargs
            return lambda value: F.max_pool2d(value, *settings, **named)
        return None

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.modules[node.target]).__name__
        return "the end of the forward" if node.op == "output" else str(getattr(node.target, "__name__", node.target))


def _addition(node: fx.Node) -> tuple[Any, Any] | None:
    """The operands of a plain addition of two different values."""
    functions = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    methods = node.op == "call_method" and node.target in ("add", "add_")
    if not (functions or methods) or len(node.args) != 2 or node.kwargs or node.args[0] is node.args[1]:
        return None
    return node.args[0], node.args[1]


def _unfoldable(bn: nn.BatchNorm2d, conv: nn.Conv2d) -> str:
    if bn.training:
        return "the batch norm after it is training"
    if bn.running_mean is None or bn.running_var is None:
        return "the batch norm after it keeps no running statistics"
    if bn.num_features != conv.out_channels:
        return "the batch norm after it has another number of channels"
    if bn.affine and "weight" not in bn._parameters:
        return "the batch norm after it computes its parameters at every call (parametrization)"
    return ""

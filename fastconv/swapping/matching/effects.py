"""What the nodes of a graph do to memory: new results, writes in place, views, and which values share storage."""

from __future__ import annotations

import enum
import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ... import ops
from ..calls.call import Call, result_of
from ..tracing.modules import has_hooks, runs_forward_of

ATTRIBUTES = ("inplace", "return_indices")  # of layers, on which effects depend


class Effect(enum.Enum):
    NEW = "returns new memory, whose layout follows the input's"
    IN_PLACE = "overwrites its first argument, element by element, and returns it"
    VIEW = "returns its argument, or a view or copy of it"
    NO_TENSOR = "reads what does not depend on the layout, such as the shape"
    UNKNOWN = "may do anything to its arguments, and may need their layout"


# Leaf modules of exactly these types. Those with an attribute `inplace` may be either NEW or IN_PLACE.
_MODULES = {
    *(nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d, nn.LocalResponseNorm),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.PReLU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Upsample, nn.ZeroPad2d),
}
# In evaluation these return their input.
_IDENTITIES = {nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout}
_VIEW_MODULES = {nn.Flatten, *_IDENTITIES}

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_FUNCTIONS = {
    *CONCATENATIONS,
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.mean),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.maximum, torch.minimum),
    *(F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh),
    *(F.hardswish, F.hardsigmoid, F.conv2d, F.linear, F.batch_norm, F.local_response_norm),
    ops.local_response_norm,
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate),
}
_IN_PLACE_FUNCTIONS = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(torch.relu_, F.relu_, F.hardtanh_, F.leaky_relu_, F.elu_),
}
_VIEW_FUNCTIONS = {torch.flatten}

_METHODS = {"add", "sub", "mul", "div", "neg", "mean", "relu", "sigmoid", "tanh", "clamp"}
_IN_PLACE_METHODS = {f"{name}_" for name in _METHODS}
_VIEW_METHODS = {"flatten"}
_QUERIES = {"size", "dim", "ndim", "shape", "dtype", "device", "numel"}


class Effects:
    """The effects of all nodes of a graph, and their consequences.

    Args:
        graph: the graph, as traced.
        modules: the modules that its call_module nodes name.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.of = {node: self._classify(node) for node in graph.nodes}
        self._storage: dict[fx.Node, fx.Node] = {}
        outside: fx.Node | None = None
        for node in graph.nodes:
            self._storage[node] = node
            if node.op in ("placeholder", "get_attr"):
                # Two arguments, two names of one parameter, or an argument and a buffer, may be the same tensor.
                outside = outside or node
                self._join(node, outside)
            elif self.of[node] is Effect.IN_PLACE or self.of[node] is Effect.VIEW:
                self._join(node, node.args[0])
            elif self.of[node] is Effect.UNKNOWN:
                for argument in node.all_input_nodes:
                    self._join(node, argument)

    def storage(self, node: fx.Node) -> fx.Node:
        """A representative of all values that may share memory with this one."""
        while self._storage[node] is not node:
            node = self._storage[node]
        return node

    def writes(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether the node may overwrite the value."""
        return any(self.storage(target) is self.storage(value) for target in self._targets(node))

    def is_written(self, value: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether anything strictly between the two may overwrite the value."""
        return any(self.writes(node, value) for node in self._nodes[self.order[first] + 1 : self.order[last]])

    def is_ever_written(self, node: fx.Node) -> bool:
        """Whether anything after the node, the caller included, may overwrite its value."""
        return any(self.writes(later, node) for later in self._nodes[self.order[node] + 1 :])

    def is_private(self, node: fx.Node) -> bool:
        """Whether the value is new memory that only one node reads: overwriting it or not makes no difference."""
        return self.of[node] is Effect.NEW and len(node.users) == 1

    def _join(self, a: fx.Node, b: Any) -> None:
        if isinstance(b, fx.Node):
            self._storage[self.storage(a)] = self.storage(b)

    def _targets(self, node: fx.Node) -> Iterable[fx.Node]:
        """What the node may overwrite; of the end of the forward, what the caller may."""
        if self.of[node] is Effect.IN_PLACE:
            return node.all_input_nodes[:1]
        if self.of[node] is Effect.UNKNOWN:
            return node.all_input_nodes
        if self._updates_statistics(node):
            return [other for other in self._nodes if other.op == "get_attr"]
        return ()

    def _updates_statistics(self, node: fx.Node) -> bool:
        """Whether a batch norm writes running statistics, which the forward itself may read as well."""
        if node.op == "call_module":
            module = self._modules[node.target]
            return module.training and getattr(module, "running_mean", None) is not None
        return node.target is F.batch_norm and argument(node, "training") is not False

    def _classify(self, node: fx.Node) -> Effect:
        if not node.all_input_nodes and node.op != "output":
            return Effect.NO_TENSOR if node.op in ("placeholder", "get_attr") else Effect.UNKNOWN
        if "out" in node.kwargs:
            return Effect.UNKNOWN
        if node.op == "call_module":
            return self._classify_module(node)
        if node.op == "call_function":
            return _classify_function(node)
        if node.op == "call_method":
            return _classify_name(node.target)
        return Effect.UNKNOWN

    def _classify_module(self, node: fx.Node) -> Effect:
        module = self._modules[node.target]
        cls = type(module)
        if has_hooks(module) or len(node.args) != 1 or node.kwargs:
            return Effect.UNKNOWN
        if getattr(module, "inplace", False):
            return Effect.IN_PLACE if cls in _MODULES else Effect.UNKNOWN
        if cls in _VIEW_MODULES:
            # Dropout in training draws its mask in memory order, hence needs eager's layout.
            return Effect.UNKNOWN if cls in _IDENTITIES - {nn.Identity} and module.training else Effect.VIEW
        if getattr(module, "return_indices", False):
            return Effect.UNKNOWN
        plain = runs_forward_of(module, nn.Conv2d) or runs_forward_of(module, nn.BatchNorm2d)
        return Effect.NEW if plain or cls in _MODULES else Effect.UNKNOWN


def written_attributes(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[str]:
    """The paths of parameters and buffers that a graph itself, and not a module that it calls, may overwrite."""
    effects = Effects(graph, modules).of
    for node in graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        is_operator = name.startswith("i") and hasattr(operator, name[1:])
        written = node.kwargs.get("out")
        if effects[node] is Effect.IN_PLACE or is_operator or (name.endswith("_") and not name.endswith("__")):
            written = node.args[0] if node.args else None
        several = name.startswith("_foreach_") or node.target is F.batch_norm
        for value in node.all_input_nodes if several else [written]:
            while isinstance(value, fx.Node) and effects[value] is not Effect.NEW:
                if value.op == "get_attr":
                    yield value.target
                value = value.args[0] if value.args else None


def argument(node: fx.Node, name: str) -> Any:
    """An argument of a call of a Python function, by name; its default where it is not given."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return node.kwargs.get(name)
    bound.apply_defaults()
    return bound.arguments.get(name)


def _classify_function(node: fx.Node) -> Effect:
    if isinstance(node.target, Call) or node.target is result_of:
        return Effect.NEW
    if node.target is getattr:
        return _classify_name(node.args[1])
    inplace = None if isinstance(node.target, type(torch.relu)) else argument(node, "inplace")
    if isinstance(inplace, fx.Node):
        return Effect.UNKNOWN
    if inplace:
        return Effect.IN_PLACE if node.target in _FUNCTIONS else Effect.UNKNOWN
    if argument(node, "return_indices"):
        return Effect.UNKNOWN
    if node.target is F.dropout:
        return Effect.UNKNOWN if argument(node, "training") is not False else Effect.VIEW
    for functions, effect in (
        (_FUNCTIONS, Effect.NEW),
        (_IN_PLACE_FUNCTIONS, Effect.IN_PLACE),
        (_VIEW_FUNCTIONS, Effect.VIEW),
    ):
        if node.target in functions:
            return effect
    return Effect.UNKNOWN


def _classify_name(name: str) -> Effect:
    if name in _METHODS and hasattr(Tensor, name):
        return Effect.NEW
    if name in _IN_PLACE_METHODS:
        return Effect.IN_PLACE
    if name in _VIEW_METHODS:
        return Effect.VIEW
    return Effect.NO_TENSOR if name in _QUERIES else Effect.UNKNOWN

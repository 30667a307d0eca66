"""From a traced forward to the programs that run in its place."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from . import patterns
from .contents import ClassPlace, Place
from .effects import written_attributes
from .fused import Attribute, FusedAdd, FusedConv, FusedLRN, FusedSeparable
from .layout import restore_layouts
from .observing import BOOKKEEPING, REGION, Untraceable
from .prepared import PreparedConv, PreparedConvs, PreparedSeparable, prepared_convs
from .tracing import has_hooks, hooks_of, is_leaf, is_region, trace

# Attributes of torch's layers on which it depends what can be fused. The others are read at every call.
_OF_LAYERS = ("inplace", "return_indices", "min_val", "max_val", "padding_mode", "num_features", "affine")


class Watch:
    """Everything that a trace of a module depends on, as it is now."""

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        for module in filter(is_region, modules):
            vars(module).setdefault(REGION, None)  # else it would count as an attribute that is added later
        self._modules = modules
        self._all = [vars(m) for m in modules]
        inlined = [m for m in modules if m is root or not is_leaf(m)]
        leaves = [m for m in modules if m is not root and is_leaf(m)]
        self._attributes = [(vars(m), name) for m in inlined for name in vars(m) if name not in BOOKKEEPING]
        self._attributes += [(vars(m), name) for m in leaves for name in _OF_LAYERS if name in vars(m)]
        scripted = torch.jit.ScriptModule
        # Of a ModuleList, too, whose content forwards go through.
        self._children = [m._modules for m in modules if not isinstance(m, scripted)]
        stores = [store for m in leaves if not isinstance(m, scripted) for store in (m._parameters, m._buffers)]
        self._tensors = [(store, name) for store in stores for name in store]
        # The root's own hooks run around its forward as ever.
        self._hooks = [hooks for m in modules if m is not root and not has_hooks(m) for hooks in hooks_of(m)]
        self._state = self._observe()
        self._reads: list[Place | ClassPlace] = []
        self._of_leaves: list[tuple[dict[str, Any], str, Any]] = []

    def add(self, reads: list[Place | ClassPlace], of_leaves: list[tuple[dict[str, Any], str, Any]]) -> None:
        """What an Observer has seen the forward read beside the attributes of its modules."""
        self._reads = reads
        self._of_leaves = of_leaves

    def _observe(self) -> list[Any]:
        state: list[Any] = [module.training for module in self._modules]
        state += map(type, self._modules)
        state += map(len, self._all)
        state += [attributes.get(name) for attributes, name in self._attributes]
        state += [store.get(name) is None for store, name in self._tensors]
        for children in self._children:
            state += children.keys()
            state += children.values()
        return state

    def holds(self) -> bool:
        """Whether all of it is still so: modes, classes, attributes with their content, submodules, parameters that
        are there, globals and variables that were read, and no hooks where there were none."""
        return self.attributes_hold() and all(place.holds() for place in self._reads)

    def holds_compiled(self) -> bool:
        """As `holds`, while torch.compile looks on."""
        return self.attributes_hold() and all(place.holds_compiled() for place in self._reads)

    def attributes_hold(self) -> bool:
        state = self._observe()
        if len(state) != len(self._state) or not all(map(operator.is_, state, self._state)) or any(self._hooks):
            return False
        return all(store.get(name) is value for store, name, value in self._of_leaves)


class Programs:
    """What runs in place of a module's forward for one kind of call.

    `differentiable` leaves batch norms alone and computes what eager computes, gradients included. `inference` folds
    those that are in evaluation mode, and runs prepared convolutions.

    Args:
        root: the module, in the modes to trace.
        args, kwargs: of the call; tensors stand for any tensors.

    Raises:
        Untraceable: see :func:`fastconv.swapping.tracing.trace`.
    """

    def __init__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        graph, observer = trace(root, args, kwargs)
        self.reads, self.of_leaves = observer.reads, observer.of_leaves
        modules = dict(root.named_modules(remove_duplicate=False))
        for path in written_attributes(graph, modules):
            owner, _, name = path.rpartition(".")
            called = [modules[node.target] for node in graph.nodes if node.op == "call_module"]
            of_layers = (tensor for module in called for tensor in (*module.parameters(), *module.buffers()))
            if _memory(getattr(modules[owner], name)) in map(_memory, of_layers):  # of which there may be folded copies
                raise Untraceable(f"its forward writes {path}, which a layer has")
        _drop_identities(graph, root)
        self._attributes = [node.target.rpartition(".") for node in graph.nodes if node.op == "get_attr"]
        self._modules = modules
        self.differentiable = Program(root, graph, fold=False)
        self.inference = Program(root, graph, fold=True)
        self.prepared = PreparedConvs([conv for call in self.inference.calls for conv in prepared_convs(call)])

    def attributes(self) -> Iterator[Tensor]:
        """The tensors that the forward itself reads from its modules."""
        for path, _, name in self._attributes:
            yield getattr(self._modules[path], name)


class Program:
    """A forward in which fused calls stand for groups of nodes.

    Attributes:
        forward: takes the tensors of the call, in order.
        findings: what was found in the graph.
        calls: the fused calls, in order, each with the group that it replaces.
    """

    def __init__(self, root: nn.Module, traced: fx.Graph, *, fold: bool) -> None:
        modules = dict(root.named_modules(remove_duplicate=False))
        self._fold = fold
        self.findings = patterns.find(traced, modules, fold=fold)
        self.calls: dict[Any, patterns.Group] = {}
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(traced, copies))
        for group in self.findings.groups:
            call = self._call(group, modules)
            if call is not None:
                self.calls[call] = group
                _replace(graph, group, copies, call)
        if fold:
            restore_layouts(graph, modules, {copies[node]: node for node in traced.nodes if node in copies})
        _read_attributes_live(graph, modules)
        self.module = fx.GraphModule(root, graph)
        self.forward = self.module.forward

    def _call(self, group: patterns.Group, modules: dict[str, nn.Module]) -> Any:
        if group.parts[-1] == "lrn":
            node = group.layer
            named = {name: value for name, value in node.kwargs.items() if name != "input"}
            return FusedLRN(modules.get(node.target), node.args[1:], named, group.activation)
        if group.conv is None:
            return FusedAdd(group.activation)
        if not self._fold and not group.is_fused:
            return None
        settings = group.conv, group.bn, group.activation, group.residual is not None
        after = group.pointwise
        if group.pool is not None:
            return PreparedConv(*settings, pool=group.pool)
        one, two = (PreparedConv, PreparedSeparable) if self._fold else (FusedConv, FusedSeparable)
        call = one(*settings)
        return call if after is None else two(call, one(after.conv, after.bn, after.activation))


def _memory(tensor: Tensor) -> int:
    """What is equal for tensors that share their storage."""
    has_storage = tensor.layout is torch.strided and not is_lazy(tensor)
    return tensor.untyped_storage()._cdata if has_storage else id(tensor)


def _drop_identities(graph: fx.Graph, root: nn.Module) -> None:
    """nn.Identity stands between the layers of many models, where a batch norm was left out."""
    for node in list(graph.nodes):
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            module = root.get_submodule(node.target)
            if type(module) is nn.Identity and not has_hooks(module):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def _replace(graph: fx.Graph, group: patterns.Group, copies: dict[fx.Node, fx.Node], call: Any) -> None:
    last = copies[group.nodes[-1]]
    with graph.inserting_before(last):
        fused = graph.call_function(call, tuple(copies[value] for value, _ in group.reads()))
    last.replace_all_uses_with(fused)
    for node in reversed(group.nodes):
        graph.erase_node(copies[node])
        copies[node] = fused


def _read_attributes_live(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """A GraphModule would keep the tensors that the modules have now."""
    for node in list(graph.nodes):
        if node.op == "get_attr":
            path, _, name = node.target.rpartition(".")
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(Attribute(modules[path], name)))
            graph.erase_node(node)

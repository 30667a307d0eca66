"""From a traced forward to the programs that run in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .calls.call import Call, result_of
from .layout import restore_layouts
from .matching.effects import written_attributes
from .matching.matcher import Match
from .patterns import find
from .staleness import PreparedWeights
from .tracing.modules import has_hooks
from .tracing.refusal import Untraceable
from .tracing.tracer import trace


class Programs:
    """What runs in place of a module's forward for one kind of call.

    `differentiable` leaves batch norms alone and computes what eager computes, gradients included. `inference` folds
    those that are in evaluation mode, and runs prepared convolutions.

    Args:
        root: the module, in the modes to trace.
        args, kwargs: of the call; tensors stand for any tensors.

    Raises:
        Untraceable: see :func:`fastconv.swapping.tracing.tracer.trace`.
    """

    def __init__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        graph, self.reads = trace(root, args, kwargs)
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
        matches = [*self.differentiable.findings.matches, *self.inference.findings.matches]
        self.depends_on = {pair for match in matches for pair in match.depends_on}
        self.prepared = PreparedWeights([one for call in self.inference.calls for one in call.prepared])

    def attributes(self) -> Iterator[Tensor]:
        """The tensors that the forward itself reads from its modules."""
        for path, _, name in self._attributes:
            yield getattr(self._modules[path], name)


class Program:
    """A forward in which fused calls stand for what patterns have matched.

    Attributes:
        forward: takes the tensors of the call, in order.
        findings: what was found in the graph.
        calls: the fused calls, in order, each with the match that it replaces.
    """

    def __init__(self, root: nn.Module, traced: fx.Graph, *, fold: bool) -> None:
        modules = dict(root.named_modules(remove_duplicate=False))
        self.findings = find(traced, modules, fold=fold)
        self.calls: dict[Call, Match] = {}
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(traced, copies))
        for match in self.findings.matches:
            call = match.call(fold)
            if call is not None:
                self.calls[call] = match
                _replace(graph, match, copies, call)
        if fold:
            restore_layouts(graph, modules, {copies[node]: node for node in traced.nodes if node in copies})
        _read_attributes_live(graph, modules)
        self.module = fx.GraphModule(root, graph)
        self.forward = self.module.forward


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


def _replace(graph: fx.Graph, match: Match, copies: dict[fx.Node, fx.Node], call: Call) -> None:
    """Puts the call in the place of the nodes, where the first result was."""
    with graph.inserting_before(copies[match.results[0]]):
        fused = graph.call_function(call, tuple(copies[value] for value in match.arguments))
        values = [fused]
        if len(match.results) > 1:
            values = [graph.call_function(result_of, (fused, i)) for i in range(len(match.results))]
    results = dict(zip(match.results, values, strict=True))
    for result, value in results.items():
        copies[result].replace_all_uses_with(value)
    for node in reversed(match.nodes):
        graph.erase_node(copies.pop(node))
    copies.update(results)


class _Attribute:
    """A parameter, buffer or other tensor of a module, as it is at the time of the call."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self.__name__ = "attribute"

    def __call__(self) -> Any:
        return getattr(self.module, self.name)


def _read_attributes_live(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """A GraphModule would keep the tensors that the modules have now."""
    for node in list(graph.nodes):
        if node.op == "get_attr":
            path, _, name = node.target.rpartition(".")
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(_Attribute(modules[path], name)))
            graph.erase_node(node)

"""From a traced forward to the programs that run in its place."""

from __future__ import annotations

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from .. import ops
from . import patterns
from .fused import Attribute, FusedAdd, FusedConv, FusedLRN
from .layout import restore_layouts
from .prepared import PreparedConv, PreparedConvs
from .tracing import REGION, has_hooks, hooks_of, is_leaf, trace


# Attributes of every module that no forward reads.
_BOOKKEEPING = {*vars(nn.Module()), REGION}


class Watch:
    """Everything that a trace of a module depends on, as it is now."""

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._modules = modules
        inlined = [m for m in modules if m is root or not is_leaf(m)]
        self._attributes = [
            (vars(m), name) for m in inlined for name in vars(m) if name not in _BOOKKEEPING
        ]
        self._children = [m._modules for m in inlined]
        # The root's own hooks run around its forward as ever.
        self._hooks = [
            hooks for m in modules if m is not root and not has_hooks(m) for hooks in hooks_of(m)
        ]
        self._state = self._observe()

    def _observe(self) -> list[Any]:
        state: list[Any] = [module.training for module in self._modules]
        state += [attributes.get(name) for attributes, name in self._attributes]
        for children in self._children:
            state += children.values()
        return state

    def holds(self) -> bool:
        """Whether all of it is still so: modes, attributes, submodules, and no hooks where there were none."""
        state = self._observe()
        return (
            len(state) == len(self._state)
            and all(map(operator.is_, state, self._state))
            and not any(self._hooks)
        )


class Programs:
    """What runs in place of a module's forward for one kind of call.

    `differentiable` leaves batch norms alone and computes what eager computes, gradients included. `inference` folds
    those that are in evaluation mode, and runs prepared convolutions.

    Args:
        root: the module, in the modes to trace.
        args, kwargs: of the call; tensors stand for any tensors.

    Raises:
        Untraceable: see :func:`fastconv.swap.tracing.trace`.
    """

    def __init__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        graph = trace(root, args, kwargs)
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.findings = {
            fold: patterns.find(graph, self.modules, fold=fold) for fold in (False, True)
        }
        self.differentiable = self._program(root, graph, fold=False)
        self.inference = self._program(root, graph, fold=True)
        self.prepared = PreparedConvs(
            [n.target for n in self.inference.graph.nodes if isinstance(n.target, PreparedConv)]
        )

    def _program(self, root: nn.Module, traced: fx.Graph, *, fold: bool) -> fx.GraphModule:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(traced, copies)
        graph.output(result)
        copies[next(reversed(traced.nodes))] = next(reversed(graph.nodes))
        for group in self.findings[fold].groups:
            self._replace(graph, group, copies, fold)
        if fold:
            restore_layouts(graph, self.modules)
        for node in list(graph.nodes):
            if node.op == "get_attr":
                path, _, name = node.target.rpartition(".")
                with graph.inserting_before(node):
                    node.replace_all_uses_with(
                        graph.call_function(Attribute(self.modules[path], name))
                    )
                graph.erase_node(node)
        return fx.GraphModule(root, graph)

    def _replace(
        self, graph: fx.Graph, group: patterns.Group, copies: dict[fx.Node, fx.Node], fold: bool
    ) -> None:
        last = copies[group.nodes[-1]]
        if last.target is F.local_response_norm:
            last.target = ops.local_response_norm
            return
        call = self._call(group, fold)
        if call is None:
            return
        arguments = [value for value, _ in group.reads()]
        with graph.inserting_before(last):
            fused = graph.call_function(call, tuple(copies[value] for value in arguments))
        last.replace_all_uses_with(fused)
        for node in reversed(group.nodes):
            graph.erase_node(copies[node])
            copies[node] = fused

    def _call(self, group: patterns.Group, fold: bool) -> Any:
        first = group.nodes[0]
        if group.parts == ["lrn"]:
            return FusedLRN(self.modules[first.target])
        if group.conv is None:
            return FusedAdd(group.activation)
        if fold:
            return PreparedConv(group.conv, group.bn, group.activation)
        return FusedConv(group.conv, None, group.activation) if group.is_fused else None

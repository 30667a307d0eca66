"""Memory layouts in graphs of prepared convolutions, whose results are channels_last whatever their input is.

That pays as long as the readers do not care. Everything else sees what it would see in eager: a value that is
returned, or read by anything unknown, is brought to eager's layout where it is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from .effects import Effect, Effects
from .prepared import PreparedConv, prepared_convs


def restore_layouts(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Inserts what restores eager's layouts."""
    effects = Effects(graph, modules)
    exposed = {
        effects.storage(value)
        for node in graph.nodes
        if effects.of[node] is Effect.UNKNOWN
        for value in node.all_input_nodes
    }
    first = next(node for node in graph.nodes if node.op != "placeholder")
    # For each value, what decides its layout in eager: inputs and unknown results, and convolutions.
    anchors: dict[fx.Node, set[fx.Node]] = {}
    convs: dict[fx.Node, set[PreparedConv]] = {}
    layouts: dict[fx.Node, fx.Node] = {}

    def layout(anchor: fx.Node) -> fx.Node:
        if anchor not in layouts:
            with graph.inserting_before(first if anchor.op == "placeholder" else anchor.next):
                layouts[anchor] = graph.call_function(layout_of, (anchor,))
        return layouts[anchor]

    for node in list(graph.nodes):
        anchors[node], convs[node] = set(), set()
        if node.op == "placeholder" or effects.of[node] is Effect.UNKNOWN:
            anchors[node].add(node)
            continue
        if effects.of[node] is Effect.NO_TENSOR:
            continue
        for value in node.all_input_nodes:
            anchors[node] |= anchors[value]
            convs[node] |= convs[value]
        convs[node].update(prepared_convs(node.target))
        if effects.of[node] is Effect.NEW and effects.storage(node) in exposed and convs[node]:
            readers = list(node.users)
            votes = [layout(anchor) for anchor in sorted(anchors[node], key=effects.order.get)]
            with graph.inserting_after(node):
                restored = graph.call_function(RestoreLayout(convs[node]), (node, *votes))
            for reader in readers:
                reader.replace_input_with(node, restored)
            effects.order[restored] = effects.order[node]
            anchors[restored], convs[restored] = {restored}, set()


class RestoreLayout:
    """Brings a value to the layout that it has in eager."""

    def __init__(self, convs: set[PreparedConv]) -> None:
        self._convs = [conv.conv for conv in convs]
        self.__name__ = "restore_layout"

    def __call__(self, value: Any, *layouts: str | None) -> Any:
        if torch.compiler.is_compiling() or not isinstance(value, Tensor) or value.dim() != 4:
            return value
        if "contiguous" not in layouts and "channels_last" in layouts:
            return value
        if any(layout_of(conv.weight) == "channels_last" for conv in self._convs):
            return value
        # The views bring the strides of dimensions of size 1 into line, too: later ops take the layout from them.
        return value.contiguous().view(-1).view(value.shape)


def layout_of(value: Any) -> str | None:
    """The layout of a batch of images; None where it has none of the two, or cannot be told apart."""
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    contiguous = value.is_contiguous()
    channels_last = value.is_contiguous(memory_format=torch.channels_last)
    if contiguous == channels_last:
        return None
    return "contiguous" if contiguous else "channels_last"

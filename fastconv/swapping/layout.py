"""Memory layouts in graphs of prepared convolutions, whose results are channels_last whatever their input is.

That pays as long as the readers do not care. Everything else sees what it would see in eager: a value that is
returned, or read by anything unknown, is brought to eager's strides where it is made.

What those are, nobody but eager can tell: they depend on the strides of inputs and weights, on which of them are
ambiguous (of one channel, or of one pixel), on the order of the operands of a sum, and on what each op makes of that.
So the traced steps that lead to the value are run once for every kind of inputs, on zeros, and without their
convolutions, for which there is a rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._prims_common import suggest_memory_format

from .calls.call import Call
from .calls.convolution import shape_of_output
from .matching.effects import Effect, Effects

_KINDS_KEPT = 32


def restore_layouts(graph: fx.Graph, modules: dict[str, nn.Module], traced: dict[fx.Node, fx.Node]) -> None:
    """Inserts what restores eager's layouts.

    Args:
        graph: the graph, with its fused calls.
        modules: the modules that call_module nodes name.
        traced: for each node, the one of the traced forward that has its result.
    """
    effects = Effects(graph, modules)
    exposed = {
        effects.storage(value)
        for node in graph.nodes
        if effects.of[node] is Effect.UNKNOWN
        for value in node.all_input_nodes
    }
    first = next(node for node in graph.nodes if node.op != "placeholder")
    known: dict[fx.Node, fx.Node] = {}  # by node of the traced forward, what has eager's layout
    after_conv: set[fx.Node] = set()  # what a prepared convolution may have made channels_last
    formats: dict[fx.Node, fx.Node] = {}

    def format_node(value: fx.Node) -> fx.Node:
        if value not in formats:
            with graph.inserting_before(first if value.op == "placeholder" else value.next):
                formats[value] = graph.call_function(format_of, (value,))
        return formats[value]

    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr") or (node in traced and effects.of[node] is Effect.UNKNOWN):
            known[traced[node]] = node
            continue
        if effects.of[node] is Effect.NO_TENSOR:
            continue
        is_prepared = isinstance(node.target, Call) and node.target.prepared
        if is_prepared or not after_conv.isdisjoint(node.all_input_nodes):
            after_conv.add(node)
        if effects.of[node] is Effect.NEW and effects.storage(node) in exposed and node in after_conv:
            steps, sources = _steps(traced[node], known)
            readers = list(node.users)
            origins = [format_node(known[source]) for source in sources]
            with graph.inserting_after(node):
                restored = graph.call_function(RestoreLayout(steps, modules), (node, *origins))
            for reader in readers:
                reader.replace_input_with(node, restored)
            known[traced[node]] = restored


def _steps(result: fx.Node, known: dict[fx.Node, fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """What leads to the result from known values, as a graph of its own, and these values, its inputs."""
    found: set[fx.Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += () if node in known else node.all_input_nodes
    steps = fx.Graph()
    sources: list[fx.Node] = []
    copies: dict[fx.Node, fx.Node] = {}
    for node in result.graph.nodes:
        if node in found and node in known:
            copies[node] = steps.placeholder(f"source_{len(sources)}")
            sources.append(node)
    for node in result.graph.nodes:
        if node in found and node not in known:
            copies[node] = steps.node_copy(node, copies.__getitem__)
    steps.output(copies[result])
    return steps, sources


class Format(NamedTuple):
    """What there is to know of a tensor but its elements."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self) -> Tensor:
        extent = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return torch.zeros(max(extent, 0), dtype=self.dtype).as_strided(self.shape, self.stride)


def format_of(value: Any) -> Any:
    """The format of a tensor; of tuples and lists, those of their elements; of anything else, itself."""
    if isinstance(value, Tensor):
        return Format(value.shape, value.stride(), value.dtype)
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return tuple(map(format_of, value))
    return value


def _stand_in(kind: Any) -> Any:
    if isinstance(kind, Format):
        return kind.zeros()
    return tuple(map(_stand_in, kind)) if type(kind) is tuple else kind


class RestoreLayout:
    """Brings a value to the strides that it has in eager.

    Args:
        steps: what eager runs.
        modules: the modules that its call_module nodes name.
    """

    def __init__(self, steps: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self._steps = steps
        self._modules = modules
        used = [modules[node.target] for node in steps.nodes if node.op == "call_module"]
        layers = [part for module in used if not isinstance(module, nn.BatchNorm2d) for part in module.modules()]
        self._parameters = [layer._parameters for layer in layers if layer._parameters]
        self._strides: dict[Any, tuple[int, ...]] = {}
        self.__name__ = "restore_layout"

    def __call__(self, value: Any, *formats: Any) -> Any:
        if torch.compiler.is_compiling() or not isinstance(value, Tensor) or value.device.type != "cpu":
            return value  # fused ops alone have eager's layout everywhere
        weights = [p.stride() for store in self._parameters for p in store.values() if p is not None]
        kind = (value.shape, formats, tuple(weights))
        strides = self._strides.get(kind)
        if strides is None:
            known = self._strides if len(self._strides) < _KINDS_KEPT else {}
            strides = _Strides(self._steps, self._modules).run(*map(_stand_in, formats)).stride()
            self._strides = {**known, kind: strides}
        if value.stride() == strides:
            return value
        sizes = zip(value.shape, value.stride(), strides, strict=True)
        if all(size == 1 or step == wanted for size, step, wanted in sizes):
            return value.as_strided(value.shape, strides)
        return torch.empty_strided(value.shape, strides, dtype=value.dtype).copy_(value)


class _Strides(fx.Interpreter):
    """Runs steps of a forward for the strides of the result alone: convolutions leave zeros."""

    def __init__(self, steps: fx.Graph, modules: dict[str, nn.Module]) -> None:
        super().__init__(nn.Module(), graph=steps)
        self._modules = modules

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self._modules[target]
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and args[0].numel():
            return _convolved(module, args[0])
        if isinstance(module, nn.LocalResponseNorm):
            return _normalized(module, args[0])
        if isinstance(module, nn.BatchNorm2d | nn.ReLU | nn.ReLU6) and _is_unambiguous(args[0]):
            return args[0]
        module = copy.copy(module)
        module._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        return module(*args, **kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is F.local_response_norm:
            image = kwargs.get("input", args[0] if args else None)
            settings = {name: value for name, value in kwargs.items() if name != "input"}
            return _normalized(lambda value: F.local_response_norm(value, *args[1:], **settings), image)
        return super().call_function(target, args, kwargs)


def _normalized(norm: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """In float32: eager has no local response norm of 16-bit images on the CPU."""
    return norm(input.float()).to(input.dtype) if input.dtype in (torch.float16, torch.bfloat16) else norm(input)


def _is_unambiguous(images: Tensor) -> bool:
    """Whether a layer of a number for a number keeps the strides."""
    return (
        images.dim() == 4
        and min(images.shape[1:]) > 1
        and images.stride(0) * images.shape[0] == images.numel()
        and (images.is_contiguous() or images.is_contiguous(memory_format=torch.channels_last))
    )


def _convolved(conv: nn.Conv2d, input: Tensor) -> Tensor:
    if input.dim() == 3:
        return _convolved(conv, input.unsqueeze(0)).squeeze(0)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
    layouts = suggest_memory_format(input), suggest_memory_format(conv.weight)
    layout = torch.channels_last if torch.channels_last in layouts else torch.contiguous_format
    return torch.empty(shape_of_output(conv, input), dtype=dtype, memory_format=layout).zero_()

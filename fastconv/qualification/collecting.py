"""Which calls of operators a model makes: found by running it once on operators that write down their arguments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import swapping
from ..aten_kernels import OPERATORS
from ..operators import backends, measured, registration
from ..operators.destinations import tensors
from ..operators.schemas import SCHEMAS
from ..operators.shape_classes import ShapeClass
from .calls import OperatorCall

_NAMESPACE = "fastconv_recorder"
_BACKEND = "recorder"


@dataclass
class Collected:
    """The calls that were made, one for each class, in order.

    Attributes:
        backward: of a forward's class, those of its backward.
        failed: why there are none of a pass, which failed.
    """

    calls: dict[ShapeClass, OperatorCall] = field(default_factory=dict)
    backward: dict[ShapeClass, list[ShapeClass]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def add(self, other: Collected) -> None:
        self.failed += [one for one in other.failed if one not in self.failed]
        for found, call in other.calls.items():
            self.calls.setdefault(found, call)
        for forward, backward in other.backward.items():
            known = self.backward.setdefault(forward, [])
            known += [one for one in backward if one not in known]


@dataclass
class _Recording:
    collected: Collected = field(default_factory=Collected)
    # The memory of a forward's tensors, by which its backward is recognized; the last call first.
    forwards: list[tuple[set[int], ShapeClass]] = field(default_factory=list)

    def note(self, operator: str, args: Sequence[Any], outputs: Any = None) -> None:
        call = OperatorCall.of(operator, args)
        self.collected.calls.setdefault(call.shape_class, call)
        if not call.is_backward:
            if outputs is not None:
                self.forwards.insert(0, (_memory([*args, outputs]), call.shape_class))
            return
        gradients = len([name for name in call.named() if name.startswith("grad_output")])
        known = _memory(args[gradients:])
        for memory, forward in self.forwards:
            if known <= memory:
                others = self.collected.backward.setdefault(forward, [])
                if call.shape_class not in others:
                    others.append(call.shape_class)
                return


def _memory(args: Sequence[Any]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors(args) if tensor.numel()}


_recordings: list[_Recording] = []


def _recorder(name: str) -> Callable[..., Any]:
    operator, _, overload = name.partition(".")

    def kernel(*args: Any) -> Any:
        outputs = OPERATORS[name](*args)
        for recording in _recordings:
            recording.note(operator, args[:-1] if overload else args, outputs)
        return outputs

    return kernel


@functools.cache
def _library() -> torch.library.Library:
    """Defines the operators that record; kept, as they end with it."""
    library = torch.library.Library(_NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        for key in ("CPU", "CUDA"):
            library.impl(name, _recorder(name), key)
    registration.add_namespace(_NAMESPACE)
    return library


@contextlib.contextmanager
def recording() -> Iterator[Collected]:
    """Inside, ops without a ``backend=`` run in aten, and their calls are written down, those of backwards too."""
    _library()
    found = _Recording()
    backends.add(_BACKEND, backends.Backend(_NAMESPACE, lambda: "", lambda: None))
    _recordings.append(found)
    try:
        with backends.use_backend(_BACKEND):
            yield found.collected
    finally:
        _recordings.remove(found)
        backends.remove(_BACKEND)


def calls_of(
    model: Callable[..., Any], inputs: Sequence[Any], *, inference: bool = True, training: bool = True
) -> Collected:
    """The calls of a model, or of any function of the inputs that calls ops.

    A model is swapped first. It is run without gradients in evaluation mode, as it runs by what is known so far: a
    convolution that is prepared may hand another layout on than others. And it is run in training mode with a backward;
    modes, buffers, gradients, inputs and the random state are afterwards what they were. A training pass that fails, as
    some do without targets, leaves the calls of the other.
    """
    found = _Recording()
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    module = model if isinstance(model, nn.Module) else None
    with _unchanged(module):
        fast = model if module is None else swapping.swap(module)
        if inference:
            with _in_mode(fast, False), torch.no_grad(), measured.asked(found.note):
                for _ in range(2):  # weights are prepared for the second
                    fast(*_copies(inputs))
        if training:
            with recording() as collected, _in_mode(fast, True), torch.enable_grad():
                try:
                    _backward(fast, _copies(inputs))
                except Exception as error:
                    if not found.collected.calls:
                        raise
                    collected.failed.append(f"the training pass failed, {type(error).__name__}: {error}")
            found.collected.add(collected)
    return found.collected


def _copies(inputs: Sequence[Any]) -> Any:
    """Which a model may overwrite, and of which no graph of the user's is the source."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_(leaf.requires_grad)

    return pytree.tree_map(copied, tuple(inputs))


def _backward(function: Callable[..., Any], inputs: Sequence[Any]) -> None:
    outputs = [
        leaf
        for leaf in pytree.tree_leaves(function(*inputs))
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
    ]
    leaves = _leaves(outputs)
    if leaves:
        # Not backward(), which would add to the gradients of the user's parameters.
        torch.autograd.grad(outputs, leaves, list(map(torch.randn_like, outputs)))


def _leaves(outputs: Sequence[Tensor]) -> list[Tensor]:
    """What the outputs were computed from."""
    ahead: list[Any] = [output.grad_fn for output in outputs]
    seen, found = set(), []
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        ahead += [before for before, _ in node.next_functions]
    return found


@contextlib.contextmanager
def _in_mode(model: Any, training: bool) -> Iterator[None]:
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _unchanged(model: nn.Module | None) -> Iterator[None]:
    buffers = [] if model is None else [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)

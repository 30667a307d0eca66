"""What `fastconv.swap` changes in a model, what it leaves alone and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..operators import kernels, measured
from ..operators.messages import aligned
from ..operators.table_text import candidate_lines
from ..operators.tables import Entry
from . import regions
from .patterns.convolution import is_convolution
from .programs import Program
from .regions import programs_of, region_of, require_module
from .tracing.modules import is_region, plain_class


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer in one mode."""

    pattern: str = ""  # what is computed at once, as "conv + bn + relu"; empty if nothing is swapped
    op: str = ""  # by which op
    reason: str = ""  # why not more, or nothing

    def __str__(self) -> str:
        if not self.op:
            return f"as before: {self.reason}" if self.reason else "as before"
        return f"{self.pattern} -> {self.op}"


@dataclass(frozen=True)
class Row:
    """A convolution, a local response norm, or an addition with its activation."""

    module: str  # its path in the model
    layer: str
    inference: Choice
    training: Choice

    @property
    def is_swapped(self) -> bool:
        return bool(self.inference.op or self.training.op)


@dataclass(frozen=True)
class Kernel:
    """What ran for one layer on the example inputs.

    Attributes:
        choices: of CUDA kernels, printable: what was considered for each launch, and why the others were not taken.
        measured: what a table of this machine says of such calls, see `fastconv.qualify`; None if nothing.
    """

    module: str
    shapes: str
    kernel: str
    choices: tuple[kernels.Choice, ...] = ()
    measured: Entry | None = None


@dataclass(frozen=True)
class Explanation:
    """Printable; the rows can be read by programs.

    Attributes:
        rows: one per layer, in the order of the model.
        untraced: by module path, why its forward runs as it is written (with its parts swapped).
        kernels: what ran on the example inputs, where some were given.
    """

    model: str
    rows: tuple[Row, ...]
    untraced: dict[str, str] = field(default_factory=dict)
    kernels: tuple[Kernel, ...] = ()

    @property
    def swapped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.is_swapped)

    @property
    def skipped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.is_swapped)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.swapped)} of {len(self.rows)} layers swapped"]
        lines += [f"{path or 'the model'} is not traced as a whole: {reason}" for path, reason in self.untraced.items()]
        cells = [(row.module, row.layer, str(row.inference), str(row.training)) for row in self.rows]
        lines += ["", *aligned(("module", "layer", "inference", "training"), cells)]
        if self.kernels:
            ran = [(kernel.module, kernel.shapes, kernel.kernel) for kernel in self.kernels]
            lines += ["", *aligned(("module", "input -> output", "kernel"), ran)]
        for kernel in self.kernels:
            if kernel.measured is not None:
                lines += ["", f"{kernel.module} {kernel.shapes}, as measured on this machine:"]
                lines += [f"  {line}" for line in candidate_lines(kernel.measured)]
        return "\n".join(lines)


def explain(model: nn.Module, *inputs: Tensor) -> Explanation:
    """What `fastconv.swap` has changed in a model, or would change.

    Args:
        model: a result of `swap`; or any other model, of which a swapped copy is made and explained.
        inputs: example inputs. If given, one forward without gradients tells which kernel runs for which shape; the
            model has to be in evaluation mode.

    On a GPU ``print(*explanation.kernels[0].choices)`` says which CUDA kernels were considered for a layer, and why the
    others were not taken.

    Raises:
        TypeError: the model is not a module.
        ValueError: example inputs were given for a model in training mode.

    >>> print(fastconv.explain(model, torch.randn(1, 3, 224, 224)))
    """
    require_module("explain", model)
    if inputs and model.training:
        raise ValueError(
            "fastconv.explain: got example inputs for a model in training mode, needed evaluation mode, in which a "
            "forward changes no statistics; call model.eval() first"
        )
    fast = model if is_region(model) else regions.swap(model)
    rows: dict[str, dict[str, Any]] = {
        path: {"layer": _layer(module)}
        for path, module in fast.named_modules()
        if is_convolution(module) or isinstance(module, nn.LocalResponseNorm)
    }
    untraced: dict[str, str] = {}
    for path, region in traced_parts(fast, untraced):
        for mode, kind in ((False, "inference"), (True, "training")):
            programs = programs_of(region, mode)
            if not isinstance(programs, str):
                program = programs.differentiable if mode else programs.inference
                for name, layer, choice in _choices(program):
                    rows.setdefault(_join(path, name), {"layer": layer})[kind] = choice
    missing = Choice(reason="not called")
    return Explanation(
        plain_class(fast).__name__,
        tuple(
            Row(path, row["layer"], row.get("inference", missing), row.get("training", missing))
            for path, row in rows.items()
        ),
        untraced,
        tuple(_kernels(fast, inputs)) if inputs else (),
    )


def traced_parts(module: nn.Module, untraced: dict[str, str], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest parts of the model that are traced, by path; the reasons of the others go into `untraced`."""
    if is_region(module):
        programs = programs_of(module, module.training)
        if not isinstance(programs, str):
            yield path, module
            return
        untraced[path] = programs
    for name, child in module.named_children():
        yield from traced_parts(child, untraced, _join(path, name))


def _choices(program: Program) -> Iterator[tuple[str, str, Choice]]:
    """Path, layer and choice of everything that was found in the program's graph."""
    calls = {match: call for call, match in program.calls.items()}
    for node, reason in program.findings.skipped.items():
        yield _path(node), str(node.target), Choice(reason=reason)
    for match in program.findings.matches:
        op = calls[match].op() if match in calls else ""
        path, *others = map(_path, match.layers)
        yield path, match.pattern, Choice(match.pattern if op else "", op, match.reason)
        for other in others:
            yield other, match.pattern, Choice(f"with {path}", op)


def _path(node: fx.Node) -> str:
    """The path of the module that the node calls; for a function, of the one that calls it, and its name."""
    if node.op == "call_module":
        return str(node.target)
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return _join(stack[-1] if stack else "", f"<{node.name}>")


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)


def _layer(module: nn.Module) -> str:
    if not isinstance(module, nn.modules.conv._ConvNd):
        return type(module).__name__
    size = "x".join(str(k) for k in module.kernel_size)
    groups = f", groups {module.groups}" if module.groups > 1 else ""
    return f"{type(module).__name__} {module.in_channels} to {module.out_channels}, {size}{groups}"


class _Recorder(fx.Interpreter):
    """Runs a program and notes which kernel each fused call takes."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self._calls = program.calls
        self.kernels: list[Kernel] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with kernels.choices() as made:
            output = super().call_function(target, args, kwargs)
        if target in self._calls:
            ran = ", ".join(choice.chosen for choice in made if choice.chosen)
            kernel = f"{target.kernel(*args)}{': ' if ran else ''}{ran}"
            call = target.operator_call(*args)
            entry = None if call is None else measured.entry(*call)
            outputs = output if isinstance(output, tuple) else (output,)
            for layer, result in zip(self._calls[target].layers, outputs, strict=False):
                shapes = f"{tuple(args[0].shape)} -> {tuple(result.shape)}"
                self.kernels.append(Kernel(_path(layer), shapes, kernel, tuple(made), entry))
        return output


def _kernels(fast: nn.Module, inputs: tuple[Tensor, ...]) -> list[Kernel]:
    with torch.no_grad():
        program, tensors = region_of(fast).choose(inputs, {})
        if program is None:
            return []
        recorder = _Recorder(program)
        recorder.run(*tensors)
    return recorder.kernels

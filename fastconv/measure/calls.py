"""Calls of ops that are stated, not made: tensor arguments by shape, the others by value.

`Layer` is what fastconv/measure/layers.py has a table of, and what the cases of the tests are made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import away_from_kinks

Shape = tuple[int, ...]

# By the names that the commands take.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

BATCHED = ("input", "residual", "other")  # the arguments that have images


@dataclass(frozen=True)
class Layer:
    """One call of an op as a network makes it.

    Attributes:
        op: of fastconv.ops.
        name: where it comes from.
        shapes: of each tensor argument; a list of shapes for a list of tensors, None for one that is left out.
        why: the reason for which it is there.
        options: the other arguments.
        verified: how many images `python -m fastconv verify` calls it with; 0 if it does not.
    """

    op: str
    name: str
    shapes: dict[str, Any]
    why: str
    options: dict[str, Any] = field(default_factory=dict)
    verified: int = 0

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def __hash__(self) -> int:
        return hash((self.op, self.name))

    def tensors(
        self,
        dtype: torch.dtype,
        layout: str,
        device: torch.device,
        draw: Callable[[str, Shape], Tensor] | None = None,
    ) -> dict[str, Any]:
        """The tensor arguments.

        Args:
            dtype: of all of them.
            layout: a name in `FORMATS`, for tensors of four or five dimensions.
            draw: the values of an argument, by its name and shape; by default as `random_values` on the device.
        """

        def tensor(name: str, shape: Shape | None) -> Tensor | None:
            if shape is None:
                return None
            values = draw(name, shape) if draw else random_values(name, shape, device)
            return laid_out(values.to(device, dtype), layout)

        return {
            name: [tensor(name, s) for s in shape] if isinstance(shape, list) else tensor(name, shape)
            for name, shape in self.shapes.items()
        }

    def __call__(self, tensors: dict[str, Any], backend: str | None, **more: Any) -> list[Tensor]:
        """The op's outputs for these tensor arguments; `more` goes before `options`."""
        return run(self.op, {**tensors, **self.options}, **more, backend=backend)

    def preactivations(self, tensors: dict[str, Any]) -> list[Tensor]:
        """What goes into the last activation."""
        if self.op == "local_response_norm":
            return self(tensors, "reference")
        return self(tensors, "reference", **{self._activation_argument: "none"})

    def gates(self, exact: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
        """Per output, 1 where its gradient does not hang on how a ReLU's input was rounded to `dtype`.

        `exact` are the tensor arguments in float64.
        """
        residual = exact.get("residual")
        rounds = residual is not None or "depthwise_weight" in exact

        def rounded(value: Tensor) -> float:
            """The size of the convolution before its residual, or of what the hidden result's rounding moves."""
            return float(value.abs().max() + (0 if residual is None else residual.abs().max())) if rounds else 0.0

        gates = [away_from_kinks(value, self.activation, dtype, rounded(value)) for value in self.preactivations(exact)]
        if "depthwise_activation" in self.options:
            hidden = ops.depthwise_conv2d(
                exact["input"],
                exact["depthwise_weight"],
                exact["depthwise_bias"],
                self.options["stride"],
                self.options["padding"],
                backend="reference",
            )
            away = away_from_kinks(hidden, self.options["depthwise_activation"], dtype)
            gates = [gate & away.all(dim=1, keepdim=True) for gate in gates]
        return gates

    def sized(self, batch: int, largest_side: float = math.inf) -> Layer:
        """The layer for this many images, of at most this many pixels on either side."""

        def resized(shape: Shape) -> Shape:
            _, channels, *sides = shape
            return (batch, channels, *(int(min(side, largest_side)) for side in sides))

        shapes = {name: resized(shape) if name in BATCHED else shape for name, shape in self.shapes.items()}
        return replace(self, shapes=shapes)

    @property
    def activation(self) -> str:
        """The last activation that takes what was rounded; an LRN's takes the input."""
        if self.op == "local_response_norm":
            return "none"
        default = "relu" if self.op.endswith("relu") else "none"
        return self.options.get(self._activation_argument, default)

    @property
    def border(self) -> int | None:
        """How many rows and columns of the output padding can reach."""
        if "conv2d" not in self.op:
            return None
        padding = self.options.get("padding", 0)
        return max(1, *padding) if isinstance(padding, tuple) else max(1, padding)

    @property
    def reads_image(self) -> bool:
        """Whether this is a first layer, whose input has no gradient."""
        return self.shapes["input"][1] == 3

    @property
    def _activation_argument(self) -> str:
        separable = self.op == "depthwise_separable_conv2d"
        return "pointwise_activation" if separable else "activation"


def random_values(name: str, shape: Shape, device: torch.device) -> Tensor:
    """Normally distributed; weights are scaled so that activations keep their size."""
    values = torch.randn(shape, device=device)
    return values * math.sqrt(2 / math.prod(shape[1:])) if "weight" in name else values


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The tensor in a layout of `FORMATS`, where it has four or five dimensions; a copy only if it has to be."""
    if tensor.dim() not in (4, 5):
        return tensor
    format = FORMATS[layout]
    if tensor.dim() == 5 and format == torch.channels_last:
        format = torch.channels_last_3d
    return tensor.contiguous(memory_format=format)


def run(op: str, arguments: dict[str, Any], **more: Any) -> list[Tensor]:
    """The op's outputs, always as a list; `more` goes before `arguments`."""
    outputs = getattr(ops, op)(**{**arguments, **more})
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def mapped(arguments: dict[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments with the function applied to every tensor, in lists, too; all else as it is."""

    def one(value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
            return [one(item) for item in value]
        return function(value) if isinstance(value, Tensor) else value

    return {name: one(value) for name, value in arguments.items()}


def named_tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with the name of its argument; one of a list also has its index."""
    for name, value in arguments.items():
        if isinstance(value, list):
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value) if isinstance(item, Tensor))
        elif isinstance(value, Tensor):
            yield name, value

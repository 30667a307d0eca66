"""Calls of operators that are stated, not made: what tensors there were, by size, strides and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..operators.activations import activate
from ..operators.schemas import argument_names
from ..operators.shape_classes import IMAGES, ShapeClass, shape_class

# Masks are read from them.
OUTPUTS = ("output", "outputs")
# What makes a ReLU6 reach 6.
_FOR_RELU6 = 4


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        return TensorSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def reach(self) -> int:
        """Elements of memory from the first to the last."""
        reach = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return reach if self.numel else 0

    def filled(self, values: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """With these values, of which there may be fewer than elements: an expanded tensor repeats them."""
        memory = values((self.reach,)).to(self.dtype)
        return memory.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class OperatorCall:
    """One call of an operator.

    Attributes:
        shape_class: what it is looked up by.
        args: as in the operator's schema, tensors as `TensorSpec`.
    """

    shape_class: ShapeClass
    args: tuple[Any, ...]

    @staticmethod
    def of(operator: str, args: Sequence[Any]) -> OperatorCall:
        return OperatorCall(shape_class(operator, args), tuple(_mapped(args, Tensor, TensorSpec.of)))

    @property
    def operator(self) -> str:
        return self.shape_class.operator

    @property
    def is_backward(self) -> bool:
        return self.operator.endswith("_backward")

    def named(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(argument_names(self.operator), self.args, strict=True))

    @property
    def batch(self) -> int:
        """How many images there are; 1 where dimension 0 is none."""
        sizes = {spec.shape[0] if spec.shape else 1 for spec in self._images()}
        return sizes.pop() if len(sizes) == 1 else 1

    @property
    def numel(self) -> int:
        """Of all tensors together."""
        found: list[TensorSpec] = []
        _mapped(self.args, TensorSpec, found.append)
        return sum(spec.numel for spec in found)

    def of_images(self, count: int) -> OperatorCall:
        """The call for the first so many of its images."""

        def fewer(spec: TensorSpec) -> TensorSpec:
            return replace(spec, shape=(min(count, spec.shape[0]), *spec.shape[1:]))

        if self.batch <= count:
            return self
        args = [_mapped(v, TensorSpec, fewer) if n in IMAGES else v for n, v in self.named().items()]
        return replace(self, args=tuple(args))

    def _images(self) -> list[TensorSpec]:
        found: list[TensorSpec] = []
        _mapped([value for name, value in self.named().items() if name in IMAGES], TensorSpec, found.append)
        return found

    def draw(self, device: torch.device, seed: int) -> list[Any]:
        """Random arguments, the same for a seed: normally distributed; weights scaled so that activations keep their
        size, outputs as the activation leaves them; where there is a ReLU6, so large that some are beyond 6."""
        generator = torch.Generator(device).manual_seed(seed)
        named = self.named()
        activation = named.get("pointwise_activation", named.get("activation", "none"))
        scaled = ("input", *OUTPUTS) if "relu6" in (activation, named.get("depthwise_activation")) else ()

        def drawn(name: str, spec: TensorSpec) -> Tensor:
            def values(shape: tuple[int, ...]) -> Tensor:
                found = torch.randn(shape, generator=generator, device=device)
                if "weight" in name:
                    found *= math.sqrt(2 / max(1, math.prod(spec.shape[1:])))
                if name in scaled:
                    found *= _FOR_RELU6
                return activate(found, activation) if name in OUTPUTS else found

            return spec.filled(values)

        def fill(name: str, value: Any) -> Any:
            return _mapped(value, TensorSpec, lambda spec: drawn(name, spec))

        return [fill(name, value) for name, value in named.items()]

    # ------------------------------------------------------------------------------------- as JSON

    def to_json(self) -> dict[str, Any]:
        def tensor(spec: TensorSpec) -> dict[str, Any]:
            dtype = str(spec.dtype).removeprefix("torch.")
            return {"shape": list(spec.shape), "stride": list(spec.stride), "dtype": dtype}

        return {"class": list(self.shape_class), "args": _mapped(list(self.args), TensorSpec, tensor)}

    @staticmethod
    def from_json(document: dict[str, Any]) -> OperatorCall:
        def tensor(spec: dict[str, Any]) -> TensorSpec:
            return TensorSpec(tuple(spec["shape"]), tuple(spec["stride"]), getattr(torch, spec["dtype"]))

        operator, family, size = document["class"]
        args = _mapped(document["args"], dict, tensor)
        return OperatorCall(ShapeClass(operator, family, tuple(size)), tuple(args))


def _mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The value with the function applied to all of a kind, in lists, too."""
    if isinstance(value, kind):
        return function(value)
    return [_mapped(item, kind, function) for item in value] if isinstance(value, (list, tuple)) else value


def mapped_tensors(args: Sequence[Any], function: Callable[[Tensor], Any]) -> list[Any]:
    """Arguments with the function applied to every tensor, in lists, too."""
    return _mapped(list(args), Tensor, function)


def tensors_of(args: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments, in lists, too."""
    found: list[Tensor] = []
    mapped_tensors(args, found.append)
    return found


def flat(outputs: Any) -> list[Tensor]:
    """What an operator returned as one list of tensors."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in flat(output)]

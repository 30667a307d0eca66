"""Calls of operators by class: what a table measured on a machine is looked up by.

Two calls of a class run the same kernels in the same time, as far as that can be told without running them. A family
is all of a call but its sizes: channels, filters, dtypes, layouts and options. Sizes are those of the images, their
number by powers of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .precision import allow_tf32
from .schemas import argument_names

# Arguments whose dimension 0 is the batch and whose dimensions from 2 on are pixels.
IMAGES = frozenset({"input", "residual", "other", "grad_output", "grad_outputs", "output", "outputs"})
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


class ShapeClass(NamedTuple):
    """Attributes:
    operator: a name of fastconv/operators/schemas.py.
    family: everything but sizes, printable.
    size: the batch, rounded up to a power of two, then the height, width, ... of the images.
    """

    operator: str
    family: str
    size: tuple[int, ...]

    @property
    def pixels(self) -> int:
        """Of all images."""
        product = 1
        for side in self.size:
            product *= side
        return product


def shape_class(operator: str, args: Sequence[Any]) -> ShapeClass:
    """The class of a call; `args` as in the operator's schema."""
    named = zip(argument_names(operator), args, strict=True)
    family = "; ".join(f"{name} {_describe(value, name in IMAGES)}" for name, value in named)
    return ShapeClass(operator, family, _size(args))


def _size(args: Sequence[Any]) -> tuple[int, ...]:
    """Of the first tensor, which has images in every operator."""
    first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    batch, _, *pixels = first.shape if first.dim() > 1 else (1, 1, *first.shape)
    return (1 << (int(batch) - 1).bit_length() if batch else 0, *(int(side) for side in pixels))


def _describe(value: Any, has_images: bool) -> str:
    if isinstance(value, Tensor):
        shape = list(value.shape)
        sizes = [f"{side}" if not has_images or i == 1 else "*" for i, side in enumerate(shape)]
        return f"{dtype_class(value)}[{','.join(sizes)}]{_layout(value)}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_describe(item, has_images) for item in value)})"
    return str(int(value)) if isinstance(value, bool) else str(value)


def dtype_class(tensor: Tensor) -> str:
    """The dtype; of float32 on a GPU, where the tensor cores may be used, also whether they are."""
    if tensor.dtype is torch.float32 and tensor.device.type == "cuda" and allow_tf32():
        return "tf32"
    return _DTYPES.get(tensor.dtype, str(tensor.dtype))


def _layout(tensor: Tensor) -> str:
    """How it lies in memory: "" where contiguous and channels_last are one."""
    plain = tensor.is_contiguous()
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return "" if plain else " channels_last"
    if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return "" if plain else " channels_last"
    if plain:
        return " contiguous" if tensor.dim() in (4, 5) else ""
    return " strided"

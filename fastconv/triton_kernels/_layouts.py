"""How images lie as kernels without a matrix product read and write them: along channels, or along pixels.

That is channels_last or contiguous, or a slice of it, in vectors of `unit` elements. What lies otherwise is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import Form, form, unit_of

_LAYOUTS = {"channels": torch.channels_last, "pixels": torch.contiguous_format}


def runs_along(given: Form) -> str:
    """The part of a table's key that the layout decides."""
    return "pixels" if given.strides[3] == 1 and given.strides[1] != 1 else "channels"


def _lies(given: Form, along: str) -> bool:
    inner = 1 if along == "channels" else 3
    return given.strides[inner] == 1 or given.shape[inner] == 1


def laid(given: Form, along: str) -> Form:
    """The form of what `lay` returns."""
    if _lies(given, along):
        return given
    N, C, H, W = given.shape
    strides = (C * H * W, 1, W * C, C) if along == "channels" else (C * H * W, H * W, W, 1)
    return Form((N, C, H, W), strides, given.dtype, True)


def lay(tensor: Tensor, along: str) -> Tensor:
    """The tensor, or a copy of it, that lies along channels or pixels."""
    return tensor if _lies(form(tensor), along) else tensor.contiguous(memory_format=_LAYOUTS[along])


def room(output: Tensor, along: str) -> Tensor:
    """The output, or an unwritten tensor like it that does."""
    return output if _lies(form(output), along) else torch.empty_like(output, memory_format=_LAYOUTS[along])


def vector_of(along: str, *images: Form) -> int:
    """Elements of the vectors of which all of them are made."""
    inner, outer = (1, (0, 2, 3)) if along == "channels" else (3, (0, 1, 2))
    sizes = [size for i in images for size in (i.shape[inner], *(i.strides[d] for d in outer if i.shape[d] > 1))]
    return unit_of(images[0].dtype, *sizes)


def strides_of(given: Form, along: str, unit: int) -> tuple[int, int, int]:
    """Of images, rows, and columns, or along pixels channels, in units."""
    n, c, h, w = given.strides
    return n // unit, h // unit, (w if along == "channels" else c) // unit


def size_of(given: Form, along: str, unit: int) -> tuple[int, int]:
    """Rows and columns, of which there are units along pixels."""
    _, _, rows, columns = given.shape
    return rows, columns // unit if along == "pixels" else columns


def channels_of(given: Form, along: str, unit: int) -> int:
    """How many, in units along channels."""
    return given.shape[1] // unit if along == "channels" else given.shape[1]

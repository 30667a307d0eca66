"""How tensors lie in memory as the matrix products read and write them.

Operands lie channels_last: the channels of a pixel, and of a tap of a filter, one behind the other, in vectors of
16 bytes (8 where that saves a copy) that asynchronous copies take. What lies otherwise, contiguous images say, or the 3
channels of a photograph, is copied into this form once, with zeros for channels that are missing.

Strides and numbers of channels go to kernels in units of a vector, which the kernel multiplies by the constant UNIT:
the compiler then knows that they are multiples of it, whether or not they are of 16, which is all it would notice
itself; and no other shape compiles anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..operators.convolution import Geometry

VECTOR_BYTES = 16
_LEAST_BYTES = 8


class Pixel(NamedTuple):
    """The strides that lead to a pixel, in units."""

    n: int
    h: int
    w: int


class Form(NamedTuple):
    """How a tensor lies in memory: what a launch depends on, besides what it computes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # to 16 bytes

    @property
    def pixel_sizes(self) -> list[int]:
        """The strides of a pixel that count: those along more than one."""
        return [self.strides[d] for d in (0, 2, 3) if self.shape[d] > 1]

    @property
    def has_dense_pixels(self) -> bool:
        """Whether one stride, that of a column, leads through the pixels of all images."""
        N, _, H, W = self.shape
        n, _, h, w = self.strides
        return (H == 1 or h == W * w) and (N == 1 or n == H * W * w)

    @property
    def has_planes(self) -> bool:
        """Whether the pixels of an image lie one behind the other."""
        _, _, H, W = self.shape
        return (W == 1 or self.strides[3] == 1) and (H == 1 or self.strides[2] == W)

    @property
    def has_inner_channels(self) -> bool:
        return self.strides[1] == 1 or self.shape[1] == 1

    def pixel(self, unit: int) -> Pixel:
        n, _, h, w = self.strides
        return Pixel(n // unit, h // unit, w // unit)


def form(tensor: Tensor) -> Form:
    return Form(tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % VECTOR_BYTES == 0)


def channels_last(shape: Sequence[int], dtype: torch.dtype) -> Form:
    """Of a new tensor."""
    N, C, H, W = shape
    return Form((N, C, H, W), (H * W * C, 1, W * C, C), dtype, True)


class Window(NamedTuple):
    """A convolution's stride, padding and dilation."""

    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int


class Divisor(NamedTuple):
    """A divisor of numbers below 2^31, for `device.quotient`: n // value = (2 n * magic >> 32) >> shift."""

    value: int
    magic: int  # 32 bits, as a signed number
    shift: int


def divisor(value: int) -> Divisor:
    """The multiplier that stands for a division (Granlund, Montgomery 1994, Division by Invariant Integers)."""
    shift = (value - 1).bit_length()
    magic = -(-(1 << (31 + shift)) // value)
    return Divisor(value, magic - (1 << 32) if magic >> 31 else magic, shift)


def flat(*numbers: int | tuple[int, ...]) -> tuple[int, ...]:
    """As a kernel's arguments: of the members of a tuple Triton would compile kernels of their own for 1 and for 16."""
    return tuple(n for each in numbers for n in (each if isinstance(each, tuple) else (each,)))


def window(geometry: Geometry) -> Window:
    return Window(*geometry.stride, *geometry.padding, *geometry.dilation)


def fixed(geometry: Geometry) -> Geometry:
    """With tuples, which are hashable."""
    stride, padding, dilation, groups = geometry
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)


def unit_of(dtype: torch.dtype, *sizes: int) -> int:
    """Elements of the longest vector, at most 16 bytes, that divides all sizes."""
    unit = VECTOR_BYTES // dtype.itemsize
    for size in sizes:
        while size % unit:
            unit //= 2
    return unit


def padded_channels(channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """(channels with zeros behind them, the unit): as many as vectors fill."""
    unit = unit_of(dtype, channels)
    if unit * dtype.itemsize < _LEAST_BYTES:
        unit = 4 if channels <= 4 else VECTOR_BYTES // dtype.itemsize
    return -(-channels // unit) * unit, unit


# -------------------------------------------------------------------------------------------- operands


class Image(NamedTuple):
    """An operand [N, groups * channels, H, W], as a kernel reads it.

    Attributes:
        form: of the tensor given or, with `copied`, of the copy.
        channels: of a group, zeros included.
        unit: elements of its vectors.
    """

    form: Form
    copied: bool
    groups: int
    channels: int
    unit: int

    @property
    def pixel(self) -> Pixel:
        return self.form.pixel(self.unit)

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor that the kernel gets."""
        if not self.copied:
            return tensor
        N, C, H, W = tensor.shape
        channels = C // self.groups
        copy = torch.empty((N, H, W, self.groups, self.channels), dtype=tensor.dtype, device=tensor.device)
        copy[..., :channels] = tensor.permute(0, 2, 3, 1).unflatten(3, (self.groups, channels))
        if self.channels > channels:
            copy[..., channels:] = 0
        return copy.flatten(3).permute(0, 3, 1, 2)

    def boxes(self, tensor: Tensor, height: int, width: int) -> TensorDescriptor:
        """Of the tensor that the kernel gets, with dense pixels: [N * H * W, channels], of which it loads boxes."""
        N, C, H, W = self.form.shape
        return TensorDescriptor(tensor, [N * H * W, C], [self.form.strides[3], 1], [height, width])


def image(given: Form, groups: int = 1) -> Image:
    """The tensor as it lies, if it does so, else a copy."""
    N, C, H, W = given.shape
    channels = C // groups
    if given.has_inner_channels and given.aligned:
        unit = unit_of(given.dtype, channels, *given.pixel_sizes)
        if unit * given.dtype.itemsize >= _LEAST_BYTES:
            return Image(given, False, groups, channels, unit)
    whole, unit = padded_channels(channels, given.dtype)
    return Image(channels_last((N, groups * whole, H, W), given.dtype), True, groups, whole, unit)


class Filters(NamedTuple):
    """A weight [K, C, R, S] as rows [groups * filters, R * S * channels], taps outside and channels inside.

    What a group has no filters or channels for is zeros.
    """

    copied: bool
    groups: int
    filters: int
    channels: int
    taps: int

    def of(self, weight: Tensor) -> Tensor:
        """The tensor that the kernel gets."""
        if not self.copied:
            return weight
        K, C, R, S = weight.shape
        count = K // self.groups
        rows = weight.new_empty((self.groups, self.filters, R, S, self.channels))
        if self.filters > count or self.channels > C:
            rows.zero_()
        rows[:, :count, ..., :C] = weight.permute(0, 2, 3, 1).unflatten(0, (self.groups, count))
        return rows

    def boxes(self, tensor: Tensor, height: int, width: int) -> TensorDescriptor:
        """Of the tensor that the kernel gets: its rows, of which it loads boxes."""
        depth = self.taps * self.channels
        return TensorDescriptor(tensor, [self.groups * self.filters, depth], [depth, 1], [height, width])


def filters(given: Form, channels: int, groups: int, count: int = 0) -> Filters:
    """With so many channels and, if it has fewer, filters in each group."""
    K, C, R, S = given.shape
    count = max(count, K // groups)
    expected = (R * S * C, 1, S * C, C)
    as_is = given.aligned and all(
        size == 1 or stride == needed for size, stride, needed in zip(given.shape, given.strides, expected, strict=True)
    )
    copied = not as_is or (count, channels) != (K // groups, C)
    return Filters(copied, groups, count, channels, R * S)


# -------------------------------------------------------------------------------------------- results


class Result(NamedTuple):
    """Where a kernel writes [N, groups * channels, P, Q], and what it adds there, which lies alike.

    Attributes:
        form: of the tensor given or, with `copied`, of one whose values are copied there.
        residual: likewise, with `residual_copied`.
        planes: pixels lie one behind the other; otherwise channels do.
        unit: elements of its vectors.
        channels: of a group: in units, where they lie one behind the other.
    """

    form: Form
    copied: bool
    residual: Form | None
    residual_copied: bool
    planes: bool
    unit: int
    channels: int

    @property
    def strides(self) -> tuple[Pixel, int]:
        """To a pixel, and to a channel of planes."""
        return self.form.pixel(self.unit), self.form.strides[1] // self.unit

    @property
    def residual_strides(self) -> tuple[Pixel, int]:
        residual = self.residual or self.form
        return residual.pixel(self.unit), residual.strides[1] // self.unit

    def in_units(self, unit: int) -> Result:
        """With shorter vectors."""
        return self._replace(unit=unit, channels=self.channels if self.planes else self.channels * self.unit // unit)

    def of(self, output: Tensor) -> Tensor:
        """The tensor that the kernel gets; `output` has its values after `written`."""
        return torch.empty_like(output, memory_format=torch.channels_last) if self.copied else output

    def written(self, tensor: Tensor, output: Tensor) -> None:
        if self.copied:
            output.copy_(tensor)

    def residual_of(self, residual: Tensor | None) -> Tensor | None:
        """The residual that the kernel gets."""
        if residual is None or not self.residual_copied or self.residual is None:
            return residual
        return residual.new_empty_strided(self.residual.shape, self.residual.strides).copy_(residual)


def result(given: Form, groups: int = 1, residual: Form | None = None, *, planes: bool | None = None) -> Result:
    """As they lie, where a kernel can use them so. With `planes` said, as this says."""
    inner, in_planes = given.has_inner_channels, given.has_planes
    if planes is None:
        planes = in_planes and not inner
    copied = not (in_planes if planes else inner)
    target = channels_last(given.shape, given.dtype) if copied else given
    residual_copied = residual is not None and not (residual.has_planes if planes else residual.has_inner_channels)
    if residual_copied:
        residual = target
    both = [target] if residual is None else [target, residual]
    _, C, P, Q = target.shape
    if planes:
        sizes = [P * Q, *(f.strides[d] for f in both for d in (0, 1) if f.shape[d] > 1)]
    else:
        sizes = [C // groups, *(size for f in both for size in f.pixel_sizes)]
    unit = unit_of(given.dtype, *sizes)
    channels = C // groups if planes else C // groups // unit
    return Result(target, copied, residual, residual_copied, planes, unit, channels)

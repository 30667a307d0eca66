"""The pass between a backward's activation and its convolutions, and sums of partial results.

`mask_and_sum` is the one pass over the gradient of a convolution's output: it undoes the activation for all of the
gradients that read it (input, weight, residual), and adds up the bias's. Masking where those kernels load the gradient
would read the output along with it once for each tap and each tile of columns, R * S times or more; and the sum would
have to leave the tensor core's operands, which never pass through registers.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, table
from .device import image_of, index, masked, narrow, quotient, widen
from .operands import Form, Pixel, divisor, form, unit_of


@triton.jit
def offsets(
    m, k, image, P, Q, pixel, channel,
    LAYOUT: tl.constexpr, ROW_UNIT: tl.constexpr, COLUMN_UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of pixels m and channels k in a tensor that lies as `_Place` says; image, P and Q are divisors."""
    if LAYOUT == "channels":
        offset = (m * (pixel.w * COLUMN_UNIT))[:, None] + k[None, :]
    elif LAYOUT == "pixels":
        n = quotient(m, image, WIDE)
        row = n * (pixel.n * ROW_UNIT) + (m - n * image.value)
        row = tl.max_contiguous(tl.multiple_of(row, ROW_UNIT), ROW_UNIT)
        offset = row[:, None] + (k * (channel * ROW_UNIT))[None, :]
    else:
        n, p, q = image_of(m, P, Q, WIDE)
        offset = (n * pixel.n + p * pixel.h + q * pixel.w)[:, None] + (k * channel)[None, :]
    return offset


@triton.jit(
    do_not_specialize=[
        "rows", "part_steps", "K", "image", "P", "Q",
        "g_pixel", "g_channel", "z_pixel", "z_channel", "y_pixel", "y_channel",
    ]
)  # fmt: skip
def mask_and_sum_kernel(
    g_ptr, z_ptr, y_ptr, sums_ptr,
    rows, part_steps, K, image, P, Q,  # rows and K in vectors; the others as divisors
    g_pixel, g_channel, z_pixel, z_channel, y_pixel, y_channel,
    G: tl.constexpr, Z: tl.constexpr, Y: tl.constexpr,  # layouts
    ROW_UNIT: tl.constexpr, COLUMN_UNIT: tl.constexpr,  # pixels and channels of a vector
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = g where the output z lets it through; sums[part, k] = sum of y over the part's pixels.

    A program owns BLOCK_N channels and `part_steps` blocks of BLOCK_M pixels. z, y or sums may be None.
    """
    pixels, channels = index(rows, WIDE) * ROW_UNIT, K * COLUMN_UNIT
    columns = tl.cdiv(channels, BLOCK_N)
    part = index(tl.program_id(0) // columns, WIDE)
    k = index(tl.program_id(0) % columns, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * part_steps
    for step in range(first, tl.minimum(first + part_steps, tl.cdiv(pixels, BLOCK_M))):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (m < pixels)[:, None] & (k < channels)[None, :]
        g_offset = offsets(m, k, image, P, Q, g_pixel, g_channel, G, ROW_UNIT, COLUMN_UNIT, WIDE)
        grad = widen(tl.load(g_ptr + g_offset, inside, 0.0))
        if z_ptr is not None:
            z_offset = offsets(m, k, image, P, Q, z_pixel, z_channel, Z, ROW_UNIT, COLUMN_UNIT, WIDE)
            grad = masked(grad, widen(tl.load(z_ptr + z_offset, inside, 1.0)), ACTIVATION)
        if y_ptr is not None:
            y_offset = offsets(m, k, image, P, Q, y_pixel, y_channel, Y, ROW_UNIT, COLUMN_UNIT, WIDE)
            tl.store(y_ptr + y_offset, narrow(grad, y_ptr.dtype.element_ty), inside)
        sums += grad
    if sums_ptr is not None:
        tl.store(sums_ptr + part * channels + k, tl.sum(sums, 0), k < channels)


@triton.jit(do_not_specialize=["units", "parts"])
def sum_parts_kernel(
    x_ptr, y_ptr, units, parts, WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """y[i] = sum over parts of x[part, i], BLOCK_M parts at a time; i in vectors of UNIT."""
    size = index(units, WIDE) * UNIT
    i = index(tl.program_id(0), WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.arange(0, BLOCK_M)
    offset = (part * size)[:, None] + i[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, parts, BLOCK_M):
        total += tl.load(x_ptr + offset, (first + part < parts)[:, None] & (i < size)[None, :], 0.0)
        x_ptr += size * BLOCK_M
    tl.store(y_ptr + i, narrow(tl.sum(total, 0), y_ptr.dtype.element_ty), i < size)


def room_for_parts(output: Tensor, parts: int) -> Tensor:
    """What a kernel writes the parts of `output` to: `output` itself where there is but one, else for `sum_parts`."""
    return output if parts == 1 else torch.empty(parts * output.numel(), dtype=torch.float32, device=output.device)


def sum_parts(sums: Tensor, parts: int, output: Tensor) -> None:
    """Adds `parts` float32 copies of `output`, which lie one behind the other with its strides, into it.

    Many parts at once where elements are few, a bias's, say: one after the other they would take a latency each.
    """
    config = table.config("sum_parts", "any")
    rows, columns, size = config["BLOCK_M"], config["BLOCK_N"], output.numel()
    if size >= rows * columns * launch.processors(output.device):
        rows, columns = 1, rows * columns
    unit = unit_of(sums.dtype, size)
    launch.launch(
        sum_parts_kernel,
        launch.cdiv(size, columns),
        sums, output, size // unit, parts,
        WIDE=size > launch.NARROW_LIMIT,
        UNIT=unit,
        **{**config, "BLOCK_M": rows, "BLOCK_N": columns},
    )  # fmt: skip


class _Place(NamedTuple):
    """How a tensor [N, K, P, Q] lies in memory.

    Attributes:
        layout: "channels" lie one behind the other, and one stride leads through all pixels; or an image's "pixels" lie
            one behind the other; or "any".
        pixel: strides. Of "channels" that of all pixels is the last, of "pixels" only that of the images counts.
        channel: its stride.
        sizes: what a vector has to divide.
    """

    layout: str
    pixel: Pixel
    channel: int
    sizes: tuple[int, ...]

    def strides(self, units: dict[str, int]) -> tuple[Pixel, int]:
        unit = units.get(self.layout, 1)
        return Pixel(*(stride // unit for stride in self.pixel)), self.channel // unit


def _place(tensor: Form) -> _Place:
    (N, K, P, Q), (n, k, p, q) = tensor.shape, tensor.strides
    step = _stride_through((Q, q), (P, p), (N, n))
    if k == 1 and K > 1 and step is not None:
        return _Place("channels", Pixel(0, 0, step), k, (K, step))
    if _stride_through((Q, q), (P, p)) == 1:
        return _Place("pixels", Pixel(n, p, q), k, (P * Q, n if N > 1 else 0, k if K > 1 else 0))
    return _Place("any", Pixel(n, p, q), k, ())


def _stride_through(*dims: tuple[int, int]) -> int | None:
    """The stride that leads through these (size, stride), the innermost first, as if they were one dimension."""
    dims = tuple(dim for dim in dims if dim[0] > 1)
    dense = all(outer == size * inner for (size, inner), (_, outer) in itertools.pairwise(dims))
    return (dims[0][1] if dims else 1) if dense else None


# As many as keep enough loads under way.
_PROGRAMS_PER_PROCESSOR = 8


class _Plan(NamedTuple):
    """All of a launch but its tensors."""

    asked: table.Asked
    programs: int
    parts: int
    numbers: tuple[Any, ...]
    meta: dict[str, Any]


@launch.planner
def _plan(tensors: tuple[Form, Form, Form], activation: str, device: torch.device, preferences: Any) -> _Plan:
    N, K, P, Q = tensors[0].shape
    places = [_place(tensor) for tensor in tensors]
    layouts = [place.layout for place in places]
    units = {
        layout: unit_of(tensors[0].dtype, *[s for p in places if p.layout == layout for s in p.sizes] or [1])
        for layout in ("pixels", "channels")
    }
    asked = table.ask("mask_and_sum", "channels" if "channels" in layouts else "pixels")
    rows, columns = asked.config["BLOCK_M"], min(asked.config["BLOCK_N"], triton.next_power_of_2(K))
    rows *= asked.config["BLOCK_N"] // columns
    tiles = launch.cdiv(K, columns)
    part_steps, parts = launch.split(launch.cdiv(N * P * Q, rows), tiles, device, _PROGRAMS_PER_PROCESSOR)
    numbers = (
        N * P * Q // units["pixels"], part_steps, K // units["channels"], divisor(P * Q), divisor(P), divisor(Q),
        *(strides for place in places for strides in place.strides(units)),
    )  # fmt: skip
    meta = {
        **asked.config,
        "BLOCK_M": rows, "BLOCK_N": columns,
        "G": layouts[0], "Z": layouts[1], "Y": layouts[2],
        "ROW_UNIT": units["pixels"], "COLUMN_UNIT": units["channels"],
        "ACTIVATION": activation,
        "WIDE": launch.wide(*tensors),
    }  # fmt: skip
    return _Plan(asked, tiles * parts, parts, numbers, meta)


def mask_and_sum(
    grad: Tensor, output: Tensor | None, activation: str, grad_bias: Tensor | None, masked_grad: Tensor | None
) -> None:
    """Writes the gradient before the activation into `masked_grad` and its sum over pixels into `grad_bias`."""
    if masked_grad is None and grad_bias is None:
        return
    if grad.numel() == 0:
        if grad_bias is not None:
            grad_bias.zero_()
        return
    forms = form(grad), form(grad if output is None else output), form(grad if masked_grad is None else masked_grad)
    plan = _plan(forms, activation, grad.device, table.preferences())
    table.note(plan.asked)
    sums = None
    if grad_bias is not None:
        sums = torch.empty(plan.parts * grad_bias.numel(), dtype=torch.float32, device=grad.device)
    launch.launch(mask_and_sum_kernel, plan.programs, grad, output, masked_grad, sums, *plan.numbers, **plan.meta)
    if grad_bias is not None and sums is not None:
        sum_parts(sums, plan.parts, grad_bias)

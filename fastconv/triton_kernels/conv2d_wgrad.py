"""The gradient of a 2-d convolution's weight as a matrix product; letters as in `conv2d_fprop`.

dw[k, (r, s, c)] = sum over pixels m  dy[m, k] * x[pixel(m) + tap(r, s), c]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.convolution import Geometry
from . import launch, table
from ._reduce import room_for_parts, sum_parts
from .device import dot, image_of, index, narrow, quotient, within
from .operands import Divisor, Form, Image, Pixel, Window, divisor, filters, fixed, flat, form, image, window

_NUMBERS = [
    *("pixels", "C", "C_magic", "C_shift", "K", "H", "W", "P", "P_magic", "P_shift", "Q", "Q_magic", "Q_shift"),
    *("part_steps", "part_size", "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    *("g_n", "g_h", "g_w", "x_n", "x_h", "x_w"),
]


@triton.jit(do_not_specialize=_NUMBERS)
def conv2d_wgrad(
    g, x, y_ptr,
    pixels, C, C_magic, C_shift, K, H, W, P, P_magic, P_shift, Q, Q_magic, Q_shift, part_steps, part_size,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    g_n, g_h, g_w, x_n, x_h, x_w,
    R: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr, G_UNIT: tl.constexpr,
    FLAT: tl.constexpr, PADDED: tl.constexpr, G_DENSE: tl.constexpr, X_DENSE: tl.constexpr,
    BOXES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M output channels x BLOCK_N of the columns (r, s, c), of one group.

    Pixels are split into parts of `part_steps` blocks of BLOCK_K. Part i writes its sum at y_ptr + i * part_size, and
    `sum_parts` adds the parts in a fixed order: the same bits every time, where atomics would give others.

    FLAT: BLOCK_N does not divide C, vectors of a tile belong to taps of their own. PADDED: a tap may lie outside of the
    image. G_DENSE: one stride leads through all pixels of dy. X_DENSE: so does one of x, and to the same pixels.
    BOXES: there is but one tap, and dy and x are descriptors, of which the TMA brings boxes. C, K and
    part_size are in units.
    """
    C, P, Q = Divisor(C, C_magic, C_shift), Divisor(P, P_magic, P_shift), Divisor(Q, Q_magic, Q_shift)
    window = Window(stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w)
    g_pixel, x_pixel = Pixel(g_n, g_h, g_w), Pixel(x_n, x_h, x_w)
    channels, filters = C.value * UNIT, K * G_UNIT
    depth = R * S * channels
    rows, columns = tl.cdiv(filters, BLOCK_M), tl.cdiv(depth, BLOCK_N)
    # neighbouring programs work on the same pixels, which they find in L2
    program = tl.program_id(0)
    column, row = program % columns, program // columns % rows
    steps = tl.cdiv(pixels, BLOCK_K)
    parts = tl.cdiv(steps, part_steps)
    part = program // (columns * rows) % parts
    group = index(program // (columns * rows * parts), WIDE)
    k = row * BLOCK_M + tl.arange(0, BLOCK_M)
    j = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if FLAT:
        tap = quotient(j // UNIT, C, False) if R * S > 1 else j * 0
    else:
        tap = column * BLOCK_N // channels
    c = j - tap * channels
    r, s = tap // S, tap % S
    tap_h, tap_w = r * window.dilation_h - window.padding_h, s * window.dilation_w - window.padding_w
    x_tap = (tap_h * index(x_pixel.h, WIDE) + tap_w * index(x_pixel.w, WIDE)) * UNIT
    if FLAT:
        x_tap = tl.where(j < depth, x_tap + c, j % UNIT)
        x_tap = tl.max_contiguous(tl.multiple_of(x_tap, UNIT), UNIT)
    if not BOXES:
        x += group * channels
        g += group * filters
    g_row = tl.where(k < filters, k, k % G_UNIT)
    g_row = tl.max_contiguous(tl.multiple_of(g_row, G_UNIT), G_UNIT)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * part_steps
    for step in range(first, tl.minimum(first + part_steps, steps)):
        if BOXES:
            a = g.load([step * BLOCK_K, row * BLOCK_M]).T
            b = x.load([step * BLOCK_K, column * BLOCK_N])
        else:
            m = index(step, WIDE) * BLOCK_K + tl.arange(0, BLOCK_K)
            in_pixels = m < pixels
            m = tl.where(in_pixels, m, 0)
            n, p, q = image_of(m, P, Q, WIDE)
            if G_DENSE:
                g_offset = m * (g_pixel.w * G_UNIT)
            else:
                g_offset = (n * g_pixel.n + p * g_pixel.h + q * g_pixel.w) * G_UNIT
            a = tl.load(g + (g_row[:, None] + g_offset[None, :]), in_pixels[None, :], 0.0)
            h, w = p * window.stride_h, q * window.stride_w
            if X_DENSE:
                x_offset = m * (x_pixel.w * UNIT)
            else:
                x_offset = (n * x_pixel.n + h * x_pixel.h + w * x_pixel.w) * UNIT
            if FLAT:
                inside = tl.broadcast_to(in_pixels[:, None], (BLOCK_K, BLOCK_N))
                if PADDED:
                    inside = inside & within(h[:, None] + tap_h[None, :], H) & within(w[:, None] + tap_w[None, :], W)
                    inside = tl.max_constancy(inside, (1, UNIT))
                offset = tl.where(inside, x_offset[:, None] + x_tap[None, :], 0)
                b = tl.load(x + tl.max_contiguous(tl.multiple_of(offset, (1, UNIT)), (1, UNIT)), inside, 0.0)
            else:
                inside = in_pixels
                if PADDED:
                    inside = inside & within(h + tap_h, H) & within(w + tap_w, W)
                offset = tl.where(inside, x_offset + x_tap, 0)
                if not WIDE:  # as in conv2d_fprop
                    offset = offset.to(tl.uint32, bitcast=True).to(tl.int64)
                b = tl.load(x + (tl.multiple_of(offset, UNIT)[:, None] + c[None, :]), inside[:, None], 0.0)
        sums = dot(a, b, sums, PRECISION)
    y_ptr += index(part, WIDE) * (part_size * UNIT)
    y_row = (group * filters + k) * depth
    result = narrow(sums, y_ptr.dtype.element_ty)
    tl.store(y_ptr + (y_row[:, None] + j[None, :]), result, (k < filters)[:, None] & (j < depth)[None, :])


class _Plan(NamedTuple):
    """All of a launch but its tensors."""

    asked: table.Asked
    g: Image
    x: Image
    copied: bool  # rows of the gradient are computed, and copied to where it lies
    parts: int
    boxes: tuple[int, int, int] | None  # the tile's rows, columns and terms
    programs: int
    numbers: tuple[Any, ...]
    meta: dict[str, Any]


@launch.planner
def _plan(
    grad: Form, input: Form, grad_weight: Form, geometry: Geometry, precision: str, device: torch.device,
    preferences: Any,
) -> _Plan:  # fmt: skip
    groups, (N, _, P, Q) = geometry.groups, grad.shape
    (K, _, R, S), (_, _, H, W) = grad_weight.shape, input.shape
    g, x = image(grad, groups), image(input, groups)
    rows = filters(grad_weight, x.channels, groups, g.channels)
    depth, pixels = R * S * x.channels, N * P * Q
    vector = min(g.unit, x.unit) * grad.dtype.itemsize
    dtype_class = launch.dtype_class(grad.dtype, precision)
    asked = table.ask_for_convolution("conv2d_wgrad", dtype_class, (R, S), K // groups, vector, device)
    block_m, block_n, block_k = table.block(asked.config, pixels)
    tiles = launch.cdiv(g.channels, block_m) * launch.cdiv(depth, block_n) * groups
    part_steps, parts = launch.split(launch.cdiv(pixels, block_k), tiles, device)
    size = groups * g.channels * depth
    padded = any(geometry.padding)
    g_dense = g.form.has_dense_pixels
    x_dense = geometry.stride == (1, 1) and (H, W) == (P, Q) and x.form.has_dense_pixels
    boxes = g_dense and x_dense and not padded and groups == 1
    meta = {
        **asked.config,
        "BLOCK_K": block_k,
        "BOXES": boxes and bool(asked.config.get("BOXES")),
        "R": R, "S": S, "UNIT": x.unit, "G_UNIT": g.unit,
        "FLAT": x.channels % block_n > 0, "PADDED": padded, "G_DENSE": g_dense, "X_DENSE": x_dense,
        "PRECISION": precision,
        "WIDE": launch.wide(g.form, x.form) or size * parts > launch.NARROW_LIMIT,
    }  # fmt: skip
    numbers = flat(
        pixels, divisor(x.channels // x.unit), g.channels // g.unit, H, W, divisor(P), divisor(Q),
        part_steps, size // x.unit, window(geometry), g.pixel, x.pixel,
    )  # fmt: skip
    block = (block_m, block_n, block_k) if meta["BOXES"] else None
    return _Plan(asked, g, x, rows.copied, parts, block, tiles * parts, numbers, meta)


def wgrad(grad: Tensor, input: Tensor, grad_weight: Tensor, geometry: Geometry) -> None:
    """Writes the gradient of the weight into `grad_weight`, which is dense; `grad` is that before the activation."""
    plan = _plan(
        form(grad), form(input), form(grad_weight), fixed(geometry), launch.precision(grad.dtype), grad.device,
        table.preferences(),
    )  # fmt: skip
    table.note(plan.asked)
    g, x = plan.g.of(grad), plan.x.of(input)
    if plan.boxes:
        block_m, block_n, block_k = plan.boxes
        g, x = plan.g.boxes(g, block_k, block_m), plan.x.boxes(x, block_k, block_n)
    (K, C, R, S), groups = grad_weight.shape, geometry.groups
    rows = grad_weight
    if plan.copied:
        rows = grad.new_empty((groups, plan.g.channels, R, S, plan.x.channels))
    sums = room_for_parts(rows, plan.parts)
    launch.launch(conv2d_wgrad, plan.programs, g, x, sums, *plan.numbers, **plan.meta)
    if plan.parts > 1:
        sum_parts(sums, plan.parts, rows)
    if plan.copied:  # zeros stay behind
        rows = rows[:, : K // groups, ..., :C].permute(0, 1, 4, 2, 3)
        grad_weight.unflatten(0, (groups, K // groups)).copy_(rows)

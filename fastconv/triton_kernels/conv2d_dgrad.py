"""The gradient of a 2-d convolution's input as a matrix product; letters and loop as in `conv2d_fprop`.

dx[m, c] = sum over (r, s, k)  dy[(pixel(m) - tap(r, s)) / stride, k] * w[k, (r, s, c)]
"""

from __future__ import annotations

import math
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.convolution import Geometry
from . import launch, table
from ._split import finish_parts, sums_form
from .device import dot, finish, grouped_tile, image_of, index, pixel_offset, quotient, within
from .operands import (
    Divisor,
    Filters,
    Form,
    Image,
    Pixel,
    Result,
    Window,
    divisor,
    filters,
    fixed,
    flat,
    form,
    image,
    padded_channels,
    result,
    window,
)


@triton.jit
def first_tap(phase, padding, STEP: tl.constexpr, inverse, divisor):
    """The least r with  phase + padding - r * dilation  a multiple of the stride; every STEP-th after it is one, too.

    STEP is stride / divisor, where divisor is the greatest common one of stride and dilation, and `inverse` that of
    dilation / divisor modulo STEP. Without a solution: a number no filter reaches.
    """
    shifted = phase + padding
    first = (shifted // divisor * inverse) % STEP
    return tl.where(shifted % divisor == 0, first, 1 << 20)


_NUMBERS = [
    *("pixels", "C", "K", "K_magic", "K_shift", "H", "W", "P", "Q", "columns_c", "parts", "part_steps", "part_size"),
    *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    *("phase_p", "phase_p_magic", "phase_p_shift", "phase_q", "phase_q_magic", "phase_q_shift"),
    *("g_n", "g_h", "g_w", "y_n", "y_h", "y_w", "y_channel", "inverse_h", "inverse_w", "divisor_h", "divisor_w"),
]


@triton.jit(do_not_specialize=_NUMBERS)
def conv2d_dgrad(
    g, w, y_ptr,
    pixels, C, K, K_magic, K_shift, H, W, P, Q, columns_c, parts, part_steps,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    phase_p, phase_p_magic, phase_p_shift, phase_q, phase_q_magic, phase_q_shift,
    g_n, g_h, g_w, y_n, y_h, y_w, y_channel, inverse_h, inverse_w, divisor_h, divisor_w, part_size,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr, W_UNIT: tl.constexpr, RESULT_UNIT: tl.constexpr,
    FLAT: tl.constexpr, PADDED: tl.constexpr, DENSE: tl.constexpr, PLANES: tl.constexpr, SPLIT: tl.constexpr,
    BOXES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M input pixels x BLOCK_N input channels of one group.

    A strided convolution's input pixels fall into STRIDE_H x STRIDE_W phases, by their row and column modulo the
    stride; the pixels of one phase meet the same taps of the filter. A tile belongs to one phase and runs over those
    taps only: no product with a zero between the strides. `pixels` are those of one phase, rounded up.

    Args:
        C: of a group, in units of the result (but for PLANES).
        K: output channels of a group, in units; a divisor.
        columns_c: the channels of a tap in a row of w, in units of W_UNIT: C and zeros.

    PADDED: a tap may lead outside of the output. DENSE: input pixel m meets output pixel m alone. BOXES, SPLIT: see
    `conv2d_fprop`.
    """
    K = Divisor(K, K_magic, K_shift)
    window = Window(stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w)
    g_pixel, y_pixel = Pixel(g_n, g_h, g_w), Pixel(y_n, y_h, y_w)
    phase_p = Divisor(phase_p, phase_p_magic, phase_p_shift)  # a phase's rows and columns
    phase_q = Divisor(phase_q, phase_q_magic, phase_q_shift)
    filters = K.value * UNIT
    channels = C if PLANES else C * RESULT_UNIT
    w_channels = columns_c * W_UNIT
    rows, columns = tl.cdiv(pixels, BLOCK_M), tl.cdiv(channels, BLOCK_N)
    tiles = rows * columns
    program = tl.program_id(0)
    part = program % parts if SPLIT else 0
    tile = program // parts if SPLIT else program
    group = index(tile // (tiles * STRIDE_H * STRIDE_W), WIDE)
    phase = tile // tiles % (STRIDE_H * STRIDE_W)
    row, column = grouped_tile(tile % tiles, rows, columns, GROUP)
    m = index(row, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = column * BLOCK_N + tl.arange(0, BLOCK_N)
    phase_h, phase_w = phase // STRIDE_W, phase % STRIDE_W
    n, i, j = image_of(tl.where(m < pixels, m, 0), phase_p, phase_q, WIDE)
    row_h, column_w = i * STRIDE_H + phase_h, j * STRIDE_W + phase_w
    r0 = first_tap(phase_h, window.padding_h, STEP_H, inverse_h, divisor_h)
    s0 = first_tap(phase_w, window.padding_w, STEP_W, inverse_w, divisor_w)
    # the output pixel of the first tap; each further one lies dilation / divisor before
    p0 = i + (phase_h + window.padding_h - r0 * window.dilation_h) // STRIDE_H
    q0 = j + (phase_w + window.padding_w - s0 * window.dilation_w) // STRIDE_W
    back_h, back_w = window.dilation_h // divisor_h, window.dilation_w // divisor_w
    if STRIDE_H * STRIDE_W == 1:
        taps_w: tl.constexpr = S
        taps: tl.constexpr = R * S
    else:
        taps_w = tl.maximum(tl.cdiv(S - s0, STEP_W), 0)
        taps = tl.maximum(tl.cdiv(R - r0, STEP_H), 0) * taps_w
    if DENSE:
        g_offset = tl.where(m < pixels, m, 0) * (g_pixel.w * UNIT)
    else:
        g_offset = (n * g_pixel.n + p0 * g_pixel.h + q0 * g_pixel.w) * UNIT
    back_row, back_column = index(g_pixel.h, WIDE) * back_h, index(g_pixel.w, WIDE) * back_w
    depth = index(R * S * w_channels, WIDE)
    lane = tl.arange(0, BLOCK_K)
    if not BOXES:
        g += group * filters
        w += group * filters * depth
    w_column = tl.where(c < w_channels, c, c % W_UNIT)
    w_column = tl.max_contiguous(tl.multiple_of(w_column, W_UNIT), W_UNIT)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(taps * filters, BLOCK_K) if FLAT else taps * (filters // BLOCK_K)
    first, last = 0, steps
    if SPLIT:
        first = part * part_steps
        last = tl.minimum(first + part_steps, steps)
    for step in range(first, last):
        if BOXES:
            a = g.load([row * BLOCK_M, step * BLOCK_K])
            b = w.load([step * BLOCK_K, column * BLOCK_N])
        elif FLAT:
            t = step * BLOCK_K + lane
            tap = quotient(t // UNIT, K, False) if R * S > 1 else t * 0
            u = tap // taps_w
            v = tap - u * taps_w
            k = t - tap * filters
            in_depth = t < taps * filters
            inside = tl.broadcast_to(in_depth[None, :], (BLOCK_M, BLOCK_K))
            if PADDED:
                inside = inside & within(p0[:, None] - (u * back_h)[None, :], P)
                inside = inside & within(q0[:, None] - (v * back_w)[None, :], Q)
            inside = tl.max_constancy(inside, (1, UNIT))
            g_tap = k - (u * back_row + v * back_column) * UNIT
            offset = tl.where(inside, g_offset[:, None] + g_tap[None, :], 0)
            a = tl.load(g + tl.max_contiguous(tl.multiple_of(offset, (1, UNIT)), (1, UNIT)), inside, 0.0)
            w_row = k * depth + ((r0 + u * STEP_H) * S + (s0 + v * STEP_W)) * w_channels
            w_row = tl.multiple_of(tl.where(in_depth, w_row, 0), W_UNIT)
            b = tl.load(w + (w_row[:, None] + w_column[None, :]), in_depth[:, None], 0.0)
        else:
            tap, k = step % taps, step // taps * BLOCK_K
            u = tap // taps_w
            v = tap - u * taps_w
            offset = g_offset + (k - (u * back_row + v * back_column) * UNIT)
            if PADDED:
                inside = within(p0 - u * back_h, P) & within(q0 - v * back_w, Q)
                offset = tl.where(inside, offset, 0)
                if not WIDE:  # as in conv2d_fprop
                    offset = offset.to(tl.uint32, bitcast=True).to(tl.int64)
                offset = tl.multiple_of(offset, UNIT)
                a = tl.load(g + lane[None, :] + offset[:, None], inside[:, None], 0.0)
            else:
                a = tl.load(g + lane[None, :] + offset[:, None])
            w_tap = k * depth + ((r0 + u * STEP_H) * S + (s0 + v * STEP_W)) * w_channels
            b = tl.load(w + w_tap + ((lane * depth)[:, None] + w_column[None, :]))
        sums = dot(a, b, sums, PRECISION)
    in_rows = m < pixels
    if STRIDE_H * STRIDE_W > 1:
        in_rows = in_rows & (row_h < H) & (column_w < W)
    in_columns = c < channels
    c += group * channels
    if SPLIT:
        y_ptr += index(part, WIDE) * (part_size * RESULT_UNIT)
    if SPLIT and STRIDE_H * STRIDE_W == 1:  # sums are dense
        y_offset = tl.where(in_rows, m, 0) * (y_pixel.w * RESULT_UNIT)
    else:
        y_offset = pixel_offset(n, row_h, column_w, y_pixel, W, RESULT_UNIT, PLANES)
    finish(sums, None, y_ptr, y_offset, in_rows, c, in_columns, y_channel, RESULT_UNIT, PLANES, "none")


def _inverse(value: int, modulus: int) -> int:
    return pow(value, -1, modulus) if modulus > 1 else 0


class _Plan(NamedTuple):
    """All of a launch but its tensors."""

    asked: table.Asked
    g: Image
    w: Filters
    y: Result
    parts: int
    boxes: tuple[int, int, int] | None  # the tile's rows, columns and terms
    programs: int
    numbers: tuple[Any, ...]
    meta: dict[str, Any]


@launch.planner
def _plan(
    grad: Form, weight: Form, grad_input: Form, geometry: Geometry, precision: str, device: torch.device,
    preferences: Any,
) -> _Plan:  # fmt: skip
    (stride, padding, dilation, groups), (_, _, P, Q) = geometry, grad.shape
    (_, C, R, S), (N, _, H, W) = weight.shape, grad_input.shape
    g, y = image(grad, groups), result(grad_input, groups)
    w_channels, w_unit = padded_channels(C, weight.dtype)
    w = filters(weight, w_channels, groups, g.channels)
    phase = [launch.cdiv(size, step) for size, step in zip((H, W), stride, strict=True)]
    pixels, phases, depth = N * phase[0] * phase[1], stride[0] * stride[1], R * S * g.channels
    vector = min(g.unit, w_unit) * grad.dtype.itemsize
    dtype_class = launch.dtype_class(grad.dtype, precision)
    asked = table.ask_for_convolution("conv2d_dgrad", dtype_class, (R, S), C, vector, device)
    block_m, block_n, block_k = table.block(asked.config, depth)
    tiles = launch.cdiv(pixels, block_m) * launch.cdiv(C, block_n) * groups * phases
    divisors = [gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    step = [s // d for s, d in zip(stride, divisors, strict=True)]
    taps = launch.cdiv(R, step[0]) * launch.cdiv(S, step[1])  # of the phase that has most
    part_steps, parts = launch.split(launch.cdiv(taps * g.channels, block_k), tiles, device, programs=1)
    target = y if parts == 1 else result(sums_form(parts, y.form), groups)
    padded = not (R == S == 1 and (H, W) == (P, Q) and not any(padding))
    dense = not padded and g.form.has_dense_pixels
    meta = {
        **asked.config,
        "BLOCK_K": block_k,
        "BOXES": dense and groups == 1 and bool(asked.config.get("BOXES")),
        "STRIDE_H": stride[0], "STRIDE_W": stride[1], "STEP_H": step[0], "STEP_W": step[1],
        "R": R, "S": S, "UNIT": g.unit, "W_UNIT": w_unit, "RESULT_UNIT": target.unit,
        "FLAT": g.channels % block_k > 0, "PADDED": padded, "DENSE": dense,
        "PLANES": target.planes, "SPLIT": parts > 1,
        "PRECISION": precision,
        "WIDE": launch.wide(g.form, weight, target.form),
    }  # fmt: skip
    numbers = flat(
        pixels, target.channels, divisor(g.channels // g.unit), H, W, P, Q, w_channels // w_unit, parts, part_steps,
        window(geometry), *(divisor(size) for size in phase), g.pixel, *target.strides,
        *(_inverse(d // f, s) for d, f, s in zip(dilation, divisors, step, strict=True)), *divisors,
        math.prod(target.form.shape) // parts // target.unit,
    )  # fmt: skip
    block = (block_m, block_n, block_k) if meta["BOXES"] else None
    return _Plan(asked, g, w, y, parts, block, tiles * parts, numbers, meta)


def dgrad(grad: Tensor, weight: Tensor, grad_input: Tensor, geometry: Geometry) -> None:
    """Writes the gradient of the input into `grad_input`; `grad` is that before the activation."""
    plan = _plan(
        form(grad), form(weight), form(grad_input), fixed(geometry), launch.precision(grad.dtype), grad.device,
        table.preferences(),
    )  # fmt: skip
    table.note(plan.asked)
    g, w, y = plan.g.of(grad), plan.w.of(weight), plan.y.of(grad_input)
    if plan.boxes:
        block_m, block_n, block_k = plan.boxes
        g, w = plan.g.boxes(g, block_m, block_k), plan.w.boxes(w, block_k, block_n)
    if plan.parts == 1:
        launch.launch(conv2d_dgrad, plan.programs, g, w, y, *plan.numbers, **plan.meta)
    else:
        N, C, H, W = grad_input.shape
        sums = grad.new_empty((plan.parts * N, H, W, C), dtype=torch.float32).permute(0, 3, 1, 2)
        launch.launch(conv2d_dgrad, plan.programs, g, w, sums, *plan.numbers, **plan.meta)
        finish_parts(sums, plan.y, None, None, y, "none")
    plan.y.written(y, grad_input)

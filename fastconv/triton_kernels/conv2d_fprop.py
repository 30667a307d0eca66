"""The forward of a 2-d convolution as a matrix product that is never written out.

Letters: N batch, C input channels, H W input pixels, K output channels, R S filter, P Q output pixels; C and K are
those of one group. A tile's pixels m are consecutive in [N, P, Q]:

    y[m, k] = sum over (r, s, c)  x[pixel(m) + tap(r, s), c] * w[k, (r, s, c)]

Sums are in float32. The reduction is one loop, which Triton's pipeliner likes best. Where BLOCK_K divides C a step
belongs to one tap, and the taps of one block of channels come before the next block: neighbouring taps meet the same
pixels in L2. Elsewhere (FLAT) the channels of all taps are one index, and every vector of a step belongs to a tap of
its own: a photograph's 3 channels, padded to 4, fill steps as well as 256 do.

No masked address lies outside of its tensor: asynchronous copies have been seen to read what their mask forbids
(pytorch #187222).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.convolution import FusedConvolution, Geometry
from . import launch, table
from ._split import finish_parts, sums_form
from .device import begin, dot, finish, grouped_tile, image_of, index, pixel_offset, quotient, within
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
    result,
    window,
)

_NUMBERS = [
    *("pixels", "C", "C_magic", "C_shift", "K", "H", "W", "parts", "part_steps", "part_size"),
    *("P", "P_magic", "P_shift", "Q", "Q_magic", "Q_shift"),
    *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    *("x_n", "x_h", "x_w", "y_n", "y_h", "y_w", "y_channel", "z_n", "z_h", "z_w", "z_channel"),
]


@triton.jit(do_not_specialize=_NUMBERS)
def conv2d_fprop(
    x, w, bias_ptr, z_ptr, y_ptr,
    pixels, C, C_magic, C_shift, K, H, W, P, P_magic, P_shift, Q, Q_magic, Q_shift, parts, part_steps,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    x_n, x_h, x_w, y_n, y_h, y_w, y_channel, z_n, z_h, z_w, z_channel, part_size,
    R: tl.constexpr, S: tl.constexpr, UNIT: tl.constexpr, RESULT_UNIT: tl.constexpr,
    FLAT: tl.constexpr, PADDED: tl.constexpr, DENSE: tl.constexpr, PLANES: tl.constexpr, SPLIT: tl.constexpr,
    BOXES: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """activation(conv2d(x, w) + bias + residual z), one tile of BLOCK_M pixels x BLOCK_N channels of one group.

    PADDED: a tap may lie outside of the image. DENSE: output pixel m reads input pixel m. BOXES: and x and w are
    descriptors, of which the TMA brings boxes. SPLIT: the tile's depth is split among `parts` programs, each of which
    takes `part_steps` and writes its sums, see `_split`. C and, but for PLANES, K are in units.
    """
    C, P, Q = Divisor(C, C_magic, C_shift), Divisor(P, P_magic, P_shift), Divisor(Q, Q_magic, Q_shift)
    window = Window(stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w)
    x_pixel, y_pixel, z_pixel = Pixel(x_n, x_h, x_w), Pixel(y_n, y_h, y_w), Pixel(z_n, z_h, z_w)
    channels = C.value * UNIT
    filters = K if PLANES else K * RESULT_UNIT
    rows, columns = tl.cdiv(pixels, BLOCK_M), tl.cdiv(filters, BLOCK_N)
    program = tl.program_id(0)
    part = program % parts if SPLIT else 0
    tile = program // parts if SPLIT else program
    group = index(tile // (rows * columns), WIDE)
    row, column = grouped_tile(tile % (rows * columns), rows, columns, GROUP)
    m = index(row, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = column * BLOCK_N + tl.arange(0, BLOCK_N)
    n, p, q = image_of(tl.where(m < pixels, m, 0), P, Q, WIDE)
    h0, w0 = p * window.stride_h - window.padding_h, q * window.stride_w - window.padding_w
    if DENSE:
        x_offset = tl.where(m < pixels, m, 0) * (x_pixel.w * UNIT)
    else:
        x_offset = (n * x_pixel.n + h0 * x_pixel.h + w0 * x_pixel.w) * UNIT
    depth = R * S * channels
    lane = tl.arange(0, BLOCK_K)
    if not BOXES:
        x += group * channels
        w += group * filters * depth
    w_row = tl.where(k < filters, k, 0) * depth
    row_h, column_w = window.dilation_h * index(x_pixel.h, WIDE), window.dilation_w * index(x_pixel.w, WIDE)
    in_rows, in_columns, y_column = m < pixels, k < filters, k + group * filters
    z_offset = pixel_offset(n, p, q, z_pixel, Q.value, RESULT_UNIT, PLANES)
    sums = begin(z_ptr, z_offset, in_rows, y_column, in_columns, z_channel, RESULT_UNIT, PLANES, BLOCK_M, BLOCK_N)
    steps = tl.cdiv(depth, BLOCK_K) if FLAT else R * S * (channels // BLOCK_K)
    first, last = 0, steps
    if SPLIT:
        first = part * part_steps
        last = tl.minimum(first + part_steps, steps)
    for step in range(first, last):
        if BOXES:
            a = x.load([row * BLOCK_M, step * BLOCK_K])
            b = w.load([column * BLOCK_N, step * BLOCK_K]).T
        elif FLAT:
            j = step * BLOCK_K + lane
            tap = quotient(j // UNIT, C, False) if R * S > 1 else j * 0
            r, s = tap // S, tap % S
            x_tap = (r * row_h + s * column_w) * UNIT + (j - tap * channels)
            in_depth = j < depth
            inside = tl.broadcast_to(in_depth[None, :], (BLOCK_M, BLOCK_K))
            if PADDED:
                h = h0[:, None] + (r * window.dilation_h)[None, :]
                v = w0[:, None] + (s * window.dilation_w)[None, :]
                inside = inside & within(h, H) & within(v, W)
            inside = tl.max_constancy(inside, (1, UNIT))
            offset = tl.where(inside, x_offset[:, None] + x_tap[None, :], 0)
            a = tl.load(x + tl.max_contiguous(tl.multiple_of(offset, (1, UNIT)), (1, UNIT)), inside, 0.0)
            w_column = tl.where(in_depth, j, j % UNIT)
            w_column = tl.max_contiguous(tl.multiple_of(w_column, UNIT), UNIT)
            b = tl.load(w + (w_column[:, None] + w_row[None, :]), in_depth[:, None], 0.0)
        else:
            tap, c = step % (R * S), step // (R * S) * BLOCK_K
            r, s = tap // S, tap % S
            x_tap = (r * row_h + s * column_w) * UNIT + c
            offset = x_offset + x_tap
            if PADDED:
                inside = within(h0 + r * window.dilation_h, H) & within(w0 + s * window.dilation_w, W)
                offset = tl.where(inside, offset, 0)
                if not WIDE:  # not negative: half the instructions for an address
                    offset = offset.to(tl.uint32, bitcast=True).to(tl.int64)
                offset = tl.multiple_of(offset, UNIT)
                a = tl.load(x + lane[None, :] + offset[:, None], inside[:, None], 0.0)
            else:
                a = tl.load(x + lane[None, :] + offset[:, None])
            b = tl.load(w + (tap * channels + c) + (lane[:, None] + w_row[None, :]))
        sums = dot(a, b, sums, PRECISION)
    if SPLIT:  # sums are dense
        y_ptr += index(part, WIDE) * (part_size * RESULT_UNIT)
        y_offset = tl.where(in_rows, m, 0) * (y_pixel.w * RESULT_UNIT)
    else:
        y_offset = pixel_offset(n, p, q, y_pixel, Q.value, RESULT_UNIT, PLANES)
    finish(
        sums, bias_ptr, y_ptr, y_offset, in_rows, y_column, in_columns, y_channel, RESULT_UNIT, PLANES, ACTIVATION
    )  # fmt: skip


class _Plan(NamedTuple):
    """All of a launch but its tensors."""

    asked: table.Asked
    x: Image
    w: Filters
    y: Result
    parts: int
    boxes: tuple[int, int, int] | None  # the tile's rows, columns and terms
    programs: int
    numbers: tuple[Any, ...]
    meta: dict[str, Any]


@launch.planner
def _plan(
    input: Form, weight: Form, residual: Form | None, output: Form, geometry: Geometry, activation: str,
    precision: str, device: torch.device, preferences: Any,
) -> _Plan:  # fmt: skip
    (N, K, P, Q), (_, _, R, S), (_, _, H, W), groups = output.shape, weight.shape, input.shape, geometry.groups
    x, y = image(input, groups), result(output, groups, residual)
    w = filters(weight, x.channels, groups)
    depth, pixels = R * S * x.channels, N * P * Q
    vector = x.unit * input.dtype.itemsize
    dtype_class = launch.dtype_class(input.dtype, precision)
    asked = table.ask_for_convolution("conv2d_fprop", dtype_class, (R, S), K // groups, vector, device)
    block_m, block_n, block_k = table.block(asked.config, depth)
    tiles = launch.cdiv(pixels, block_m) * launch.cdiv(K // groups, block_n) * groups
    part_steps, parts = launch.split(launch.cdiv(depth, block_k), tiles, device, programs=1)
    target = y if parts == 1 else result(sums_form(parts, y.form), groups)
    padded = any(geometry.padding)
    dense = R * S == 1 and (H, W) == (P, Q) and not padded and x.form.has_dense_pixels
    meta = {
        **asked.config,
        "BLOCK_K": block_k,
        "BOXES": dense and groups == 1 and bool(asked.config.get("BOXES")),
        "R": R, "S": S, "UNIT": x.unit, "RESULT_UNIT": target.unit,
        "FLAT": x.channels % block_k > 0, "PADDED": padded, "DENSE": dense,
        "PLANES": target.planes, "SPLIT": parts > 1,
        "ACTIVATION": activation if parts == 1 else "none",
        "PRECISION": precision,
        "WIDE": launch.wide(x.form, weight, target.form, y.residual),
    }  # fmt: skip
    numbers = flat(
        pixels, divisor(x.channels // x.unit), target.channels, H, W, divisor(P), divisor(Q), parts, part_steps,
        window(geometry), x.pixel, *target.strides, *target.residual_strides,
        math.prod(target.form.shape) // parts // target.unit,
    )  # fmt: skip
    block = (block_m, block_n, block_k) if meta["BOXES"] else None
    return _Plan(asked, x, w, y, parts, block, tiles * parts, numbers, meta)


def fprop(conv: FusedConvolution, output: Tensor) -> None:
    """Writes the convolution into `output`, which has any strides."""
    input, weight, bias, residual, geometry, activation = conv
    plan = _plan(
        form(input), form(weight), None if residual is None else form(residual), form(output), fixed(geometry),
        activation, launch.precision(input.dtype), input.device, table.preferences(),
    )  # fmt: skip
    table.note(plan.asked)
    x, w, y = plan.x.of(input), plan.w.of(weight), plan.y.of(output)
    residual = plan.y.residual_of(residual)
    if plan.boxes:
        block_m, block_n, block_k = plan.boxes
        x, w = plan.x.boxes(x, block_m, block_k), plan.w.boxes(w, block_n, block_k)
    if plan.parts == 1:
        launch.launch(conv2d_fprop, plan.programs, x, w, bias, residual, y, *plan.numbers, **plan.meta)
    else:
        N, K, P, Q = output.shape
        sums = input.new_empty((plan.parts * N, P, Q, K), dtype=torch.float32).permute(0, 3, 1, 2)
        launch.launch(conv2d_fprop, plan.programs, x, w, None, None, sums, *plan.numbers, **plan.meta)
        finish_parts(sums, plan.y, bias, residual, y, activation)
    plan.y.written(y, output)

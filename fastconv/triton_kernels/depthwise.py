"""Depthwise convolution: every channel has filters of its own, so there is no matrix product to make of it.

Letters: N batch, C input channels, H W input pixels, K output channels, R S filter, P Q output pixels; M = K / C is the
channel multiplier, output channel k reads channel k // M. Sums are in float32.

Images are laid along channels or along pixels, as what is written lies, see `_layouts`. How an input is loaded once for
all that it is good for, see `_patches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.convolution import FusedConvolution, Geometry
from . import launch, table
from ._layouts import channels_of, laid, lay, room, runs_along, size_of, strides_of, vector_of
from ._patches import (
    Grid,
    Window,
    add_row,
    advance,
    convolve,
    corner,
    dilation,
    filled,
    first_input,
    image,
    itself,
    lanes,
    last_input,
    load_row,
    outputs,
    place,
    store,
    tap,
    taps,
    windows,
)
from ._reduce import room_for_parts, sum_parts
from .device import index, narrow, widen
from .operands import VECTOR_BYTES, Divisor, Form, divisor, fixed, form

# Filters of up to so many taps are written out, in the gradient of the input those that one output meets. There a patch
# is whole periods of the strides, in which up to so many outputs differ.
MOST_TAPS = {"channels": 9, "pixels": 49}
_MOST_PERIODS = 16
# A lane's sums in the gradient of the weight, and the programs per processor that share its patches.
_MOST_SUMS = {"channels": 100, "pixels": 49}
_PROGRAMS = 3
# A lane's channels where each has several filters: no vector loads what these have in common, or what they read.
_MULTIPLIED_UNIT = 4

# What shapes and strides decide, none of which compiles another kernel. (Of a tuple's members Triton looks at each.)
NUMBERS = [
    *("count", "rows", "rows_magic", "rows_shift", "columns", "columns_magic", "columns_shift"),
    *("share", "share_magic", "share_shift", "part_steps", "C", "K", "H", "W", "P", "Q"),
    *(f"{image}_{stride}" for image in "gxyz" for stride in ("n", "h", "other")),
]


@triton.jit
def filter_of(w_ptr, k, K, TAPS: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr):
    """(pointers to the first taps of filters k, how far the next ones are), see `_filters`."""
    if PIXELS:
        found = (w_ptr + k * TAPS, 1)
    else:
        found = (w_ptr + k, K * UNIT)
    return found


@triton.jit(do_not_specialize=NUMBERS)
def depthwise_fprop(
    x_ptr, w_ptr, bias_ptr, z_ptr, y_ptr,
    count, rows, rows_magic, rows_shift, columns, columns_magic, columns_shift, share, share_magic, share_shift,
    K, H, W, P, Q, x_n, x_h, x_other, z_n, z_h, z_other, y_n, y_h, y_other,
    M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLLED: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = activation(depthwise(x, w) + bias + residual z), a patch for each lane."""
    grid = Grid(count, Divisor(rows, rows_magic, rows_shift), Divisor(columns, columns_magic, columns_shift))
    patches, k = lanes(grid, Divisor(share, share_magic, share_shift), K, UNIT, PIXELS, WIDE, BLOCK)
    x = image(x_ptr, x_n, x_h, x_other, H, W, UNIT, PIXELS, WIDE)
    z = image(y_ptr if z_ptr is None else z_ptr, z_n, z_h, z_other, P, Q, UNIT, PIXELS, WIDE)
    y = image(y_ptr, y_n, y_h, y_other, P, Q, UNIT, PIXELS, WIDE)
    start = tl.zeros(k.shape, tl.float32) if bias_ptr is None else widen(tl.load(bias_ptr + k))
    sums = filled(start, outputs(ROWS) * outputs(COLUMNS))
    w, w_tap = filter_of(w_ptr, k, K, taps(ROWS) * taps(COLUMNS), UNIT, PIXELS)
    sums = convolve(sums, x, k // M, patches, w, w_tap, None, ROWS, COLUMNS, UNROLLED, VECTOR)
    store(sums, z, y, k, patches, ROWS, COLUMNS, PIXELS, z_ptr is not None, ACTIVATION)


@triton.jit(do_not_specialize=NUMBERS)
def depthwise_dgrad(
    g_ptr, w_ptr, y_ptr,
    count, rows, rows_magic, rows_shift, columns, columns_magic, columns_shift, share, share_magic, share_shift,
    C, P, Q, H, W, g_n, g_h, g_other, y_n, y_h, y_other,
    M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLLED: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the input, a patch for each lane: over taps and the M filters."""
    grid = Grid(count, Divisor(rows, rows_magic, rows_shift), Divisor(columns, columns_magic, columns_shift))
    patches, c = lanes(grid, Divisor(share, share_magic, share_shift), C, UNIT, PIXELS, WIDE, BLOCK)
    g = image(g_ptr, g_n, g_h, g_other, P, Q, UNIT, PIXELS, WIDE)
    y = image(y_ptr, y_n, y_h, y_other, H, W, UNIT, PIXELS, WIDE)
    sums = filled(tl.zeros(c.shape, tl.float32), outputs(ROWS) * outputs(COLUMNS))
    for i in range(M):
        k = c * M + i
        w, w_tap = filter_of(w_ptr, k, C * M, taps(ROWS) * taps(COLUMNS), UNIT, PIXELS)
        sums = convolve(sums, g, k, patches, w, w_tap, None, ROWS, COLUMNS, UNROLLED, VECTOR)
    store(sums, y, y, c, patches, ROWS, COLUMNS, PIXELS, False, "none")


@triton.jit(do_not_specialize=NUMBERS)
def depthwise_wgrad(
    g_ptr, x_ptr, y_ptr,
    count, rows, rows_magic, rows_shift, columns, columns_magic, columns_shift,
    part_steps, K, P, Q, H, W, g_n, g_h, g_other, x_n, x_h, x_other,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of the weight at a window's taps, for BLOCK_N channels (PIXELS: one) and one part of the patches.

    Programs of other taps run side by side over the same patches and share them in L2. Parts are added by `sum_parts`.
    What lies outside of an image is 0, also beside what is not finite: there 0 * inf spoils a tap that is left out
    elsewhere.
    """
    grid = Grid(count, Divisor(rows, rows_magic, rows_shift), Divisor(columns, columns_magic, columns_shift))
    g = image(g_ptr, g_n, g_h, g_other, P, Q, UNIT, PIXELS, WIDE)
    x = image(x_ptr, x_n, x_h, x_other, H, W, UNIT, PIXELS, WIDE)
    filters = K if PIXELS else K * UNIT
    strips = tl.cdiv(filters, BLOCK_N)
    window = tl.program_id(0) % (windows(R, ROWS) * windows(S, COLUMNS))
    program = tl.program_id(0) // (windows(R, ROWS) * windows(S, COLUMNS))
    r0, s0 = window // windows(S, COLUMNS) * taps(ROWS), window % windows(S, COLUMNS) * taps(COLUMNS)
    part = program // strips
    lane = tl.arange(0, BLOCK_M)
    if PIXELS:
        filter = program % strips
        k = filter
        start = tl.zeros((BLOCK_M,), tl.float32)
    else:
        filter = program % strips * BLOCK_N + tl.arange(0, BLOCK_N)
        k = filter[None, :]
        lane = lane[:, None]
        start = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = filled(start, taps(ROWS) * taps(COLUMNS))
    first = part * part_steps
    for step in range(first, tl.minimum(first + part_steps, tl.cdiv(count, BLOCK_M))):
        m = index(step, WIDE) * BLOCK_M + lane
        n, row, column, wanted = place(m, grid, (m < count) & (k < filters), PIXELS, WIDE)
        p, q = row * outputs(ROWS), column * outputs(COLUMNS)
        grads = ()
        for o in tl.static_range(outputs(ROWS)):
            grads = grads + load_row(g, corner(g, n, k, p + o, q), p + o, q, wanted, itself(COLUMNS), VECTOR)
        h, w = row * advance(ROWS) + r0 * dilation(ROWS), column * advance(COLUMNS) + s0 * dilation(COLUMNS)
        for i in tl.static_range(first_input(ROWS), last_input(ROWS) + 1):
            inputs = load_row(x, corner(x, n, k // M, h + i, w), h + i, w, wanted, COLUMNS, VECTOR)
            for o in tl.static_range(outputs(ROWS)):
                if tap(ROWS, i, o) >= 0:
                    of_row = grads[o * outputs(COLUMNS) : (o + 1) * outputs(COLUMNS)]
                    sums = add_row(sums, inputs, of_row, tap(ROWS, i, o) * taps(COLUMNS), COLUMNS, VECTOR, True)
    y_ptr += index(part, WIDE) * filters * (R * S)
    for t in tl.static_range(taps(ROWS) * taps(COLUMNS)):
        r, s = r0 + t // taps(COLUMNS), s0 + t % taps(COLUMNS)
        total = narrow(tl.sum(sums[t], 0), y_ptr.dtype.element_ty)
        tl.store(y_ptr + (filter * (R * S) + r * S + s), total, filter < tl.where(s < S, filters, 0))


# --------------------------------------------------------------------------------------------- launchers


def by_taps(weight: Tensor) -> Tensor:
    """[K, 1, R, S] as float32 [R, S, K]: a vector of channels loads a tap's weights as one.

    As they come they lie R * S apart: a load for each channel and tap.
    """
    K, _, R, S = weight.shape
    return torch.empty((R, S, K), dtype=torch.float32, device=weight.device).copy_(weight.squeeze(1).permute(1, 2, 0))


def _filters(weight: Tensor, along: str) -> Tensor:
    return by_taps(weight) if along == "channels" else weight.contiguous()


def _unit(along: str, M: int, *images: Form) -> int:
    unit = vector_of(along, *images)
    return unit if M == 1 or along == "pixels" else min(unit, _MULTIPLIED_UNIT)


class _Plan(NamedTuple):
    """Of a launch; `along` is how its images are laid."""

    asked: table.Asked
    along: str
    programs: int
    numbers: tuple[int, ...]
    meta: dict[str, Any]


def _share(vectors: int, bytes: int, lanes: int) -> int:
    """How many of a pixel's vectors a program takes: 64 to 256 bytes, as many as leave the fewest lanes idle."""
    least, most = (min(vectors, lanes, max(1, size // bytes)) for size in (64, 256))
    return max(
        range(least, most + 1), key=lambda share: (vectors / launch.cdiv(vectors, share) * (lanes // share), share)
    )


def _lane_plan(asked: table.Asked, along: str, images: list[Form], rows: Window, columns: Window, **meta: Any) -> _Plan:
    """Of a launch with a patch of the last image for each lane; the first one is the input."""
    (N, K, P, Q), lanes = images[-1].shape, asked.config["BLOCK"]
    unit = _unit(along, meta["M"], *images)
    grid = launch.cdiv(P, rows.outputs), launch.cdiv(Q, columns.outputs)
    if along == "pixels":
        count, share = N * K * grid[0] * grid[1], K
        programs = launch.cdiv(count, lanes)
    else:
        count, share = N * grid[0] * grid[1], _share(K // unit, unit * images[0].dtype.itemsize, lanes)
        programs = launch.cdiv(K // unit, share) * launch.cdiv(count, lanes // share)
    numbers = (
        count, *divisor(grid[0]), *divisor(grid[1]), *divisor(share), channels_of(images[-1], along, unit),
        *size_of(images[0], along, unit), *size_of(images[-1], along, unit),
        *(stride for each in images for stride in strides_of(each, along, unit)),
    )  # fmt: skip
    meta = {
        **meta, "ROWS": rows, "COLUMNS": columns, "UNIT": unit, "PIXELS": along == "pixels",
        "VECTOR": min(unit, columns.outputs * columns.step // columns.divisor) if along == "pixels" else 1,
        "WIDE": launch.wide(*images), "BLOCK": lanes,
        "num_warps": asked.config["num_warps"], "num_stages": asked.config["num_stages"],
    }  # fmt: skip
    return _Plan(asked, along, programs, numbers, meta)


def _patch(
    config: table.Config, along: str, dtype: torch.dtype, stride: Sequence[int], unrolled: bool, periods: bool = False
) -> tuple[int, int]:
    """Rows and columns: of about as many inputs, or of outputs in whole periods of the strides, as the entry says.

    Along pixels a row is a vector.
    """
    sizes = (config["BLOCK_H"], config["BLOCK_W"]) if unrolled else (1, config["BLOCK_H"] * config["BLOCK_W"])
    rows, columns = (max(size // step, 1) * (step if periods else 1) for size, step in zip(sizes, stride, strict=True))
    if along == "pixels":
        columns = max(min(config["BLOCK_W"], VECTOR_BYTES // dtype.itemsize), stride[1] if periods else 1)
    return rows if unrolled else 1, columns


@launch.planner
def _plan_fprop(
    x: Form, weight: Form, z: Form | None, y: Form, geometry: Geometry, activation: str, preferences: Any
) -> _Plan:
    (stride, padding, dilation, _), (K, _, R, S) = geometry, weight.shape
    along = runs_along(y)
    asked = table.ask("depthwise_fprop", along)
    unrolled = MOST_TAPS[along] >= R * S
    rows, columns = _patch(asked.config, along, x.dtype, stride, unrolled)
    return _lane_plan(
        asked,
        along,
        [laid(each, along) for each in (x, y if z is None else z, y)],
        Window(rows, R, stride[0], dilation[0], -padding[0], 1),
        Window(columns, S, stride[1], dilation[1], -padding[1], 1),
        M=K // x.shape[1],
        UNROLLED=unrolled,
        ACTIVATION=activation,
    )


def fprop(conv: FusedConvolution, output: Tensor) -> None:
    """Writes the depthwise convolution into `output`, which has any strides."""
    input, weight, bias, residual, geometry, activation = conv
    plan = _plan_fprop(
        form(input), form(weight), None if residual is None else form(residual), form(output), fixed(geometry),
        activation, table.preferences(),
    )  # fmt: skip
    table.note(plan.asked)
    x, w, y = lay(input, plan.along), _filters(weight, plan.along), room(output, plan.along)
    z = None if residual is None else lay(residual, plan.along)
    launch.launch(depthwise_fprop, plan.programs, x, w, bias, z, y, *plan.numbers, **plan.meta)
    if y is not output:
        output.copy_(y)


@launch.planner
def _plan_dgrad(g: Form, weight: Form, y: Form, geometry: Geometry, preferences: Any) -> _Plan:
    (stride, padding, dilation, _), (K, _, R, S) = geometry, weight.shape
    # a row of whole periods is no vector, where a stride is not 1, 2, 4 or 8
    along = "channels" if VECTOR_BYTES // g.dtype.itemsize % stride[1] else runs_along(y)
    asked = table.ask("depthwise_dgrad", along)
    periods = stride[0] * stride[1]
    unrolled = MOST_TAPS[along] * periods >= R * S and periods <= _MOST_PERIODS
    rows, columns = _patch(asked.config, along, g.dtype, stride, unrolled, periods=True)
    return _lane_plan(
        asked,
        along,
        [laid(each, along) for each in (g, y)],
        Window(rows, R, 1, -dilation[0], padding[0], stride[0]),
        Window(columns, S, 1, -dilation[1], padding[1], stride[1]),
        M=K // y.shape[1],
        UNROLLED=unrolled,
    )


def dgrad(grad: Tensor, weight: Tensor, grad_input: Tensor, geometry: Geometry) -> None:
    """Writes the gradient of the input into `grad_input`; `grad` is that before the activation."""
    plan = _plan_dgrad(form(grad), form(weight), form(grad_input), fixed(geometry), table.preferences())
    table.note(plan.asked)
    g, w, y = lay(grad, plan.along), _filters(weight, plan.along), room(grad_input, plan.along)
    launch.launch(depthwise_dgrad, plan.programs, g, w, y, *plan.numbers, **plan.meta)
    if y is not grad_input:
        grad_input.copy_(y)


@launch.planner
def _plan_wgrad(
    g: Form, x: Form, weight: Form, geometry: Geometry, device: torch.device, preferences: Any
) -> tuple[_Plan, int]:
    """And the number of parts."""
    (stride, padding, dilation, _), (N, K, P, Q), (_, _, R, S) = geometry, g.shape, weight.shape
    along = runs_along(g)
    g, x = laid(g, along), laid(x, along)
    asked = table.ask("depthwise_wgrad", along)
    rows, columns = _patch(asked.config, along, g.dtype, stride, unrolled=True)
    M = K // x.shape[1]
    unit, lanes, filters, most = _unit(along, M, g, x), asked.config["BLOCK"], 1, _MOST_SUMS[along]
    if along == "channels":
        filters = min(asked.config["BLOCK_N"], triton.next_power_of_2(K))
        while filters > 32 and K % filters:
            filters //= 2
        lanes, most = max(lanes * unit // filters, 1), most // unit
    taps_h, taps_w = (R, S) if most >= R * S else (1, S)
    if along == "channels":
        taps_w = launch.cdiv(S, launch.cdiv(S, most))
    grid = launch.cdiv(P, rows), launch.cdiv(Q, columns)
    count = N * grid[0] * grid[1]
    tiles = launch.cdiv(R, taps_h) * launch.cdiv(S, taps_w) * launch.cdiv(K, filters)
    part_steps, parts = launch.split(launch.cdiv(count, lanes), tiles, device, programs=_PROGRAMS)
    numbers = (
        count, *divisor(grid[0]), *divisor(grid[1]), part_steps, channels_of(g, along, unit),
        *size_of(g, along, unit), *size_of(x, along, unit),
        *strides_of(g, along, unit), *strides_of(x, along, unit),
    )  # fmt: skip
    meta = {
        "M": M, "R": R, "S": S,
        "ROWS": Window(rows, taps_h, stride[0], dilation[0], -padding[0], 1),
        "COLUMNS": Window(columns, taps_w, stride[1], dilation[1], -padding[1], 1),
        "UNIT": unit, "PIXELS": along == "pixels", "VECTOR": unit if along == "pixels" else 1,
        "WIDE": launch.wide(g, x), "BLOCK_M": lanes, "BLOCK_N": filters,
        "num_warps": asked.config["num_warps"], "num_stages": asked.config["num_stages"],
    }  # fmt: skip
    return _Plan(asked, along, tiles * parts, numbers, meta), parts


def wgrad(grad: Tensor, input: Tensor, grad_weight: Tensor, geometry: Geometry) -> None:
    """Writes the gradient of the weight into `grad_weight`, which is dense; `grad` is that before the activation."""
    plan, parts = _plan_wgrad(
        form(grad), form(input), form(grad_weight), fixed(geometry), grad.device, table.preferences()
    )
    table.note(plan.asked)
    g, x, sums = lay(grad, plan.along), lay(input, plan.along), room_for_parts(grad_weight, parts)
    launch.launch(depthwise_wgrad, plan.programs, g, x, sums, *plan.numbers, **plan.meta)
    if parts > 1:
        sum_parts(sums, parts, grad_weight)

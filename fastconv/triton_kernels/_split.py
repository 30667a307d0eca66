"""A small grid's reduction, split among programs: each writes float32 sums of a part, and one kernel adds them.

In the order of the parts, hence the same bits every time, where atomics would give others; what follows the
convolution, bias, residual and activation, comes after the sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, table
from .device import begin, finish, image_of, index, pixel_offset
from .operands import Divisor, Form, Pixel, Result, channels_last, divisor, flat, form, unit_of


def sums_form(parts: int, like: Form) -> Form:
    """Of the parts' sums, [parts * N, K, P, Q]."""
    N, *rest = like.shape
    return channels_last((parts * N, *rest), torch.float32)


_NUMBERS = [
    *("pixels", "K", "P", "P_magic", "P_shift", "Q", "Q_magic", "Q_shift", "parts"),
    *("y_n", "y_h", "y_w", "y_channel", "z_n", "z_h", "z_w", "z_channel"),
]


@triton.jit(do_not_specialize=_NUMBERS)
def finish_parts_kernel(
    sums_ptr, bias_ptr, z_ptr, y_ptr,
    pixels, K, P, P_magic, P_shift, Q, Q_magic, Q_shift, parts,  # K in units of the sums
    y_n, y_h, y_w, y_channel, z_n, z_h, z_w, z_channel,
    UNIT: tl.constexpr, RESULT_UNIT: tl.constexpr, PLANES: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = activation(sum over parts of sums[part] + bias + residual z), BLOCK_M pixels x BLOCK_N channels."""
    P, Q = Divisor(P, P_magic, P_shift), Divisor(Q, Q_magic, Q_shift)
    y_pixel, z_pixel = Pixel(y_n, y_h, y_w), Pixel(z_n, z_h, z_w)
    filters = K * UNIT
    columns = tl.cdiv(filters, BLOCK_N)
    m = index(tl.program_id(0) // columns, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = m < pixels, k < filters
    n, p, q = image_of(tl.where(in_rows, m, 0), P, Q, WIDE)
    z_offset = pixel_offset(n, p, q, z_pixel, Q.value, RESULT_UNIT, PLANES)
    total = begin(z_ptr, z_offset, in_rows, k, in_columns, z_channel, RESULT_UNIT, PLANES, BLOCK_M, BLOCK_N)
    offset = (m * filters)[:, None] + k[None, :]
    for _part in range(parts):
        total += tl.load(sums_ptr + offset, in_rows[:, None] & in_columns[None, :], 0.0)
        sums_ptr += index(pixels, WIDE) * filters
    y_offset = pixel_offset(n, p, q, y_pixel, Q.value, RESULT_UNIT, PLANES)
    finish(total, bias_ptr, y_ptr, y_offset, in_rows, k, in_columns, y_channel, RESULT_UNIT, PLANES, ACTIVATION)


class _Plan(NamedTuple):
    asked: table.Asked
    programs: int
    numbers: tuple[Any, ...]
    meta: dict[str, Any]


@launch.planner
def _plan(sums: Form, y: Result, activation: str, preferences: Any) -> _Plan:
    N, K, P, Q = y.form.shape
    unit = unit_of(sums.dtype, K)
    asked = table.ask("finish_parts", "pixels" if y.planes else "channels")
    programs = launch.cdiv(N * P * Q, asked.config["BLOCK_M"]) * launch.cdiv(K, asked.config["BLOCK_N"])
    numbers = flat(N * P * Q, K // unit, divisor(P), divisor(Q), sums.shape[0] // N, *y.strides, *y.residual_strides)
    wide = launch.wide(sums, y.form, y.residual)
    meta = {"UNIT": unit, "RESULT_UNIT": y.unit, "PLANES": y.planes, "ACTIVATION": activation, "WIDE": wide}
    return _Plan(asked, programs, numbers, {**meta, **asked.config})


def finish_parts(
    sums: Tensor, y: Result, bias: Tensor | None, residual: Tensor | None, output: Tensor, activation: str
) -> None:
    """Writes what the convolution's epilogue makes of the parts in `sums`; `y` is of `residual` and `output`."""
    plan = _plan(form(sums), y, activation, table.preferences())
    table.note(plan.asked)
    launch.launch(finish_parts_kernel, plan.programs, sums, bias, residual, output, *plan.numbers, **plan.meta)

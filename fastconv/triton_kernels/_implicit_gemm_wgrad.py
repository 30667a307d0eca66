"""The gradient of a 2-d convolution's weight as a matrix product; letters and layouts as in `_implicit_gemm`.

wgrad   dw[k, (r, s, c)] = sum over pixels m  dy[m, k] * x[pixel(m) + tap(r, s), c]
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..operators.convolution import Geometry
from . import launch, table
from ._device import dot, index, narrow, pixel
from ._implicit_gemm import is_stem
from ._reduce import room_for_parts, sum_parts


@triton.jit(do_not_specialize=["pixels", "part_steps", "part_size"])
def conv2d_wgrad(
    g_ptr, x_ptr, y_ptr,
    pixels, part_steps, part_size, C, H, W, K, P, Q,
    g_n, g_k, g_p, g_q,
    x_n, x_c, x_h, x_w,
    y_k, y_c, y_r, y_s,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr,
    STEM: tl.constexpr,  # as in conv2d_fprop
    PADDED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the weight, one tile of BLOCK_M output channels x BLOCK_N input channels of one tap and group.

    Pixels are split into parts of `part_steps` blocks of BLOCK_K. Part i writes its sum at y_ptr + i * part_size, and
    `sum_parts` adds the parts in a fixed order: the same bits every time, where atomics would give others.
    """
    rows = tl.cdiv(K, BLOCK_M)
    if STEM:
        columns = tl.cdiv(R * S * STEM, BLOCK_N)
    else:
        blocks = tl.cdiv(C, BLOCK_N)
        columns = R * S * blocks
    # neighbouring programs work on the same pixels, which they find in L2
    program = tl.program_id(0)
    column, row = program % columns, program // columns % rows
    parts = tl.cdiv(tl.cdiv(pixels, BLOCK_K), part_steps)
    part = program // (columns * rows) % parts
    group = index(program // (columns * rows * parts), WIDE)
    k = index(row, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    if STEM:
        j = index(column, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
        tap, c = j // STEM, j % STEM
        in_columns = j < R * S * STEM
    else:
        tap = index(column // blocks, WIDE)
        c = index(column % blocks, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_columns = c < C
    r, s = tap // S, tap % S
    x_ptr += group * C * x_c
    g_ptr += group * K * g_k
    x_column = r * dilation_h * x_h + s * dilation_w * x_w + c * x_c
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = index(part, WIDE) * part_steps
    for step in range(first, tl.minimum(first + part_steps, tl.cdiv(pixels, BLOCK_K))):
        m = index(step, WIDE) * BLOCK_K + tl.arange(0, BLOCK_K)
        n, p, q = pixel(m, P, Q)
        h0, w0 = p * stride_h - padding_h, q * stride_w - padding_w
        g_pixel = n * g_n + p * g_p + q * g_q
        a = tl.load(g_ptr + (k * g_k)[:, None] + g_pixel[None, :], (k < K)[:, None] & (m < pixels)[None, :], 0.0)
        x_pixel = n * x_n + h0 * x_h + w0 * x_w
        inside = (m < pixels)[:, None] & in_columns[None, :]
        if PADDED:
            if STEM:
                h = h0[:, None] + (r * dilation_h)[None, :]
                w = w0[:, None] + (s * dilation_w)[None, :]
                inside = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            else:
                h, w = h0 + r * dilation_h, w0 + s * dilation_w
                inside = inside & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        b = tl.load(x_ptr + x_pixel[:, None] + x_column[None, :], inside, 0.0)
        sums = dot(a, b, sums, PRECISION)
    y_ptr += index(part, WIDE) * part_size
    y_row = (group * K + k) * y_k
    y_column = c * y_c + r * y_r + s * y_s
    result = narrow(sums, y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_row[:, None] + y_column[None, :], result, (k < K)[:, None] & in_columns[None, :])


def wgrad(grad: Tensor, input: Tensor, grad_weight: Tensor, geometry: Geometry) -> None:
    """Writes the gradient of the weight into `grad_weight`, which is dense; `grad` is that before the activation."""
    (stride, padding, dilation, groups), (N, _, P, Q) = geometry, grad.shape
    (K, C, R, S), (_, _, H, W) = grad_weight.shape, input.shape
    stem = is_stem(grad_weight)
    classes = (launch.dtype_class(grad), "ragged" if stem else "dense", launch.width_class(K // groups))
    config = table.config("conv2d_wgrad", *classes, filter=(R, S))
    steps = triton.cdiv(N * P * Q, config["BLOCK_K"])
    columns = triton.cdiv(R * S * C, config["BLOCK_N"]) if stem else R * S * triton.cdiv(C, config["BLOCK_N"])
    tiles = triton.cdiv(K // groups, config["BLOCK_M"]) * columns * groups
    part_steps, parts = launch.split(steps, tiles, grad.device)
    sums = room_for_parts(grad_weight, parts)
    launch.launch(
        conv2d_wgrad,
        tiles * parts,
        grad, input, sums,
        N * P * Q, part_steps, grad_weight.numel(), C, H, W, K // groups, P, Q,
        *grad.stride(), *input.stride(), *grad_weight.stride(),
        *stride, *padding, *dilation,
        R=R, S=S,
        STEM=C if stem else 0,
        PADDED=any(padding),
        PRECISION=launch.precision(),
        WIDE=launch.wide(grad, input, grad_weight) or sums.numel() > launch.NARROW_LIMIT,
        **config,
    )  # fmt: skip
    if parts > 1:
        sum_parts(sums, parts, grad_weight)

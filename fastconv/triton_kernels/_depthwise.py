"""Depthwise convolution: every channel has filters of its own, so there is no matrix product to make of it.

Letters as in `_implicit_gemm`; M is the channel multiplier, output channel k reads channel k // M. A program owns a
tile of pixels x channels and adds one tap after the other in float32; neighbouring taps find their pixels in L1. Bound
by memory: tiles are long in the direction in which the tensors lie.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..operators.convolution import FusedConvolution, Geometry
from . import launch, table
from ._device import activate, index, narrow, pixel, widen
from ._reduce import room_for_parts, sum_parts

# Up to this many taps (5x5) the loop over them is written out, which lets their loads overlap.
UNROLLED_TAPS = 25


@triton.jit
def add_tap(
    sums, x_ptr, x_pixel, w_ptr, h0, w0, inside, in_channels, r, s,
    H, W, x_h, x_w, w_r, w_s, dilation_h, dilation_w, PADDED: tl.constexpr,
):  # fmt: skip
    """sums + x * w at tap (r, s), for a tile of pixels (rows) and channels (columns)."""
    if PADDED:
        h, w = h0 + r * dilation_h, w0 + s * dilation_w
        inside = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x_tap = r * dilation_h * x_h + s * dilation_w * x_w
    x = widen(tl.load(x_ptr + x_tap + x_pixel, inside[:, None] & in_channels[None, :], 0.0))
    weight = widen(tl.load(w_ptr + (r * w_r + s * w_s), in_channels, 0.0))
    return sums + x * weight[None, :]


@triton.jit
def depthwise_tile(
    x_ptr, w_ptr, m, k, pixels, K, H, W, P, Q,
    x_n, x_c, x_h, x_w, w_k, w_r, w_s,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, UNROLL: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The convolution's float32 sums at output pixels m and channels k."""
    n, p, q = pixel(m, P, Q)
    h0, w0 = p * stride_h - padding_h, q * stride_w - padding_w
    x_pixel = (n * x_n + h0 * x_h + w0 * x_w)[:, None] + (k // M * x_c)[None, :]
    w_ptr += k * w_k
    inside, in_channels = m < pixels, k < K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if UNROLL:
        for r in tl.static_range(R):
            for s in tl.static_range(S):
                sums = add_tap(sums, x_ptr, x_pixel, w_ptr, h0, w0, inside, in_channels, index(r, WIDE),
                               index(s, WIDE), H, W, x_h, x_w, w_r, w_s, dilation_h, dilation_w, PADDED)  # fmt: skip
    else:
        for tap in range(R * S):
            sums = add_tap(sums, x_ptr, x_pixel, w_ptr, h0, w0, inside, in_channels, index(tap // S, WIDE),
                           index(tap % S, WIDE), H, W, x_h, x_w, w_r, w_s, dilation_h, dilation_w, PADDED)  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["pixels"])
def depthwise_fprop(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr,
    pixels, K, H, W, P, Q,
    x_n, x_c, x_h, x_w,
    w_k, w_c, w_r, w_s,
    z_n, z_k, z_p, z_q,
    y_n, y_k, y_p, y_q,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, UNROLL: tl.constexpr,
    PADDED: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """activation(depthwise(x, w) + bias + residual), one tile of BLOCK_M pixels x BLOCK_N channels."""
    columns = tl.cdiv(K, BLOCK_N)
    m = index(tl.program_id(0) // columns, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = index(tl.program_id(0) % columns, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = depthwise_tile(
        x_ptr, w_ptr, m, k, pixels, K, H, W, P, Q, x_n, x_c, x_h, x_w, w_k, w_r, w_s,
        stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        M, R, S, UNROLL, PADDED, WIDE, BLOCK_M, BLOCK_N
    )  # fmt: skip
    wanted = (m < pixels)[:, None] & (k < K)[None, :]
    n, p, q = pixel(m, P, Q)
    if bias_ptr is not None:
        sums += widen(tl.load(bias_ptr + k, k < K, 0.0))[None, :]
    if residual_ptr is not None:
        z_pixel = n * z_n + p * z_p + q * z_q
        sums += widen(tl.load(residual_ptr + z_pixel[:, None] + (k * z_k)[None, :], wanted, 0.0))
    y_pixel = n * y_n + p * y_p + q * y_q
    result = narrow(activate(sums, ACTIVATION), y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_pixel[:, None] + (k * y_k)[None, :], result, wanted)


@triton.jit(do_not_specialize=["pixels"])
def depthwise_dgrad(
    g_ptr, w_ptr, y_ptr,
    pixels, C, H, W, P, Q,
    g_n, g_k, g_p, g_q,
    w_k, w_c, w_r, w_s,
    y_n, y_c, y_h, y_w,
    padding_h, padding_w, dilation_h, dilation_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of the input, one tile of BLOCK_M input pixels x BLOCK_N channels: over taps and the M filters."""
    columns = tl.cdiv(C, BLOCK_N)
    m = index(tl.program_id(0) // columns, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = index(tl.program_id(0) % columns, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, h, w = pixel(m, H, W)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(R * S * M):
        k = c * M + tap % M
        r, s = tap // M // S, tap // M % S
        # what lies before the first output pixel is negative, and cut off before the division is asked about
        p, q = h + padding_h - r * dilation_h, w + padding_w - s * dilation_w
        inside = (m < pixels) & (p >= 0) & (q >= 0)
        if STRIDE_H > 1:
            inside = inside & (p % STRIDE_H == 0)
            p = p // STRIDE_H
        if STRIDE_W > 1:
            inside = inside & (q % STRIDE_W == 0)
            q = q // STRIDE_W
        inside = inside & (p < P) & (q < Q)
        g_offset = (n * g_n + p * g_p + q * g_q)[:, None] + (k * g_k)[None, :]
        grad = widen(tl.load(g_ptr + g_offset, inside[:, None] & (c < C)[None, :], 0.0))
        weight = widen(tl.load(w_ptr + k * w_k + (index(r, WIDE) * w_r + index(s, WIDE) * w_s), c < C, 0.0))
        sums += grad * weight[None, :]
    y_offset = (n * y_n + h * y_h + w * y_w)[:, None] + (c * y_c)[None, :]
    tl.store(y_ptr + y_offset, narrow(sums, y_ptr.dtype.element_ty), (m < pixels)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["pixels", "part_steps", "part_size"])
def depthwise_wgrad(
    g_ptr, x_ptr, y_ptr,
    pixels, part_steps, part_size, K, H, W, P, Q,
    g_n, g_k, g_p, g_q,
    x_n, x_c, x_h, x_w,
    y_k, y_c, y_r, y_s,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of the weight at one tap, for BLOCK_N channels and one part of the pixels.

    The programs of neighbouring taps run side by side over the same pixels and share them in L2; sums of parts as in
    `conv2d_wgrad`.
    """
    columns, program = tl.cdiv(K, BLOCK_N), tl.program_id(0)
    tap, column = index(program % (R * S), WIDE), program // (R * S) % columns
    part = index(program // (R * S * columns), WIDE)
    r, s = tap // S, tap % S
    k = index(column, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_column = r * dilation_h * x_h + s * dilation_w * x_w + k // M * x_c
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * part_steps
    for step in range(first, tl.minimum(first + part_steps, tl.cdiv(pixels, BLOCK_M))):
        m = index(step, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
        n, p, q = pixel(m, P, Q)
        h0, w0 = p * stride_h - padding_h, q * stride_w - padding_w
        inside = m < pixels
        if PADDED:
            h, w = h0 + r * dilation_h, w0 + s * dilation_w
            inside = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        both = inside[:, None] & (k < K)[None, :]
        g_offset = (n * g_n + p * g_p + q * g_q)[:, None] + (k * g_k)[None, :]
        x_offset = (n * x_n + h0 * x_h + w0 * x_w)[:, None] + x_column[None, :]
        grad = widen(tl.load(g_ptr + g_offset, both, 0.0))
        sums += grad * widen(tl.load(x_ptr + x_offset, both, 0.0))
    result = narrow(tl.sum(sums, 0), y_ptr.dtype.element_ty)
    tl.store(y_ptr + part * part_size + k * y_k + r * y_r + s * y_s, result, k < K)


# ---------------------------------------------------------------------------------------- launchers


def runs_along(tensor: Tensor) -> str:
    """The part of a table's key that a memory-bound kernel's layout decides."""
    return "pixels" if tensor.stride(3) == 1 and tensor.stride(1) != 1 else "channels"


def by_taps(weight: Tensor) -> Tensor:
    """The same [K, 1, R, S] in memory as [R, S, K]: a tile along channels loads a tap's weights as vectors.

    As they come they lie R * S apart. Those loads, one for each channel and tap, are most of a tile's instructions,
    and their addresses most of its registers.
    """
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def fprop(conv: FusedConvolution, output: Tensor) -> None:
    """Writes the depthwise convolution into `output`, which has any strides."""
    input, weight, bias, residual, geometry, activation = conv
    (stride, padding, dilation, _), (N, _, P, Q) = geometry, output.shape
    (K, _, R, S), (_, C, H, W) = weight.shape, input.shape
    along = runs_along(input)
    if along == "channels":
        weight = by_taps(weight)
    config = table.config("depthwise_fprop", along)
    tiles = triton.cdiv(N * P * Q, config["BLOCK_M"]) * triton.cdiv(K, config["BLOCK_N"])
    launch.launch(
        depthwise_fprop,
        tiles,
        input, weight, bias, residual, output,
        N * P * Q, K, H, W, P, Q,
        *input.stride(), *weight.stride(), *(output if residual is None else residual).stride(), *output.stride(),
        *stride, *padding, *dilation,
        M=K // C, R=R, S=S, UNROLL=R * S <= UNROLLED_TAPS,
        PADDED=any(padding),
        ACTIVATION=activation,
        WIDE=launch.wide(input, output, *([] if residual is None else [residual])),
        **config,
    )  # fmt: skip


def dgrad(grad: Tensor, weight: Tensor, grad_input: Tensor, geometry: Geometry) -> None:
    """Writes the gradient of the input into `grad_input`; `grad` is that before the activation."""
    (stride, padding, dilation, _), (_, K, P, Q) = geometry, grad.shape
    (_, _, R, S), (N, C, H, W) = weight.shape, grad_input.shape
    config = table.config("depthwise_dgrad", runs_along(grad_input))
    tiles = triton.cdiv(N * H * W, config["BLOCK_M"]) * triton.cdiv(C, config["BLOCK_N"])
    launch.launch(
        depthwise_dgrad,
        tiles,
        grad, weight, grad_input,
        N * H * W, C, H, W, P, Q,
        *grad.stride(), *weight.stride(), *grad_input.stride(),
        *padding, *dilation,
        STRIDE_H=stride[0], STRIDE_W=stride[1], M=K // C, R=R, S=S,
        WIDE=launch.wide(grad, grad_input),
        **config,
    )  # fmt: skip


def wgrad(grad: Tensor, input: Tensor, grad_weight: Tensor, geometry: Geometry) -> None:
    """Writes the gradient of the weight into `grad_weight`, which is dense; `grad` is that before the activation."""
    (stride, padding, dilation, _), (N, K, P, Q) = geometry, grad.shape
    (_, _, R, S), (_, C, H, W) = grad_weight.shape, input.shape
    config = table.config("depthwise_wgrad", runs_along(grad))
    tiles = R * S * triton.cdiv(K, config["BLOCK_N"])
    part_steps, parts = launch.split(triton.cdiv(N * P * Q, config["BLOCK_M"]), tiles, grad.device)
    sums = room_for_parts(grad_weight, parts)
    launch.launch(
        depthwise_wgrad,
        tiles * parts,
        grad, input, sums,
        N * P * Q, part_steps, grad_weight.numel(), K, H, W, P, Q,
        *grad.stride(), *input.stride(), *grad_weight.stride(),
        *stride, *padding, *dilation,
        M=K // C, R=R, S=S,
        PADDED=any(padding),
        WIDE=launch.wide(grad, input),
        **config,
    )  # fmt: skip
    if parts > 1:
        sum_parts(sums, parts, grad_weight)

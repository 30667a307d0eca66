"""2-D convolution as a matrix product that is never written out: the forward and the gradient of the input.

Letters: N batch, C input channels, H W input pixels, K output channels, R S filter, P Q output pixels; C and K are
those of one group. Every tensor is read and written through its own four strides, so contiguous and channels_last
layouts and slices of channels need no copy. A tile's pixels are consecutive in [N, P, Q]; whichever of its two sides
has stride 1 is the one that memory accesses run along.

    fprop   y[m, k]  = sum over (r, s, c)  x[pixel(m) + tap(r, s), c] * w[k, c, r, s]
    dgrad   dx[m, c] = sum over (r, s, k)  dy[(pixel(m) - tap(r, s)) / stride, k] * w[k, c, r, s]

The gradient of the weight, which sums over pixels, is in `_implicit_gemm_wgrad`.

Sums are in float32. The reduction is one flat loop over taps and blocks of channels, which Triton's pipeliner likes
best; with 8 warps such a loop has been seen to miscompile for filters larger than 1x1, hence `launch.guarded`.

Descriptors (TMA) are not used: they want 16-byte multiples of every stride, which a slice of channels or a contiguous
14x14 image does not have, and know no padding on the near side.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from ..operators.convolution import FusedConvolution, Geometry
from . import launch, table
from ._device import activate, dot, grouped_tile, index, narrow, pixel, widen

# A reduction over so few channels is flattened over taps and channels together: a block of channels would be mostly
# empty. The 3 of an image, and the 1 of a group that has a filter for each channel.
STEM_CHANNELS = 8


@triton.jit
def one_of(step, blocks, TAPS: tl.constexpr):
    """(block of channels, tap) of a step of the flat loop; without a division where there is but one tap."""
    if TAPS == 1:
        block, tap = step, 0
    else:
        block, tap = step % blocks, step // blocks
    return block, tap


@triton.jit(do_not_specialize=["pixels"])
def conv2d_fprop(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr,
    pixels, C, H, W, K, P, Q,
    x_n, x_c, x_h, x_w,
    w_k, w_c, w_r, w_s,
    z_n, z_k, z_p, z_q,
    y_n, y_k, y_p, y_q,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr,
    STEM: tl.constexpr,  # C if taps and channels are one flat index, else 0
    PADDED: tl.constexpr, WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """activation(conv2d(x, w) + bias + residual), one tile of BLOCK_M pixels x BLOCK_N channels of one group.

    PADDED: a tap may lie outside of the image. WHOLE: BLOCK_K divides C.
    """
    rows, columns = tl.cdiv(pixels, BLOCK_M), tl.cdiv(K, BLOCK_N)
    group = index(tl.program_id(0) // (rows * columns), WIDE)
    row, column = grouped_tile(tl.program_id(0) % (rows * columns), rows, columns, GROUP)
    m = index(row, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = index(column, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, p, q = pixel(m, P, Q)
    h0, w0 = p * stride_h - padding_h, q * stride_w - padding_w
    x_ptr += group * C * x_c
    w_ptr += group * K * w_k
    x_pixel = n * x_n + h0 * x_h + w0 * x_w
    w_column = k * w_k
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if STEM:
        for step in range(tl.cdiv(R * S * STEM, BLOCK_K)):
            j = index(step, WIDE) * BLOCK_K + tl.arange(0, BLOCK_K)
            tap, c = j // STEM, j % STEM
            r, s = tap // S, tap % S
            inside = (m < pixels)[:, None] & (j < R * S * STEM)[None, :]
            if PADDED:
                h = h0[:, None] + (r * dilation_h)[None, :]
                w = w0[:, None] + (s * dilation_w)[None, :]
                inside = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x_tap = r * dilation_h * x_h + s * dilation_w * x_w + c * x_c
            a = tl.load(x_ptr + x_pixel[:, None] + x_tap[None, :], inside, 0.0)
            w_tap = r * w_r + s * w_s + c * w_c
            b = tl.load(w_ptr + w_tap[:, None] + w_column[None, :], (j < R * S * STEM)[:, None] & (k < K)[None, :], 0.0)
            sums = dot(a, b, sums, PRECISION)
    else:
        blocks = tl.cdiv(C, BLOCK_K)
        for step in range(R * S * blocks):
            block, tap = one_of(step, blocks, R * S)
            c = index(block, WIDE) * BLOCK_K + tl.arange(0, BLOCK_K)
            r, s = index(tap, WIDE) // S, index(tap, WIDE) % S
            inside = m < pixels
            if PADDED:
                h, w = h0 + r * dilation_h, w0 + s * dilation_w
                inside = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            a_mask, b_mask = inside[:, None], (k < K)[None, :]
            if not WHOLE:
                a_mask = a_mask & (c < C)[None, :]
                b_mask = b_mask & (c < C)[:, None]
            x_tap = r * dilation_h * x_h + s * dilation_w * x_w
            a = tl.load(x_ptr + (x_pixel + x_tap)[:, None] + (c * x_c)[None, :], a_mask, 0.0)
            b = tl.load(w_ptr + (r * w_r + s * w_s) + (c * w_c)[:, None] + w_column[None, :], b_mask, 0.0)
            sums = dot(a, b, sums, PRECISION)
    wanted = (m < pixels)[:, None] & (k < K)[None, :]
    k += group * K
    if bias_ptr is not None:
        sums += widen(tl.load(bias_ptr + k, k < (group + 1) * K, 0.0))[None, :]
    if residual_ptr is not None:
        z_pixel = n * z_n + p * z_p + q * z_q
        sums += widen(tl.load(residual_ptr + z_pixel[:, None] + (k * z_k)[None, :], wanted, 0.0))
    y_pixel = n * y_n + p * y_p + q * y_q
    result = narrow(activate(sums, ACTIVATION), y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_pixel[:, None] + (k * y_k)[None, :], result, wanted)


@triton.jit
def first_tap(phase, padding, STEP: tl.constexpr, inverse, divisor):
    """The least r with  phase + padding - r * dilation  a multiple of the stride; every STEP-th after it is one, too.

    STEP is stride / divisor, where divisor is the greatest common one of stride and dilation, and `inverse` that of
    dilation / divisor modulo STEP. Without a solution: a number no filter reaches.
    """
    shifted = phase + padding
    first = (shifted // divisor * inverse) % STEP
    return tl.where(shifted % divisor == 0, first, 1 << 20)


@triton.jit(do_not_specialize=["pixels"])
def conv2d_dgrad(
    g_ptr, w_ptr, y_ptr,
    pixels, C, H, W, K, P, Q,
    g_n, g_k, g_p, g_q,
    w_k, w_c, w_r, w_s,
    y_n, y_c, y_h, y_w,
    padding_h, padding_w, dilation_h, dilation_w, inverse_h, inverse_w, divisor_h, divisor_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
    PADDED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient of the input, one tile of BLOCK_M pixels x BLOCK_N input channels of one group.

    A strided convolution's input pixels fall into STRIDE_H x STRIDE_W phases, by their row and column modulo the
    stride; the pixels of one phase meet the same taps of the filter. A tile belongs to one phase and runs over those
    taps only: no product with a zero between the strides. `pixels` are those of one phase, rounded up.

    PADDED: a tap may lead outside of the output. WHOLE: BLOCK_K divides K.
    """
    rows, columns = tl.cdiv(pixels, BLOCK_M), tl.cdiv(C, BLOCK_N)
    tiles = rows * columns
    group = index(tl.program_id(0) // (tiles * STRIDE_H * STRIDE_W), WIDE)
    phase = tl.program_id(0) // tiles % (STRIDE_H * STRIDE_W)
    row, column = grouped_tile(tl.program_id(0) % tiles, rows, columns, GROUP)
    m = index(row, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = index(column, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    phase_h, phase_w = phase // STRIDE_W, phase % STRIDE_W
    n, i, j = pixel(m, tl.cdiv(H, STRIDE_H), tl.cdiv(W, STRIDE_W))
    h, w = i * STRIDE_H + phase_h, j * STRIDE_W + phase_w
    wanted = (m < pixels) & (h < H) & (w < W)
    r0 = first_tap(phase_h, padding_h, STEP_H, inverse_h, divisor_h)
    s0 = first_tap(phase_w, padding_w, STEP_W, inverse_w, divisor_w)
    taps_h = tl.maximum(tl.cdiv(R - r0, STEP_H), 0)
    taps_w = tl.maximum(tl.cdiv(S - s0, STEP_W), 0)
    # the output pixel of the first tap; each further one lies dilation / divisor before
    p0 = i + (phase_h + padding_h - r0 * dilation_h) // STRIDE_H
    q0 = j + (phase_w + padding_w - s0 * dilation_w) // STRIDE_W
    g_ptr += group * K * g_k
    w_ptr += group * K * w_k
    blocks = tl.cdiv(K, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(taps_h * taps_w * blocks):
        block, tap = one_of(step, blocks, R * S)
        k = index(block, WIDE) * BLOCK_K + tl.arange(0, BLOCK_K)
        u, v = index(tap, WIDE) // taps_w, index(tap, WIDE) % taps_w
        p = p0 - u * (dilation_h // divisor_h)
        q = q0 - v * (dilation_w // divisor_w)
        inside = wanted
        if PADDED:
            inside = inside & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        a_mask, b_mask = inside[:, None], (c < C)[None, :]
        if not WHOLE:
            a_mask = a_mask & (k < K)[None, :]
            b_mask = b_mask & (k < K)[:, None]
        g_pixel = n * g_n + p * g_p + q * g_q
        a = tl.load(g_ptr + g_pixel[:, None] + (k * g_k)[None, :], a_mask, 0.0)
        w_tap = (r0 + u * STEP_H) * w_r + (s0 + v * STEP_W) * w_s
        b = tl.load(w_ptr + w_tap + (k * w_k)[:, None] + (c * w_c)[None, :], b_mask, 0.0)
        sums = dot(a, b, sums, PRECISION)
    y_pixel = n * y_n + h * y_h + w * y_w
    y_column = (group * C + c) * y_c
    result = narrow(sums, y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_pixel[:, None] + y_column[None, :], result, wanted[:, None] & (c < C)[None, :])


# ---------------------------------------------------------------------------------------- launchers


def is_stem(weight: Tensor) -> bool:
    return weight.shape[1] < STEM_CHANNELS and weight.shape[2] * weight.shape[3] > 1


def _filter_class(weight: Tensor) -> str:
    """The part of a table's key that the filter decides."""
    if weight.shape[1] % 8:
        return "ragged"
    return "pointwise" if weight.shape[2] * weight.shape[3] == 1 else "spatial"


def fprop(conv: FusedConvolution, output: Tensor) -> None:
    """Writes the convolution into `output`, which has any strides."""
    input, weight, bias, residual, geometry, activation = conv
    (stride, padding, dilation, groups), (_, _, P, Q) = geometry, output.shape
    (K, C, R, S), (_, _, H, W) = weight.shape, input.shape
    pixels = output.shape[0] * P * Q
    classes = (launch.dtype_class(input), _filter_class(weight), launch.width_class(K // groups))
    config = table.config("conv2d_fprop", *classes, filter=(R, S))
    tiles = triton.cdiv(pixels, config["BLOCK_M"]) * triton.cdiv(K // groups, config["BLOCK_N"])
    launch.launch(
        conv2d_fprop,
        tiles * groups,
        input, weight, bias, residual, output,
        pixels, C, H, W, K // groups, P, Q,
        *input.stride(), *weight.stride(), *(output if residual is None else residual).stride(), *output.stride(),
        *stride, *padding, *dilation,
        R=R, S=S,
        STEM=C if is_stem(weight) else 0,
        PADDED=any(padding),
        WHOLE=C % config["BLOCK_K"] == 0,
        ACTIVATION=activation,
        PRECISION=launch.precision(),
        WIDE=launch.wide(input, weight, output, *([] if residual is None else [residual])),
        **config,
    )  # fmt: skip


def _inverse(value: int, modulus: int) -> int:
    return pow(value, -1, modulus) if modulus > 1 else 0


def dgrad(grad: Tensor, weight: Tensor, grad_input: Tensor, geometry: Geometry) -> None:
    """Writes the gradient of the input into `grad_input`; `grad` is that before the activation."""
    (stride, padding, dilation, groups), (_, _, P, Q) = geometry, grad.shape
    (K, C, R, S), (N, _, H, W) = weight.shape, grad_input.shape
    pixels = N * triton.cdiv(H, stride[0]) * triton.cdiv(W, stride[1])
    kind = "pointwise" if R * S == 1 else "spatial"
    config = table.config("conv2d_dgrad", launch.dtype_class(grad), kind, launch.width_class(C), filter=(R, S))
    divisor = [gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    step = [s // g for s, g in zip(stride, divisor, strict=True)]
    tiles = triton.cdiv(pixels, config["BLOCK_M"]) * triton.cdiv(C, config["BLOCK_N"])
    launch.launch(
        conv2d_dgrad,
        tiles * groups * stride[0] * stride[1],
        grad, weight, grad_input,
        pixels, C, H, W, K // groups, P, Q,
        *grad.stride(), *weight.stride(), *grad_input.stride(),
        *padding, *dilation,
        *(_inverse(d // g, s) for d, g, s in zip(dilation, divisor, step, strict=True)),
        *divisor,
        STRIDE_H=stride[0], STRIDE_W=stride[1], STEP_H=step[0], STEP_W=step[1],
        R=R, S=S,
        PADDED=not (R == S == 1 and (H, W) == (P, Q) and not any(padding)),
        WHOLE=K // groups % config["BLOCK_K"] == 0,
        PRECISION=launch.precision(),
        WIDE=launch.wide(grad, weight, grad_input),
        **config,
    )  # fmt: skip

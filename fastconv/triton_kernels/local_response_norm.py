"""Local response normalization across channels and its backward, in one pass each.

    d[c] = k + scale * sum over the window of c  x[j]^2,      y[c] = x[c] * d[c]^-beta
    dx[c] = g[c] * d[c]^-beta - 2 scale beta x[c] * sum over windows that hold c  g[j] x[j] d[j]^-(beta + 1)

x is the input, or what an activation makes of it as it is loaded; the gradient then passes where x lets it.

A program owns a tile of pixels x channels and loads it once. The windows' sums then come from the tile itself: it is
shifted by one channel after the other (`tl.gather`) and added up, in float32. A running sum that lets the last channel
go would need fewer additions; but rounding errors pile up in it, and an Inf or NaN would never leave it.

Any dense tensor is taken as it lies in memory: the channel's stride splits it into what lies outside and inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import activations, checks
from ..operators import local_response_norm as aten
from . import launch, table
from ._device import activate, index, masked, narrow, widen


@triton.jit
def window_sum(
    values, channel, C, lane, BEFORE, AFTER, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """For each channel the sum over those from BEFORE below to AFTER above, as far as they exist in [0, C)."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for shift in range(-BEFORE, AFTER + 1):
        source = tl.minimum(tl.maximum(lane + shift, 0), BLOCK_N - 1)
        shifted = tl.gather(values, tl.broadcast_to(source[None, :], (BLOCK_M, BLOCK_N)), 1)
        exists = (channel + shift >= 0) & (channel + shift < C)
        sums += tl.where(exists[None, :], shifted, 0.0)
    return sums


@triton.jit
def inverse_power(d, beta, BETA: tl.constexpr):
    """d^-beta; the usual exponents through square roots, which are more exact than a logarithm."""
    if BETA == 0.75:
        root = 1.0 / tl.sqrt_rn(d)
        return root * tl.sqrt_rn(root)
    if BETA == 0.5:
        return 1.0 / tl.sqrt_rn(d)
    if BETA == 1.0:
        return 1.0 / d
    return tl.exp2(-beta * tl.log2(d))


@triton.jit(do_not_specialize=["pixels"])
def local_response_norm_kernel(
    x_ptr, g_ptr, y_ptr,
    pixels, C, inner, before, after, halo, scale, beta, k,
    BETA: tl.constexpr,  # beta, if there is a short cut for it, else None
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Forward, or with a gradient g the backward, for BLOCK_M pixels and BLOCK_N channels, of which `halo` at either
    end are only read: neighbouring tiles own those."""
    owned = BLOCK_N - 2 * halo
    columns = tl.cdiv(C, owned)
    m = index(tl.program_id(0) // columns, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    channel = tl.program_id(0) % columns * owned - halo + lane
    offset = (m // inner * (index(C, WIDE) * inner) + m % inner)[:, None] + (index(channel, WIDE) * inner)[None, :]
    inside = (m < pixels)[:, None] & ((channel >= 0) & (channel < C))[None, :]
    x = activate(widen(tl.load(x_ptr + offset, inside, 0.0)), ACTIVATION)
    d = k + scale * window_sum(x * x, channel, C, lane, before, after, BLOCK_M, BLOCK_N)
    power = inverse_power(d, beta, BETA)
    if g_ptr is None:
        result = x * power
    else:
        grad = widen(tl.load(g_ptr + offset, inside, 0.0))
        # channel j is in the window of c from `before` below it, so c collects from `before` above itself
        terms = window_sum(grad * x * (power / d), channel, C, lane, after, before, BLOCK_M, BLOCK_N)
        result = masked(grad * power - 2 * scale * beta * x * terms, x, ACTIVATION)
    inside = inside & ((lane >= halo) & (lane < BLOCK_N - halo))[None, :]
    tl.store(y_ptr + offset, narrow(result, y_ptr.dtype.element_ty), inside)


# A tile of more channels than this would spill. Windows so wide that even their halo needs one are summed by aten.
_MOST_CHANNELS = 4096


def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float, activation: str) -> Tensor:
    """`fastconv.ops.local_response_norm`: input [N, C, ...] -> the same shape, dtype and layout.

    float16, bfloat16 and float32; float64, and windows of more than 1024 channels, by the aten composition.
    """
    checks.local_response_norm("local_response_norm", input, size, activation)
    x, output = launch.dense(input)
    if x.dtype == torch.float64 or not _run(x, None, output, size, alpha, beta, k, activation):
        output.copy_(aten.by_aten(x, size, alpha, beta, k, activation))
    return output


def local_response_norm_backward(
    grad_output: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float, activation: str
) -> Tensor:
    """The gradient of the input, in its layout; dtypes as for `local_response_norm`."""
    checks.local_response_norm("local_response_norm_backward", input, size, activation, grad_output)
    x, grad_input = launch.dense(input)
    grad = launch.with_strides_of(x, grad_output)
    if x.dtype == torch.float64 or not _run(x, grad, grad_input, size, alpha, beta, k, activation):
        x, grad, scale = aten.at_least_32_bits(x), aten.at_least_32_bits(grad), alpha / size
        x = activations.activate(x, activation)
        d = k + scale * aten.window_sum(x * x, size)
        terms = aten.window_sum(grad * x * d ** -(beta + 1), size, adjoint=True)
        grad_input.copy_(activations.mask(grad * d**-beta - 2 * scale * beta * x * terms, x, activation))
    return grad_input


def _run(
    x: Tensor, grad: Tensor | None, result: Tensor, size: int, alpha: float, beta: float, k: float, activation: str
) -> bool:
    """Whether the kernel took it."""
    if x.numel() == 0:
        return True
    channels = x.shape[1]
    inner = x.stride(1) if channels > 1 else x.numel()
    before, after = min(size // 2, channels - 1), min((size - 1) // 2, channels - 1)
    halo = max(before, after) if grad is None else before + after
    config = dict(table.config("local_response_norm", "pixels" if inner > 1 else "channels"))
    elements, least = config.pop("ELEMENTS"), config.pop("BLOCK_N")
    block = triton.next_power_of_2(channels)
    if block > max(least, 8 * halo):
        # three quarters or more of a tile's channels are its own
        block = max(least, triton.next_power_of_2(8 * halo))
    else:
        halo = 0
    if block > _MOST_CHANNELS:
        return False
    pixels = x.numel() // channels
    rows = max(1, elements // block)
    columns = triton.cdiv(channels, block - 2 * halo)
    launch.launch(
        local_response_norm_kernel,
        triton.cdiv(pixels, rows) * columns,
        x, grad, result,
        pixels, channels, inner, before, after, halo, alpha / size, float(beta), float(k),
        BETA=beta if beta in (0.5, 0.75, 1.0) else None,
        ACTIVATION=activation,
        WIDE=launch.wide(x),
        BLOCK_M=rows, BLOCK_N=block,
        **config,
    )  # fmt: skip
    return True

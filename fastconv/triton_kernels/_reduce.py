"""The pass between a backward's activation and its convolutions, and sums of partial results.

`mask_and_sum` is the one pass over the gradient of a convolution's output: it undoes the activation for all of the
gradients that read it (input, weight, residual), and adds up the bias's. Masking where those kernels load the gradient
would read the output along with it once for each tap and each tile of columns, R * S times or more; and the sum would
have to leave the tensor core's operands, which never pass through registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, table
from ._device import index, masked, narrow, pixel, widen


@triton.jit(do_not_specialize=["pixels", "part_steps"])
def mask_and_sum_kernel(
    g_ptr, z_ptr, y_ptr, sums_ptr,
    pixels, part_steps, K, P, Q,
    g_n, g_k, g_p, g_q,
    z_n, z_k, z_p, z_q,
    y_n, y_k, y_p, y_q,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = g where the output z lets it through; sums[part, k] = sum of y over the part's pixels.

    A program owns BLOCK_N channels and `part_steps` blocks of BLOCK_M pixels. z, y or sums may be
    None.
    """
    columns = tl.cdiv(K, BLOCK_N)
    part = index(tl.program_id(0) // columns, WIDE)
    k = index(tl.program_id(0) % columns, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = part * part_steps
    for step in range(first, tl.minimum(first + part_steps, tl.cdiv(pixels, BLOCK_M))):
        m = index(step, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
        n, p, q = pixel(m, P, Q)
        inside = (m < pixels)[:, None] & (k < K)[None, :]
        g_offset = (n * g_n + p * g_p + q * g_q)[:, None] + (k * g_k)[None, :]
        grad = widen(tl.load(g_ptr + g_offset, inside, 0.0))
        if z_ptr is not None:
            z_offset = (n * z_n + p * z_p + q * z_q)[:, None] + (k * z_k)[None, :]
            grad = masked(grad, widen(tl.load(z_ptr + z_offset, inside, 1.0)), ACTIVATION)
        if y_ptr is not None:
            y_offset = (n * y_n + p * y_p + q * y_q)[:, None] + (k * y_k)[None, :]
            tl.store(y_ptr + y_offset, narrow(grad, y_ptr.dtype.element_ty), inside)
        sums += grad
    if sums_ptr is not None:
        tl.store(sums_ptr + part * K + k, tl.sum(sums, 0), k < K)


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(x_ptr, y_ptr, size, parts, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = sum over parts of x[part, i], in that order."""
    i = index(tl.program_id(0), WIDE) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _part in range(parts):
        total += tl.load(x_ptr + i, i < size, 0.0)
        x_ptr += size
    tl.store(y_ptr + i, narrow(total, y_ptr.dtype.element_ty), i < size)


def room_for_parts(output: Tensor, parts: int) -> Tensor:
    """What a kernel writes the parts of `output` to: `output` itself where there is but one, else for `sum_parts`."""
    return output if parts == 1 else torch.empty(parts * output.numel(), dtype=torch.float32, device=output.device)


def sum_parts(sums: Tensor, parts: int, output: Tensor) -> None:
    """Adds `parts` float32 copies of `output`, which lie one behind the other with its strides, into it."""
    config = table.config("sum_parts", "any")
    size = output.numel()
    wide = launch.wide(output) or size > launch.NARROW_LIMIT
    launch.launch(sum_parts_kernel, triton.cdiv(size, config["BLOCK"]), sums, output, size, parts, WIDE=wide, **config)


def mask_and_sum(
    grad: Tensor, output: Tensor | None, activation: str, grad_bias: Tensor | None, masked_grad: Tensor | None
) -> None:
    """Writes the gradient before the activation into `masked_grad` and its sum over pixels into `grad_bias`."""
    if masked_grad is None and grad_bias is None:
        return
    N, K, P, Q = grad.shape
    along_pixels = grad.stride(3) == 1 and grad.stride(1) != 1
    config = table.config("mask_and_sum", "pixels" if along_pixels else "channels")
    columns = triton.cdiv(K, config["BLOCK_N"])
    part_steps, parts = launch.split(triton.cdiv(N * P * Q, config["BLOCK_M"]), columns, grad.device)
    sums = None
    if grad_bias is not None:
        if grad.numel() == 0:
            grad_bias.zero_()
            return
        sums = torch.empty(parts * K, dtype=torch.float32, device=grad.device)
    given = [tensor for tensor in (grad, output, masked_grad) if tensor is not None]
    launch.launch(
        mask_and_sum_kernel,
        columns * parts,
        grad, output, masked_grad, sums,
        N * P * Q, part_steps, K, P, Q,
        *grad.stride(), *(grad if output is None else output).stride(),
        *(grad if masked_grad is None else masked_grad).stride(),
        ACTIVATION=activation,
        WIDE=launch.wide(*given),
        **config,
    )  # fmt: skip
    if grad_bias is not None and sums is not None:
        sum_parts(sums, parts, grad_bias)

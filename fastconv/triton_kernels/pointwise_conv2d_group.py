"""Several 1x1 convolutions of one input in one launch: the input's pixels are read from memory once, for all branches.

    y_i[m, k] = activation(sum over c  x[m, c] * w_i[k, c]  +  bias_i[k])

The grid runs through the tiles of all branches for one block of pixels after the other, so branches share these pixels
in L2. A branch's pointers are picked by comparing its tile's number: no table of pointers in memory, which CUDA graphs
would have to update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import checks, destinations
from ..operators.activations import mask
from ..operators.conv2d_backward import empty_gradient
from ..operators.convolution import POINTWISE, FusedConvolution
from . import _conv, launch, table
from ._device import activate, dot, index, narrow, pixel, widen

# The kernel has arguments for so many branches; more of them take more launches.
BRANCHES = 4


@triton.jit(do_not_specialize=["pixels"])
def pointwise_group(
    x_ptr,
    w0_ptr, w1_ptr, w2_ptr, w3_ptr,  # [K_i, C], rows of C elements
    bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr,
    y0_ptr, y1_ptr, y2_ptr, y3_ptr,
    K0, K1, K2, K3,
    y0_n, y1_n, y2_n, y3_n,
    y0_k, y1_k, y2_k, y3_k,
    y0_q, y1_q, y2_q, y3_q,  # elements between neighbouring pixels, also from one row's end to the next row
    pixels, C, P, Q,
    x_n, x_c, x_h, x_w,
    WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M pixels x BLOCK_N channels of one branch. K_i is 0 for a branch that is not there.

    WHOLE: BLOCK_K divides C.
    """
    end0 = tl.cdiv(K0, BLOCK_N)
    end1 = end0 + tl.cdiv(K1, BLOCK_N)
    end2 = end1 + tl.cdiv(K2, BLOCK_N)
    columns = end2 + tl.cdiv(K3, BLOCK_N)
    row, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    w_ptr, bias_ptr, y_ptr, K, y_n, y_k, y_q, start = w0_ptr, bias0_ptr, y0_ptr, K0, y0_n, y0_k, y0_q, 0
    if column >= end2:
        w_ptr, bias_ptr, y_ptr, K, y_n, y_k, y_q, start = w3_ptr, bias3_ptr, y3_ptr, K3, y3_n, y3_k, y3_q, end2
    elif column >= end1:
        w_ptr, bias_ptr, y_ptr, K, y_n, y_k, y_q, start = w2_ptr, bias2_ptr, y2_ptr, K2, y2_n, y2_k, y2_q, end1
    elif column >= end0:
        w_ptr, bias_ptr, y_ptr, K, y_n, y_k, y_q, start = w1_ptr, bias1_ptr, y1_ptr, K1, y1_n, y1_k, y1_q, end0
    m = index(row, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = index(column - start, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    n, p, q = pixel(m, P, Q)
    x_pixel = n * x_n + p * x_h + q * x_w
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(C, BLOCK_K)):
        c = index(step, WIDE) * BLOCK_K + tl.arange(0, BLOCK_K)
        a_mask, b_mask = (m < pixels)[:, None], (k < K)[None, :]
        if not WHOLE:
            a_mask = a_mask & (c < C)[None, :]
            b_mask = b_mask & (c < C)[:, None]
        a = tl.load(x_ptr + x_pixel[:, None] + (c * x_c)[None, :], a_mask, 0.0)
        b = tl.load(w_ptr + c[:, None] + (k * C)[None, :], b_mask, 0.0)
        sums = dot(a, b, sums, PRECISION)
    if bias_ptr is not None:
        sums += widen(tl.load(bias_ptr + k, k < K, 0.0))[None, :]
    result = narrow(activate(sums, ACTIVATION), y_ptr.dtype.element_ty)
    y_pixel = n * y_n + (p * Q + q) * y_q
    tl.store(y_ptr + y_pixel[:, None] + (k * y_k)[None, :], result, (m < pixels)[:, None] & (k < K)[None, :])


def pointwise_conv2d_group(
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
    *,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """`fastconv.ops.pointwise_conv2d_group`: input [N, C, H, W], weights [K_i, C, 1, 1] -> one [N, K_i, H, W] each.

    float16, bfloat16 and float32; float64 by the aten composition. `out` is written in place where the rows of each of
    its tensors lie one behind the other, as in slices of the channels of a concatenation; else the result is copied.
    """
    op = "pointwise_conv2d_group"
    shapes = checks.pointwise_group(op, input, weights, biases, activation)
    if out is not None:
        destinations.check_each(op, out, shapes, input, [input, *weights, *biases])
    given: list[Tensor | None] = [bias.contiguous() for bias in biases] or [None for _ in weights]
    places: list[Tensor | None] = [None for _ in weights] if out is None else list(out)
    if input.dtype == torch.float64:
        return [
            _conv.convolve(FusedConvolution(input, weight, bias, None, POINTWISE, activation), place)
            for weight, bias, place in zip(weights, given, places, strict=True)
        ]
    outputs = [
        launch.new_output(input, weight, POINTWISE, activation == "relu")
        if place is None or not _has_even_pixels(place)
        else place
        for weight, place in zip(weights, places, strict=True)
    ]
    for start in range(0, len(weights), BRANCHES):
        some = slice(start, start + BRANCHES)
        _launch_some(input, weights[some], given[some], outputs[some], activation)
    for place, output in zip(places, outputs, strict=True):
        if place is not None and place is not output:
            place.copy_(output)
    return outputs


def _has_even_pixels(tensor: Tensor) -> bool:
    """Whether neighbouring pixels lie equally far apart, also from one row's end to the next row."""
    _, _, P, Q = tensor.shape
    return P == 1 or Q == 1 or tensor.stride(2) == Q * tensor.stride(3)


def _launch_some(
    input: Tensor, weights: list[Tensor], biases: list[Tensor | None], outputs: list[Tensor], activation: str
) -> None:
    N, C, P, Q = input.shape
    missing = BRANCHES - len(weights)
    widths = [weight.shape[0] for weight in weights]
    config = table.config("pointwise_group", launch.dtype_class(input), launch.width_class(max(widths)))
    columns = sum(triton.cdiv(width, config["BLOCK_N"]) for width in widths)
    rows = [weight.reshape(weight.shape[0], C).contiguous() for weight in weights]

    def four(values: Sequence[Any], filler: Any) -> list[Any]:
        return [*values, *[filler] * missing]

    launch.launch(
        pointwise_group,
        triton.cdiv(N * P * Q, config["BLOCK_M"]) * columns,
        input,
        *four(rows, rows[0]),
        *four(biases, biases[0]),
        *four(outputs, outputs[0]),
        *four(widths, 0),
        *four([output.stride(0) for output in outputs], 0),
        *four([output.stride(1) for output in outputs], 0),
        *four([output.stride(3) if Q > 1 else output.stride(2) for output in outputs], 0),
        N * P * Q, C, P, Q,
        *input.stride(),
        WHOLE=C % config["BLOCK_K"] == 0,
        ACTIVATION=activation,
        PRECISION=launch.precision(),
        WIDE=launch.wide(input, *rows, *outputs),
        **config,
    )  # fmt: skip


def pointwise_conv2d_group_backward(
    grad_outputs: list[Tensor],
    outputs: list[Tensor],
    input: Tensor,
    weights: list[Tensor],
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of input, weights and biases.

    The branches' gradients are masked straight into slices of one tensor; one convolution then sums over all branches.
    float16, bfloat16 and float32; float64 by the aten composition.
    """
    op = "pointwise_conv2d_group_backward"
    checks.pointwise_group_backward(op, grad_outputs, outputs, input, weights, activation)
    sizes = [weight.shape[0] for weight in weights]
    weight = torch.cat([weight.reshape(weight.shape[0], -1) for weight in weights])[:, :, None, None]
    joined = FusedConvolution(input, weight, None, None, POINTWISE, "none")
    given: list[Tensor | None] = list(outputs) or [None for _ in weights]
    grad_bias = empty_gradient(input)
    if input.dtype == torch.float64:
        grad = torch.cat([mask(*pair, activation) for pair in zip(grad_outputs, given, strict=True)], 1)
        grad_input, grad_weight, grad_bias, _ = _conv.backward(grad, None, joined, [*output_mask, False])
    else:
        grad = launch.new_output(input, weight, POINTWISE)
        if output_mask[2]:
            grad_bias = input.new_empty(sum(sizes))
        biases = list(grad_bias.split(sizes)) if output_mask[2] else [None for _ in sizes]
        for part, bias, grad_output, output in zip(grad.split(sizes, 1), biases, grad_outputs, given, strict=True):
            _conv.mask_and_sum(grad_output, output, activation, bias, part if any(output_mask[:2]) else None)
        grad_input, grad_weight = _conv.gradients(grad, joined, output_mask[:2])

    def parts(joined: Tensor, wanted: bool) -> list[Tensor]:
        """Copies, as an operator's results may not share memory."""
        if not wanted:
            return [empty_gradient(input) for _ in sizes]
        return [part.clone() for part in joined.split(sizes)]

    grad_weights = parts(grad_weight, output_mask[1])
    if input.numel() == 0 and output_mask[1]:
        grad_weights = [torch.zeros_like(part) for part in weights]
    return grad_input, grad_weights, parts(grad_bias, output_mask[2])

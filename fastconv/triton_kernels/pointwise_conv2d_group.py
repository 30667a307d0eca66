"""Several 1x1 convolutions of one input in one launch: the input's pixels are read from memory once, for all branches.

    y_i[m, k] = activation(sum over c  x[m, c] * w_i[k, c]  +  bias_i[k])

The grid runs through the tiles of all branches for one block of pixels after the other, so branches share these pixels
in L2. A branch's code is picked by comparing its tile's number: no table of pointers in memory, which CUDA graphs would
have to update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import checks, destinations
from ..operators.activations import mask
from ..operators.conv2d_backward import empty_gradient
from ..operators.convolution import POINTWISE, FusedConvolution
from . import _conv, launch, table
from .device import dot, finish, image_of, index, pixel_offset
from .operands import Filters, Form, Image, Result, divisor, filters, form, image, result

# So many branches in one launch at most, as their arguments are a kernel's; more of them take more launches.
BRANCHES = 4


@triton.jit
def first_column(filters, BRANCH: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first of the branch's columns of tiles."""
    start = 0
    for i in tl.static_range(BRANCH):
        start += tl.cdiv(filters[i] * UNIT, BLOCK_N)
    return start


@triton.jit(do_not_specialize=["filters", "pixels", "C", "P", "Q", "x_pixel", "y_pixels", "y_channels"])
def pointwise_group(
    x_ptr, w_ptrs, bias_ptrs, y_ptrs,  # tuples: of each branch
    filters, pixels, C, P, Q,  # filters, of each branch, but for PLANES in units; C in units; P and Q as divisors
    x_pixel, y_pixels, y_channels,
    BRANCHES: tl.constexpr, UNIT: tl.constexpr, RESULT_UNIT: tl.constexpr,
    WHOLE: tl.constexpr, DENSE: tl.constexpr, PLANES: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M pixels x BLOCK_N channels of one branch.

    WHOLE: BLOCK_K divides C. DENSE: one stride leads through all pixels of x.
    """
    K_UNIT: tl.constexpr = 1 if PLANES else RESULT_UNIT
    columns = first_column(filters, BRANCHES, K_UNIT, BLOCK_N)
    row, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    m = index(row, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = m < pixels
    n, p, q = image_of(tl.where(in_rows, m, 0), P, Q, WIDE)
    if DENSE:
        x_offset = tl.where(in_rows, m, 0) * (x_pixel.w * UNIT)
    else:
        x_offset = (n * x_pixel.n + p * x_pixel.h + q * x_pixel.w) * UNIT
    channels = C * UNIT
    lane = tl.arange(0, BLOCK_K)
    for i in tl.static_range(BRANCHES):
        start = first_column(filters, i, K_UNIT, BLOCK_N)
        K = filters[i] * K_UNIT
        if (column >= start) & (column < start + tl.cdiv(K, BLOCK_N)):
            k = (column - start) * BLOCK_N + tl.arange(0, BLOCK_N)
            w_row = tl.where(k < K, k, 0) * channels
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(tl.cdiv(channels, BLOCK_K)):
                c = step * BLOCK_K + lane
                if WHOLE:
                    a = tl.load(x_ptr + c[None, :] + x_offset[:, None])
                    b = tl.load(w_ptrs[i] + (c[:, None] + w_row[None, :]))
                else:
                    in_depth = c < channels
                    a = tl.load(x_ptr + c[None, :] + x_offset[:, None], in_depth[None, :], 0.0)
                    b = tl.load(w_ptrs[i] + (c[:, None] + w_row[None, :]), in_depth[:, None], 0.0)
                sums = dot(a, b, sums, PRECISION)
            y_offset = pixel_offset(n, p, q, y_pixels[i], Q.value, RESULT_UNIT, PLANES)
            finish(
                sums, bias_ptrs[i], y_ptrs[i], y_offset, in_rows, k, k < K, y_channels[i],
                RESULT_UNIT, PLANES, ACTIVATION
            )  # fmt: skip


def pointwise_conv2d_group(
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    activation: str,
    *,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    """`fastconv.ops.pointwise_conv2d_group`: input [N, C, H, W], weights [K_i, C, 1, 1] -> one [N, K_i, H, W] each.

    float16, bfloat16 and float32; float64 by the aten composition. `out` is written in place where its channels or its
    images lie one behind the other, as in slices of the channels of a concatenation; else the result is copied.
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
        launch.new_output(input, weight, POINTWISE, activation == "relu") if place is None else place
        for weight, place in zip(weights, places, strict=True)
    ]
    for start in range(0, len(weights), BRANCHES):
        some = slice(start, start + BRANCHES)
        _launch_some(input, weights[some], given[some], outputs[some], activation)
    return outputs


class _Plan(NamedTuple):
    """All of a launch but its tensors."""

    asked: table.Asked
    x: Image
    ws: tuple[Filters, ...]
    ys: tuple[Result, ...]
    programs: int
    numbers: tuple[Any, ...]
    meta: dict[str, Any]


@launch.planner
def _plan(
    input: Form, weights: tuple[Form, ...], outputs: tuple[Form, ...], activation: str, precision: str,
    preferences: Any,
) -> _Plan:  # fmt: skip
    N, _, P, Q = input.shape
    widths = [weight.shape[0] for weight in weights]
    x = image(input)
    # one kernel writes all of them along channels or all of them in planes
    planes = all(result(output).planes for output in outputs)
    ys = tuple(result(output, planes=planes) for output in outputs)
    unit = min(y.unit for y in ys)
    ys = tuple(y.in_units(unit) for y in ys)
    ws = tuple(filters(weight, x.channels, 1) for weight in weights)
    classes = launch.dtype_class(input.dtype, precision), launch.width_class(max(widths))
    asked = table.ask("pointwise_group", *classes)
    block_m, block_n, block_k = table.block(asked.config, x.channels)
    meta = {
        **asked.config,
        "BLOCK_K": block_k,
        "BRANCHES": len(weights), "UNIT": x.unit, "RESULT_UNIT": unit,
        "WHOLE": x.channels % block_k == 0, "DENSE": x.form.has_dense_pixels, "PLANES": planes,
        "ACTIVATION": activation,
        "PRECISION": precision,
        "WIDE": launch.wide(x.form, *weights, *(y.form for y in ys)),
    }  # fmt: skip
    strides = [y.strides for y in ys]
    numbers = (
        tuple(y.channels for y in ys), N * P * Q, x.channels // x.unit, divisor(P), divisor(Q),
        x.pixel, tuple(pixel for pixel, _ in strides), tuple(channel for _, channel in strides),
    )  # fmt: skip
    programs = launch.cdiv(N * P * Q, block_m) * sum(launch.cdiv(width, block_n) for width in widths)
    return _Plan(asked, x, ws, ys, programs, numbers, meta)


def _launch_some(
    input: Tensor, weights: list[Tensor], biases: list[Tensor | None], outputs: list[Tensor], activation: str
) -> None:
    plan = _plan(
        form(input), tuple(map(form, weights)), tuple(map(form, outputs)), activation, launch.precision(input.dtype),
        table.preferences(),
    )  # fmt: skip
    table.note(plan.asked)
    ws = tuple(w.of(weight) for w, weight in zip(plan.ws, weights, strict=True))
    ys = tuple(y.of(output) for y, output in zip(plan.ys, outputs, strict=True))
    launch.launch(pointwise_group, plan.programs, plan.x.of(input), ws, tuple(biases), ys, *plan.numbers, **plan.meta)
    for y, tensor, output in zip(plan.ys, ys, outputs, strict=True):
        y.written(tensor, output)


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

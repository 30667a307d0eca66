"""Depthwise convolution and the 1x1 convolution after it in one kernel: what lies between them never leaves the chip.

    h[m, c] = depthwise_activation(sum over (r, s)  x[pixel(m) + tap(r, s), c // M] * d[c, r, s]  +  depthwise_bias[c])
    y[m, k] = pointwise_activation(sum over c  h[m, c] * w[k, c]  +  pointwise_bias[k])

A program owns a tile of pixels x output channels. For one block of channels after the other it makes h from patches of
a row, see `_patches`, rounds it to the inputs' dtype as eager does, and multiplies it. h is made once for each tile of
columns: beyond `_MOST_COLUMNS` of these that costs more than writing and reading it, and two kernels run instead.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.activations import with_plain_strides
from ..operators.conv2d_backward import empty_gradient
from ..operators.convolution import POINTWISE, FusedConvolution
from ..operators.depthwise_separable import read, read_backward
from . import _conv, launch, table
from ._layouts import channels_of, laid, lay, runs_along, size_of, strides_of, vector_of
from ._patches import Grid, Patches, Window, convolve, corner, filled, image, joined, outputs, place
from .depthwise import MOST_TAPS, NUMBERS, by_taps
from .device import activate, dot, index, narrow, widen
from .operands import VECTOR_BYTES, Divisor, divisor, form

_MOST_COLUMNS = 2
_MOST_PATCH = 4


@triton.jit(do_not_specialize=NUMBERS)
def depthwise_separable_fprop(
    x_ptr, d_ptr, d_bias_ptr, w_ptr, w_bias_ptr, y_ptr,
    count, rows, rows_magic, rows_shift, columns, columns_magic, columns_shift,
    C, K, H, W, P, Q, x_n, x_h, x_other, y_n, y_h, y_other,
    M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLLED: tl.constexpr, WHOLE: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr, POINTWISE_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, Y_UNIT: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M pixels x BLOCK_N output channels; C counts the channels between the two convolutions.

    Pixels come in patches of one row. WHOLE: BLOCK_K divides C. PIXELS says how y lies, x lies along channels.
    """
    grid = Grid(count, Divisor(rows, rows_magic, rows_shift), Divisor(columns, columns_magic, columns_shift))
    x = image(x_ptr, x_n, x_h, x_other, H, W, UNIT, False, WIDE)
    y = image(y_ptr, y_n, y_h, y_other, P, Q, Y_UNIT, PIXELS, WIDE)
    channels = C * UNIT
    filters = K if PIXELS else K * Y_UNIT
    strips = tl.cdiv(filters, BLOCK_N)
    k = tl.program_id(0) % strips * BLOCK_N + tl.arange(0, BLOCK_N)
    first = index(tl.program_id(0) // strips, WIDE) * (BLOCK_M // outputs(COLUMNS))
    m = first + tl.arange(0, BLOCK_M // outputs(COLUMNS))[:, None]
    n, row, column, wanted = place(m, grid, m < count, PIXELS, WIDE)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Not pipelined: copies in flight would take the inputs' way through shared memory, and addresses outside of x.
    for step in tl.range(tl.cdiv(channels, BLOCK_K), num_stages=1):
        c = step * BLOCK_K + tl.arange(0, BLOCK_K)
        in_depth = None if WHOLE else (c < channels)[None, :]
        in_tile = wanted if WHOLE else wanted & in_depth
        start = tl.zeros((BLOCK_M // outputs(COLUMNS), BLOCK_K), tl.float32)
        if d_bias_ptr is not None:
            start += widen(tl.load(d_bias_ptr + c[None, :], in_depth, None if WHOLE else 0.0))
        hidden = convolve(
            filled(start, outputs(COLUMNS)), x, (c // M)[None, :], Patches(n, row, column, in_tile),
            d_ptr + c[None, :], channels, in_depth, ROWS, COLUMNS, UNROLLED, 1
        )  # fmt: skip
        rounded = ()
        for o in tl.static_range(outputs(COLUMNS)):
            rounded = rounded + (narrow(activate(hidden[o], DEPTHWISE_ACTIVATION), x_ptr.dtype.element_ty),)
        a = tl.reshape(joined(rounded, outputs(COLUMNS)), (BLOCK_M // outputs(COLUMNS), BLOCK_K, outputs(COLUMNS)))
        a = tl.reshape(tl.permute(a, (0, 2, 1)), (BLOCK_M, BLOCK_K))
        in_columns = (k < filters)[None, :] if WHOLE else (k < filters)[None, :] & (c < channels)[:, None]
        b = tl.load(w_ptr + (c[:, None] + (k * channels)[None, :]), in_columns, 0.0)
        sums = dot(a, b, sums, PRECISION)
    if w_bias_ptr is not None:
        sums += widen(tl.load(w_bias_ptr + k, k < filters, 0.0))[None, :]
    lane = tl.arange(0, BLOCK_M)
    m = first + lane // outputs(COLUMNS)
    n, p, column, wanted = place(m, grid, m < count, PIXELS, WIDE)
    q = column * outputs(COLUMNS) + lane % outputs(COLUMNS)
    inside = (wanted & (q < y.columns))[:, None] & (k < filters)[None, :]
    pointers = corner(y, n[:, None], k[None, :], p[:, None], q[:, None])
    tl.store(pointers, narrow(activate(sums, POINTWISE_ACTIVATION), y_ptr.dtype.element_ty), inside)


def depthwise_separable_conv2d(*args: Any) -> Tensor:
    """`fastconv.ops.depthwise_separable_conv2d`: input [N, C, H, W], weights [C * M, 1, R, S] and [K, C * M, 1, 1].

    Returns [N, K, P, Q]. float16, bfloat16 and float32; float64 by the aten composition.
    """
    depthwise, pointwise = read("depthwise_separable_conv2d", args)
    dtype, K = depthwise.input.dtype, pointwise.weight.shape[0]
    asked = table.ask(
        "depthwise_separable_fprop", launch.dtype_class(dtype, launch.precision(dtype)), launch.width_class(K)
    )
    if dtype == torch.float64 or launch.cdiv(K, asked.config["BLOCK_N"]) > _MOST_COLUMNS:
        return _conv.convolve(pointwise._replace(input=_conv.convolve(depthwise)))
    table.note(asked)
    return _fused(depthwise, pointwise, asked.config)


def _fused(depthwise: FusedConvolution, pointwise: FusedConvolution, config: table.Config) -> Tensor:
    input, weight, (stride, padding, dilation, groups) = depthwise.input, depthwise.weight, depthwise.geometry
    (K, C), (_, _, R, S), (N, _, P, Q) = pointwise.weight.shape[:2], weight.shape, pointwise.input.shape
    # eager's layout follows from that of its depthwise result
    hidden_layout = launch.convolution_layout(input, weight, depthwise.geometry)
    hidden = torch.empty_like(pointwise.input, memory_format=hidden_layout)
    if depthwise.activation == "relu":
        hidden = with_plain_strides(hidden)
    output = launch.new_output(hidden, pointwise.weight, POINTWISE, pointwise.activation == "relu")
    x, y = laid(form(input), "channels"), form(output)
    along = runs_along(y)
    unit, y_unit = vector_of("channels", x), vector_of(along, y)
    block_m, block_n, block_k = table.block(config, C)
    # as many pixels as give each lane one vector of channels of a patch
    vectors = block_m * block_k * input.dtype.itemsize // VECTOR_BYTES
    patch = min(max(vectors // (32 * config["num_warps"]), 1), _MOST_PATCH)
    columns = launch.cdiv(Q, patch)
    launch.launch(
        depthwise_separable_fprop,
        launch.cdiv(N * P * columns, block_m // patch) * launch.cdiv(K, block_n),
        lay(input, "channels"),
        by_taps(weight),
        None if depthwise.bias is None else depthwise.bias.contiguous(),
        pointwise.weight.reshape(K, C).contiguous(),
        None if pointwise.bias is None else pointwise.bias.contiguous(),
        output,
        N * P * columns, *divisor(P), *divisor(columns),
        C // unit, channels_of(y, along, y_unit),
        *size_of(x, "channels", unit), *size_of(y, along, y_unit),
        *strides_of(x, "channels", unit), *strides_of(y, along, y_unit),
        M=C // groups,
        ROWS=Window(1, R, stride[0], dilation[0], -padding[0], 1),
        COLUMNS=Window(patch, S, stride[1], dilation[1], -padding[1], 1),
        UNROLLED=MOST_TAPS["channels"] >= R * S,
        WHOLE=C % block_k == 0,
        DEPTHWISE_ACTIVATION=depthwise.activation,
        POINTWISE_ACTIVATION=pointwise.activation,
        PRECISION=launch.precision(input.dtype),
        UNIT=unit, Y_UNIT=y_unit, PIXELS=along == "pixels",
        WIDE=launch.wide(input, output),
        **{**config, "BLOCK_K": block_k},
    )  # fmt: skip
    return output


def depthwise_separable_conv2d_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five tensors, in their order. The depthwise result is computed again.

    float16, bfloat16 and float32; float64 by the aten composition.
    """
    grad_output, output, depthwise, pointwise, wanted = read_backward(args)
    hidden = _conv.convolve(depthwise)
    wants_depthwise = wanted[0] or wanted[1] or wanted[3]
    grad_hidden, grad_pointwise, grad_pointwise_bias, _ = _conv.backward(
        grad_output, output, pointwise._replace(input=hidden), [wants_depthwise, wanted[2], wanted[4], False]
    )
    empty = empty_gradient(hidden)
    if not wants_depthwise:
        return empty, empty.clone(), grad_pointwise, empty.clone(), grad_pointwise_bias
    grad_input, grad_depthwise, grad_depthwise_bias, _ = _conv.backward(
        grad_hidden, hidden, depthwise, [wanted[0], wanted[1], wanted[3], False]
    )
    return grad_input, grad_depthwise, grad_pointwise, grad_depthwise_bias, grad_pointwise_bias

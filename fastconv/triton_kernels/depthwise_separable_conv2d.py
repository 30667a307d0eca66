"""Depthwise convolution and the 1x1 convolution after it in one kernel: what lies between them never leaves the chip.

    h[m, c] = depthwise_activation(sum over (r, s)  x[pixel(m) + tap(r, s), c // M] * d[c, r, s]  +  depthwise_bias[c])
    y[m, k] = pointwise_activation(sum over c  h[m, c] * w[k, c]  +  pointwise_bias[k])

A program owns a tile of pixels x output channels. For one block of channels after the other it makes h with the loop of
`_depthwise`, rounds it to the inputs' dtype as eager does, and multiplies it. h is made once for each tile of columns:
beyond `_MOST_COLUMNS` of these that costs more than writing and reading it, and two kernels run instead.
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
from . import _conv, _depthwise, launch, table
from ._depthwise import depthwise_tile
from ._device import activate, dot, index, narrow, pixel, widen

_MOST_COLUMNS = 4


@triton.jit(do_not_specialize=["pixels"])
def depthwise_separable_fprop(
    x_ptr, d_ptr, d_bias_ptr, w_ptr, w_bias_ptr, y_ptr,
    pixels, C, H, W, K, P, Q,
    x_n, x_c, x_h, x_w,
    d_c, d_i, d_r, d_s,
    y_n, y_k, y_p, y_q,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    M: tl.constexpr, R: tl.constexpr, S: tl.constexpr, UNROLL: tl.constexpr, PADDED: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr, POINTWISE_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M pixels x BLOCK_N output channels; C counts the channels between the two convolutions."""
    columns = tl.cdiv(K, BLOCK_N)
    m = index(tl.program_id(0) // columns, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = index(tl.program_id(0) % columns, WIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(C, BLOCK_K)):
        c = index(step, WIDE) * BLOCK_K + tl.arange(0, BLOCK_K)
        hidden = depthwise_tile(
            x_ptr, d_ptr, m, c, pixels, C, H, W, P, Q, x_n, x_c, x_h, x_w, d_c, d_r, d_s,
            stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
            M, R, S, UNROLL, PADDED, WIDE, BLOCK_M, BLOCK_K
        )  # fmt: skip
        if d_bias_ptr is not None:
            hidden += widen(tl.load(d_bias_ptr + c, c < C, 0.0))[None, :]
        hidden = narrow(activate(hidden, DEPTHWISE_ACTIVATION), x_ptr.dtype.element_ty)
        b = tl.load(w_ptr + c[:, None] + (k * C)[None, :], (c < C)[:, None] & (k < K)[None, :], 0.0)
        sums = dot(hidden, b, sums, PRECISION)
    if w_bias_ptr is not None:
        sums += widen(tl.load(w_bias_ptr + k, k < K, 0.0))[None, :]
    n, p, q = pixel(m, P, Q)
    y_pixel = n * y_n + p * y_p + q * y_q
    result = narrow(activate(sums, POINTWISE_ACTIVATION), y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_pixel[:, None] + (k * y_k)[None, :], result, (m < pixels)[:, None] & (k < K)[None, :])


def depthwise_separable_conv2d(*args: Any) -> Tensor:
    """`fastconv.ops.depthwise_separable_conv2d`: input [N, C, H, W], weights [C * M, 1, R, S] and [K, C * M, 1, 1].

    Returns [N, K, P, Q]. float16, bfloat16 and float32; float64 by the aten composition.
    """
    depthwise, pointwise = read("depthwise_separable_conv2d", args)
    K = pointwise.weight.shape[0]
    classes = (launch.dtype_class(depthwise.input), launch.width_class(K))
    config = table.config("depthwise_separable_fprop", *classes)
    if depthwise.input.dtype == torch.float64 or triton.cdiv(K, config["BLOCK_N"]) > _MOST_COLUMNS:
        return _conv.convolve(pointwise._replace(input=_conv.convolve(depthwise)))
    return _fused(depthwise, pointwise, config)


def _fused(depthwise: FusedConvolution, pointwise: FusedConvolution, config: table.Config) -> Tensor:
    input, weight, (stride, padding, dilation, groups) = depthwise.input, depthwise.weight, depthwise.geometry
    (K, C), (_, _, R, S), (N, _, P, Q) = pointwise.weight.shape[:2], weight.shape, pointwise.input.shape
    # eager's layout follows from that of its depthwise result
    hidden_layout = launch.convolution_layout(input, weight, depthwise.geometry)
    hidden = torch.empty_like(pointwise.input, memory_format=hidden_layout)
    if depthwise.activation == "relu":
        hidden = with_plain_strides(hidden)
    output = launch.new_output(hidden, pointwise.weight, POINTWISE, pointwise.activation == "relu")
    taps = _depthwise.by_taps(weight)
    launch.launch(
        depthwise_separable_fprop,
        triton.cdiv(N * P * Q, config["BLOCK_M"]) * triton.cdiv(K, config["BLOCK_N"]),
        input,
        taps,
        None if depthwise.bias is None else depthwise.bias.contiguous(),
        pointwise.weight.reshape(K, C).contiguous(),
        None if pointwise.bias is None else pointwise.bias.contiguous(),
        output,
        N * P * Q, C, *input.shape[2:], K, P, Q,
        *input.stride(), *taps.stride(), *output.stride(),
        *stride, *padding, *dilation,
        M=C // groups, R=R, S=S, UNROLL=R * S <= _depthwise.UNROLLED_TAPS,
        PADDED=any(padding),
        DEPTHWISE_ACTIVATION=depthwise.activation,
        POINTWISE_ACTIVATION=pointwise.activation,
        PRECISION=launch.precision(),
        WIDE=launch.wide(input, output),
        **config,
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

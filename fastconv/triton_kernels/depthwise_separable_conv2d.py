"""Depthwise convolution and the 1x1 convolution after it in one kernel: what lies between them never leaves the chip.

    h[m, c] = depthwise_activation(sum over (r, s)  x[pixel(m) + tap(r, s), c // M] * d[c, r, s]  +  depthwise_bias[c])
    y[m, k] = pointwise_activation(sum over c  h[m, c] * w[k, c]  +  pointwise_bias[k])

A program owns a tile of pixels x output channels. For one block of channels after the other it makes h with the loop of
`_depthwise`, rounds it to the inputs' dtype as eager does, and multiplies it. h is made once for each tile of columns:
beyond `_MOST_COLUMNS` of these that costs more than writing and reading it, and two kernels run instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..operators import checks, convolution
from . import _conv, _depthwise, launch, table
from ._depthwise import depthwise_tile
from ._device import activate, dot, index, narrow, pixel, widen
from .samples import Maker, Sample, sample

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


def depthwise_separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    depthwise_activation: str,
    pointwise_activation: str,
) -> Tensor:
    """`fastconv.ops.depthwise_separable_conv2d`: input [N, C, H, W], weights [C * M, 1, R, S] and [K, C * M, 1, 1].

    Returns [N, K, P, Q]. float16, bfloat16 and float32; float64 by the aten composition.
    """
    op = "depthwise_separable_conv2d"
    checks.activation(op, depthwise_activation)
    checks.activation(op, pointwise_activation)
    groups = checks.depthwise_weight(op, "depthwise_weight", input, depthwise_weight)
    checks.pointwise_weight(op, "pointwise_weight", pointwise_weight)
    depthwise: _conv.Geometry = (stride, padding, dilation, groups)
    checks.conv2d(op, input, depthwise_weight, depthwise_bias, None, *depthwise, checks.OF_DEPTHWISE)
    hidden = _hidden_size(input, depthwise_weight, depthwise)
    checks.conv2d(op, hidden, pointwise_weight, pointwise_bias, None, *_conv.POINTWISE, checks.OF_POINTWISE)
    config = table.config(
        "depthwise_separable_fprop", launch.dtype_class(input), launch.width_class(pointwise_weight.shape[0])
    )
    columns = triton.cdiv(pointwise_weight.shape[0], config["BLOCK_N"])
    if input.dtype == torch.float64 or columns > _MOST_COLUMNS:
        hidden = _conv.convolve(input, depthwise_weight, depthwise_bias, None, depthwise, depthwise_activation)
        return _conv.convolve(hidden, pointwise_weight, pointwise_bias, None, _conv.POINTWISE, pointwise_activation)
    (K, C), (_, _, R, S), (N, _, P, Q) = pointwise_weight.shape[:2], depthwise_weight.shape, hidden.shape
    # eager's layout follows from that of its depthwise result
    hidden_layout = launch.convolution_layout(input, depthwise_weight, depthwise)
    between = torch.empty_like(hidden, memory_format=hidden_layout)
    if depthwise_activation == "relu":
        between = convolution.with_plain_strides(between)
    output = launch.new_output(between, pointwise_weight, _conv.POINTWISE, pointwise_activation == "relu")
    taps = _depthwise.by_taps(depthwise_weight)
    launch.launch(
        depthwise_separable_fprop,
        triton.cdiv(N * P * Q, config["BLOCK_M"]) * columns,
        input,
        taps,
        None if depthwise_bias is None else depthwise_bias.contiguous(),
        pointwise_weight.reshape(K, C).contiguous(),
        None if pointwise_bias is None else pointwise_bias.contiguous(),
        output,
        N * P * Q, C, *input.shape[2:], K, P, Q,
        *input.stride(), *taps.stride(), *output.stride(),
        *stride, *padding, *dilation,
        M=C // groups, R=R, S=S, UNROLL=R * S <= _depthwise.UNROLLED_TAPS,
        PADDED=any(padding),
        DEPTHWISE_ACTIVATION=depthwise_activation,
        POINTWISE_ACTIVATION=pointwise_activation,
        PRECISION=launch.precision(),
        WIDE=launch.wide(input, output),
        **config,
    )  # fmt: skip
    return output


def _hidden_size(input: Tensor, weight: Tensor, geometry: _conv.Geometry) -> Tensor:
    """The depthwise result's shape, on the input's device and in its dtype, without the memory."""
    shape = (input.shape[0], weight.shape[0], *launch.output_pixels(input, weight, geometry))
    return input.new_empty(1).expand(shape)


def depthwise_separable_conv2d_backward(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    depthwise_activation: str,
    pointwise_activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five tensors, in their order. The depthwise result is computed again.

    float16, bfloat16 and float32; float64 by the aten composition.
    """
    op = "depthwise_separable_conv2d_backward"
    checks.activation(op, depthwise_activation)
    checks.activation(op, pointwise_activation)
    _conv.needs_output(op, output, pointwise_activation)
    groups = checks.depthwise_weight(op, "depthwise_weight", input, depthwise_weight)
    checks.pointwise_weight(op, "pointwise_weight", pointwise_weight)
    depthwise: _conv.Geometry = (stride, padding, dilation, groups)
    checks.conv2d(op, input, depthwise_weight, depthwise_bias, None, *depthwise, checks.OF_DEPTHWISE)
    hidden = _hidden_size(input, depthwise_weight, depthwise)
    checks.conv2d(op, hidden, pointwise_weight, None, grad_output, *_conv.POINTWISE, checks.OF_POINTWISE)
    hidden = _conv.convolve(input, depthwise_weight, depthwise_bias, None, depthwise, depthwise_activation)
    wants_depthwise = output_mask[0] or output_mask[1] or output_mask[3]
    grad_hidden, grad_pointwise, grad_pointwise_bias, _ = _conv.conv2d_backward(
        grad_output, output, hidden, pointwise_weight, *_conv.POINTWISE, pointwise_activation,
        [wants_depthwise, output_mask[2], output_mask[4], False],
    )  # fmt: skip
    empty = convolution.empty_gradient(input)
    if not wants_depthwise:
        return empty, empty.clone(), grad_pointwise, empty.clone(), grad_pointwise_bias
    grad_input, grad_depthwise, grad_depthwise_bias, _ = _conv.conv2d_backward(
        grad_hidden, hidden, input, depthwise_weight, *depthwise, depthwise_activation,
        [output_mask[0], output_mask[1], output_mask[3], False],
    )  # fmt: skip
    return grad_input, grad_depthwise, grad_pointwise, grad_depthwise_bias, grad_pointwise_bias


@sample("depthwise_separable_fprop")
def _sample(make: Maker) -> Sample:
    channels = 256
    same = ([1, 1], [1, 1], [1, 1])

    def run(x: Tensor, d: Tensor, w: Tensor) -> list[Tensor]:
        return [depthwise_separable_conv2d(x, d, w, None, None, *same, "relu6", "none")]

    def reference(x: Tensor, d: Tensor, w: Tensor) -> list[Tensor]:
        return [F.conv2d(F.relu6(F.conv2d(x, d, None, *same, channels)), w)]

    x, d = make.images(channels, shrink=2), make.filters(channels, 1, 3)
    return Sample((x, d, make.filters(make.width, channels)), run, reference)

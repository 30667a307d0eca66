"""Convolution + bias + ReLU in one op."""

from __future__ import annotations

from torch import Tensor

from ..aten_kernels import OPERATORS
from ..operators import arguments, checks
from ..operators.convolution_operators import rules
from ..operators.registration import OutOperator

_NAME = "conv2d_relu"


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: arguments.Size2 = 1,
    padding: arguments.Padding = 0,
    dilation: arguments.Size2 = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``relu(conv2d(input, weight, bias))`` without a pass of its own for bias or ReLU.

    The backward saves what eager's convolution followed by an in-place ReLU saves: input, weight
    and output, whose sign is the ReLU's mask. Differentiable twice.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16, in any memory
            layout.
        weight: [K, C / groups, R, S], dtype and device of `input`.
        bias: [K] or None.
        stride: int or (height, width), at least 1.
        padding: int or (height, width), at least 0; or ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: int or (height, width), at least 1.
        groups: divides C and K.
        activation: ``"relu"``, or ``"relu6"`` for min(max(v, 0), 6); ``"none"`` for the plain
            convolution.
        backend: see :func:`fastconv.use_backend`.
        out: where the result goes, of its shape, dtype and device: a slice of the channels of a
            concatenation, say. Overlaps neither itself nor another argument, and nothing may
            require grad. CUDA and Triton kernels write it in place; CUDA's only where its channels
            lie side by side, as in channels_last and slices of that, and a residual has its
            strides. Elsewhere, on the CPU too, the result is copied there.

    Returns:
        [N, K, P, Q] with P = (H + 2 * padding - dilation * (R - 1) - 1) // stride + 1, Q likewise;
        the memory layout is that of ``torch.nn.functional.conv2d``. 16-bit types are accumulated in
        float32. `out` itself, if it was given.

    Raises:
        RuntimeError: an argument does not fit, or one requires grad beside `out`; the message names
            what arrived and what was needed.

    Source: Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural
    Networks", section 3.1 (ReLU); Howard et al. 2017, "MobileNets" (ReLU6).
    """
    arguments.tensors(_NAME, input=input, weight=weight)
    arguments.optional_tensors(_NAME, bias=bias, out=out)
    checks.activation(_NAME, activation)
    groups = arguments.count(_NAME, "groups", groups, checks.DENSE)
    input, unbatch, stride, padding, dilation = arguments.geometry(_NAME, input, weight, stride, padding, dilation)
    destination = arguments.batch_like(_NAME, unbatch, "out", out)
    found = _operator.run(backend, input, weight, bias, stride, padding, dilation, groups, activation, out=destination)
    return unbatch(found) if out is None else out


_operator = OutOperator(_NAME, reference=OPERATORS[_NAME], **rules(_NAME))

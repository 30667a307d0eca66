"""Depthwise convolution + bias + activation in one op."""

from __future__ import annotations

from torch import Tensor

from ..aten_kernels import OPERATORS
from ..operators import arguments, checks
from ..operators.convolution_operators import rules
from ..operators.registration import PublicOperator

_NAME = "depthwise_conv2d"


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: arguments.Size2 = 1,
    padding: arguments.Padding = 0,
    dilation: arguments.Size2 = 1,
    *,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """``activation(conv2d(input, weight, bias, groups=C))``: every channel has filters of its own.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16, in any memory
            layout.
        weight: [C * M, 1, R, S] with the channel multiplier M, dtype and device of `input`. Filters
            c * M to c * M + M - 1 read channel c.
        bias: [C * M] or None.
        stride: int or (height, width), at least 1.
        padding: int or (height, width), at least 0; or ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: int or (height, width), at least 1.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        backend: see :func:`fastconv.use_backend`.

    Returns:
        [N, C * M, P, Q] with P = (H + 2 * padding - dilation * (R - 1) - 1) // stride + 1, Q
        likewise; the memory layout is that of ``torch.nn.functional.conv2d``. 16-bit types are
        accumulated in float32.

    Raises:
        RuntimeError: an argument does not fit; the message names what arrived and what was needed.

    Source: Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile
    Vision Applications", equation 3; Chollet 2017, "Xception" (channel multiplier 1).
    """
    arguments.tensors(_NAME, input=input, weight=weight)
    arguments.optional_tensors(_NAME, bias=bias)
    checks.activation(_NAME, activation)
    input, unbatch, stride, padding, dilation = arguments.geometry(_NAME, input, weight, stride, padding, dilation)
    return unbatch(_operator.run(backend, input, weight, bias, stride, padding, dilation, activation))


_operator = PublicOperator(_NAME, reference=OPERATORS[_NAME], **rules(_NAME))

"""1x1 convolution with bias, residual and activation in one op: the bottleneck's."""

from __future__ import annotations

from torch import Tensor

from ..aten_kernels import OPERATORS
from ..operators import arguments, checks
from ..operators.convolution_operators import rules
from ..operators.registration import OutOperator

_NAME = "pointwise_conv2d"


def pointwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: arguments.Size2 = 1,
    *,
    activation: str = "none",
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``activation(conv2d(input, weight, bias) + residual)`` with a 1x1 filter: a matrix product
    over pixels.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16, in any memory
            layout.
        weight: [K, C, 1, 1], dtype and device of `input`.
        bias: [K] or None.
        residual: the shape of the result, dtype and device of `input`, or None; it is not
            broadcast.
        stride: int or (height, width), at least 1.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
        backend: see :func:`fastconv.use_backend`.
        out: where the result goes, see :func:`conv2d_relu`.

    Returns:
        [N, K, P, Q] with P = (H - 1) // stride + 1, Q likewise; the memory layout is that of
        ``torch.nn.functional.conv2d``. 16-bit types are accumulated in float32 and rounded once.
        `out` itself, if it was given.

    Raises:
        RuntimeError: an argument does not fit, or one requires grad beside `out`; the message names
            what arrived and what was needed.

    Source: Lin et al. 2013, "Network In Network"; He et al. 2016, "Deep Residual Learning for Image
    Recognition", figure 5 (bottleneck).
    """
    arguments.tensors(_NAME, input=input, weight=weight)
    arguments.optional_tensors(_NAME, bias=bias, residual=residual, out=out)
    checks.activation(_NAME, activation)
    input, unbatch = arguments.batch(_NAME, input)
    stride = arguments.within(input, arguments.pair(_NAME, "stride", stride, 1), [0, 0])
    added, destination = (
        arguments.batch_like(_NAME, unbatch, "residual", residual),
        arguments.batch_like(_NAME, unbatch, "out", out),
    )
    found = _operator.run(backend, input, weight, bias, added, stride, activation, out=destination)
    return unbatch(found) if out is None else out


_operator = OutOperator(_NAME, reference=OPERATORS[_NAME], **rules(_NAME))

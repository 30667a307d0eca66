"""Convolution + bias + residual + ReLU in one op: the end of a residual block."""

from __future__ import annotations

from torch import Tensor

from ..aten_kernels import OPERATORS
from ..operators import arguments, checks
from ..operators.convolution_operators import rules
from ..operators.registration import OutOperator

_NAME = "conv2d_add_relu"


def conv2d_add_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: arguments.Size2 = 1,
    padding: arguments.Padding = 0,
    dilation: arguments.Size2 = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``relu(conv2d(input, weight, bias) + residual)``: the residual is added in the convolution's
    epilogue.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16, in any memory
            layout.
        weight: [K, C / groups, R, S], dtype and device of `input`.
        bias: [K] or None.
        residual: the shape of the result, dtype and device of `input`; it is not broadcast.
        stride, padding, dilation, groups: as for :func:`conv2d_relu`.
        activation: ``"relu"``, ``"relu6"``, or ``"none"`` for the sum alone.
        backend: see :func:`fastconv.use_backend`.
        out: where the result goes, see :func:`conv2d_relu`.

    Returns:
        [N, K, P, Q] as for :func:`conv2d_relu`. In 16-bit types the sum is rounded once, where
        eager rounds the convolution and then the sum. `out` itself, if it was given.

    Raises:
        RuntimeError: an argument does not fit, or one requires grad beside `out`; the message names
            what arrived and what was needed.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", equation 1 with the ReLU
    after it.
    """
    arguments.tensors(_NAME, input=input, weight=weight, residual=residual)
    arguments.optional_tensors(_NAME, bias=bias, out=out)
    checks.activation(_NAME, activation)
    groups = arguments.count(_NAME, "groups", groups, checks.DENSE)
    input, unbatch, stride, padding, dilation = arguments.geometry(_NAME, input, weight, stride, padding, dilation)
    added, destination = (
        arguments.batch_like(_NAME, unbatch, "residual", residual),
        arguments.batch_like(_NAME, unbatch, "out", out),
    )
    found = _operator.run(
        backend, input, weight, bias, added, stride, padding, dilation, groups, activation, out=destination
    )
    return unbatch(found) if out is None else out


_operator = OutOperator(_NAME, reference=OPERATORS[_NAME], **rules(_NAME))

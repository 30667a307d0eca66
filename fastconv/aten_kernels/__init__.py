"""All operators by torch's own kernels, forward and backward: what they mean, and what a user has without this package.

Functions of exactly the arguments of `fastconv.operators.schemas`, on any device, in float16, bfloat16, float32 and
float64, for any strides. In float64 they are the oracle of every other implementation, in the same dtype the baseline;
and `fastconv.aten_kernels.cudnn` falls back on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..operators.convolution import by_aten
from . import backward, forward
from .forward import with_out

OPERATORS: dict[str, Callable[..., Any]] = with_out(
    {
        **forward.of_convolutions(by_aten),
        "add_relu": forward.add_relu,
        "local_response_norm": forward.local_response_norm,
        **backward.OPERATORS,
    }
)

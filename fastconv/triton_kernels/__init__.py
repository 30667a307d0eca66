"""The ops in Triton: ``torch.ops.fastconv_triton``, imported when the backend "triton" is first asked for.

One file per op with its kernel and launcher, whose functions have the arguments of csrc/schemas.cpp. Registered as
opaque operators for CUDA tensors, and under Triton's interpreter (TRITON_INTERPRET=1) for CPU tensors; fake kernels,
gradients, autocast and vmap come from `fastconv.ops`, as for every namespace. Which kernels a call launches, and with
what block sizes, `fastconv.triton_kernels.launch.recorded` lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..operators import registration
from ..operators.schemas import SCHEMAS, WITH_OUT
from . import launch
from ._conv import conv2d_backward
from .add_relu import add_relu, add_relu_backward
from .conv2d_add_relu import conv2d_add_relu
from .conv2d_relu import conv2d_relu
from .depthwise_conv2d import depthwise_conv2d
from .depthwise_separable_conv2d import depthwise_separable_conv2d, depthwise_separable_conv2d_backward
from .local_response_norm import local_response_norm, local_response_norm_backward
from .pointwise_conv2d import pointwise_conv2d
from .pointwise_conv2d_group import pointwise_conv2d_group, pointwise_conv2d_group_backward

NAMESPACE = "fastconv_triton"

OPERATORS: dict[str, Any] = {
    function.__name__: function
    for function in (
        add_relu,
        add_relu_backward,
        conv2d_add_relu,
        conv2d_backward,
        conv2d_relu,
        depthwise_conv2d,
        depthwise_separable_conv2d,
        depthwise_separable_conv2d_backward,
        local_response_norm,
        local_response_norm_backward,
        pointwise_conv2d,
        pointwise_conv2d_group,
        pointwise_conv2d_group_backward,
    )
}


def _into_the_last(function: Callable[..., Any]) -> Callable[..., None]:
    def kernel(*args: Any) -> None:
        *given, out = args
        function(*given, out=out)

    return kernel


OPERATORS.update({f"{name}.out": _into_the_last(OPERATORS[name]) for name in WITH_OUT})

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _function in OPERATORS.items():
    _library.define(_name + SCHEMAS[_name])
    _library.impl(_name, _function, "CUDA")
    if launch.INTERPRETED:
        _library.impl(_name, _function, "CPU")
registration.add_namespace(NAMESPACE)

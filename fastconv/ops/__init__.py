"""The ops as functions, every one differentiable twice; see the table in the README."""

from ..operators import cuda_by_triton, library
from .add_relu import add_relu
from .conv2d_add_relu import conv2d_add_relu
from .conv2d_relu import conv2d_relu
from .depthwise_conv2d import depthwise_conv2d
from .depthwise_separable_conv2d import depthwise_separable_conv2d
from .local_response_norm import local_response_norm
from .pointwise_conv2d import pointwise_conv2d
from .pointwise_conv2d_group import pointwise_conv2d_group

__all__ = [
    "add_relu",
    "conv2d_add_relu",
    "conv2d_relu",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
    "local_response_norm",
    "pointwise_conv2d",
    "pointwise_conv2d_group",
]

if cuda_by_triton.needed():
    cuda_by_triton.register("fastconv", define=not library.LOADED)

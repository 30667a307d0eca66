"""The ops as modules: subclasses of torch.nn's where it has one, same state_dict."""

from .add_relu import AddReLU
from .conv2d_add_relu import Conv2dAddReLU
from .conv2d_relu import Conv2dReLU
from .depthwise_conv2d import DepthwiseConv2d
from .depthwise_separable_conv2d import DepthwiseSeparableConv2d
from .local_response_norm import LocalResponseNorm
from .pointwise_conv2d import PointwiseConv2d
from .pointwise_conv2d_group import PointwiseConv2dGroup

__all__ = [
    "AddReLU",
    "Conv2dAddReLU",
    "Conv2dReLU",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv2d",
    "LocalResponseNorm",
    "PointwiseConv2d",
    "PointwiseConv2dGroup",
]

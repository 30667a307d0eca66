"""cuDNN's fused convolutions, as torch has them: ``torch.ops.fastconv_cudnn``, imported when the backend "cudnn" is
first asked for.

torch has two that no layer of its own runs: convolution + bias (+ residual) + ReLU in one kernel. The forwards take
these where they compute the op (`is_fused`) and where cuDNN has an engine; all else is aten's, gradients included.
Factors are rounded to TF32 as the switches of torch.backends.cudnn say.

Whether NaN goes through their ReLU as it goes through torch's is up to cuDNN's engine, and for some shapes it may come
out as 0: that is found out where they are qualified, not here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..operators import registration
from ..operators.activations import with_plain_strides
from ..operators.convolution import FusedConvolution, by_aten, output_shape
from ..operators.schemas import SCHEMAS
from . import OPERATORS as BY_ATEN
from .forward import of_convolutions, with_out

NAMESPACE = "fastconv_cudnn"

# cuDNN adds up in float32, also what is float64.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Elements of a tensor. Beyond them torch splits the batch of a plain convolution, but not of a fused one.
_MOST = 2**31 - 1
# What torch's errors say where cuDNN computes no such convolution; it is also what is heard of too little memory.
_NO_ENGINE = ("unable to find an engine", "NOT_SUPPORTED")
# The search for one takes long, and torch does not keep that it failed.
without_engine: set[Any] = set()


def is_fused(conv: FusedConvolution) -> bool:
    """Whether `fused` computes this convolution, where cuDNN has an engine for it.

    Not where torch is to be deterministic, as the fused operators do not ask for engines that are; with
    ``warn_only=True`` it may be otherwise.
    """
    shapes = (conv.input.shape, conv.weight.shape, output_shape(conv.input.shape, conv.weight.shape, conv.geometry))
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return (
        conv.activation == "relu"
        and conv.input.dtype in _DTYPES
        and torch.backends.cudnn.enabled
        and not (strict or torch.backends.cudnn.deterministic)
        and all(0 < math.prod(shape) <= _MOST for shape in shapes)
    )


def fused(conv: FusedConvolution) -> Tensor:
    """relu(conv2d(input, weight) + bias + residual), for which `is_fused` says yes, in the layout of
    torch.nn.functional.conv2d.

    Raises:
        RuntimeError: cuDNN has no engine for it.
    """
    input, weight, bias, residual, geometry, _ = conv
    # torch keeps cuDNN's plan for other calls of these shapes, whatever the stride of the bias for which it was made
    bias = None if bias is None else bias.contiguous()
    if residual is None:
        return with_plain_strides(torch.cudnn_convolution_relu(input, weight, bias, *geometry))
    return with_plain_strides(torch.cudnn_convolution_add_relu(input, weight, residual, 1.0, bias, *geometry))


def convolve(conv: FusedConvolution) -> Tensor:
    """The convolution after the checks."""
    if not is_fused(conv):
        return by_aten(conv)
    call = _call(conv)
    if call not in without_engine:
        try:
            return fused(conv)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_ENGINE):
                raise
            without_engine.add(call)
    return by_aten(conv)


def _call(conv: FusedConvolution) -> tuple[Any, ...]:
    """On what it depends whether there is an engine."""
    stride, padding, dilation, groups = conv.geometry
    layouts = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (conv.input, conv.weight)]
    numbers = (*conv.input.shape, *conv.weight.shape, *stride, *padding, *dilation, groups, *layouts)
    return conv.input.device, conv.input.dtype, conv.residual is None, numbers


OPERATORS = with_out({**BY_ATEN, **of_convolutions(convolve)})

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _function in OPERATORS.items():
    _library.define(_name + SCHEMAS[_name])
    _library.impl(_name, _function, "CUDA")
registration.add_namespace(NAMESPACE)

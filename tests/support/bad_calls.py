"""Calls that must be refused, where they are made, and what the one error says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from support.kernel_backends import device_of

BACKENDS = ["cpu", "cuda-emulated", "triton", "reference"]


@dataclass(frozen=True)
class Bad:
    """The first case of an op with some arguments changed, and the message that must come."""

    op: str
    changes: dict[str, Any]
    message: str

    def __str__(self) -> str:
        return f"{self.op}-{'-'.join(self.changes)}-{self.message[:40]}"


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of ones."""
    return torch.ones(shape, dtype=dtype)


# the first cases: conv2d_relu 2,3,5,4 * 4,3,3,3 padding 1; pointwise 2,3,3,4 * 5,3,1,1; see cases.py
TABLE = [
    Bad("conv2d_relu", {"input": t(5, 4)}, "got input of shape [5, 4], needed 4 dimensions (N, C, H, W); reshape it"),
    Bad(
        "conv2d_relu",
        {"weight": t(4, 27)},
        "got weight of shape [4, 27], needed 4 dimensions (K, C / groups, R, S); reshape it",
    ),
    Bad(
        "conv2d_relu",
        {"input": t(2, 5, 5, 4)},
        "got 5 channels in input of shape [2, 5, 5, 4], needed 3 (weight.shape[1] 3 x groups 1); "
        "change input, weight or groups",
    ),
    Bad(
        "conv2d_relu",
        {"groups": 3},
        "got 4 output channels in weight of shape [4, 3, 3, 3], needed a multiple of groups 3; change weight or groups",
    ),
    Bad(
        "conv2d_relu",
        {"groups": 2},
        "got 3 channels in input of shape [2, 3, 5, 4], needed 6 (weight.shape[1] 3 x groups 2); "
        "change input, weight or groups",
    ),
    Bad("conv2d_relu", {"groups": 0}, "got groups 0, needed at least 1; pass groups=1 for a dense convolution"),
    Bad(
        "conv2d_relu",
        {"input": t(2, 3, 5, 4, dtype=torch.int32)},
        "got input of dtype int32, needed float32, float64, bfloat16 or float16; convert it with input.float()",
    ),
    Bad(
        "conv2d_relu",
        {"input": t(2, 3, 5, 4, dtype=torch.complex64)},
        "got input of dtype complex64, needed float32, float64, bfloat16 or float16; convert it with input.float()",
    ),
    Bad(
        "conv2d_relu",
        {"weight": t(4, 3, 3, 3, dtype=torch.float64)},
        "got weight of dtype float64 beside input of dtype float32, needed one dtype; "
        "convert it with weight.to(input.dtype)",
    ),
    Bad(
        "conv2d_relu",
        {"bias": t(4, dtype=torch.bfloat16)},
        "got bias of dtype bfloat16 beside input of dtype float32, needed one dtype; "
        "convert it with bias.to(input.dtype)",
    ),
    Bad(
        "conv2d_relu",
        {"bias": t(3)},
        "got bias of shape [3], needed [4], one value for each output channel; reshape it",
    ),
    Bad(
        "conv2d_relu",
        {"bias": t(4, 1, 1)},
        "got bias of shape [4, 1, 1], needed [4], one value for each output channel; reshape it",
    ),
    Bad(
        "conv2d_relu",
        {"stride": (1, 0)},
        "got stride [1, 0], needed at least 1 in both directions; pass a larger stride",
    ),
    Bad(
        "conv2d_relu",
        {"padding": -1},
        "got padding [-1, -1], needed at least 0 in both directions; pass a larger padding",
    ),
    Bad(
        "conv2d_relu",
        {"dilation": (0, 1)},
        "got dilation [0, 1], needed at least 1 in both directions; pass a larger dilation",
    ),
    Bad(
        "conv2d_relu",
        {"stride": (1, 1, 1)},
        "got stride [1, 1, 1], needed two integers (height, width); pass an int or a pair",
    ),
    Bad(
        "conv2d_relu",
        {"dilation": (1, 4)},
        "got a filter that spans 9 pixels over a padded width of 6, needed at most that; "
        "add padding or shrink the filter",
    ),
    Bad(
        "conv2d_relu",
        {"weight": t(4, 3, 9, 3)},
        "got a filter that spans 9 pixels over a padded height of 7, needed at most that; "
        "add padding or shrink the filter",
    ),
    Bad(
        "conv2d_relu",
        {"weight": t(4, 3, 0, 3)},
        "got weight of shape [4, 3, 0, 3], needed at least one filter element; pass a non-empty weight",
    ),
    Bad(
        "conv2d_relu",
        {"activation": "gelu"},
        "got activation 'gelu', needed 'none', 'relu' or 'relu6'; apply other activations after the op",
    ),
    Bad(
        "conv2d_add_relu",
        {"residual": t(2, 4, 5, 5)},
        "got residual of shape [2, 4, 5, 5], needed [2, 4, 5, 4], the shape of the convolution's "
        "output; expand it first",
    ),
    Bad(
        "conv2d_add_relu",
        {"residual": t(4, 1, 1)},
        "got residual of shape [4, 1, 1], needed [2, 4, 5, 4], the shape of the convolution's output; expand it first",
    ),
    Bad(
        "conv2d_add_relu",
        {"residual": t(2, 4, 5, 4, dtype=torch.float16)},
        "got residual of dtype float16 beside input of dtype float32, needed one dtype; "
        "convert it with residual.to(input.dtype)",
    ),
    Bad(
        "pointwise_conv2d",
        {"weight": t(5, 3, 3, 3)},
        "got weight of shape [5, 3, 3, 3], needed [K, C, 1, 1]; use conv2d_relu for larger filters",
    ),
    Bad(
        "pointwise_conv2d",
        {"weight": t(5, 3)},
        "got weight of shape [5, 3], needed [K, C, 1, 1]; use conv2d_relu for larger filters",
    ),
    Bad(
        "pointwise_conv2d",
        {"stride": 0},
        "got stride [0, 0], needed at least 1 in both directions; pass a larger stride",
    ),
    Bad(
        "pointwise_conv2d_group",
        {"weights": []},
        "got 0 weights and 2 biases, needed at least one weight and as many biases; use None for no bias",
    ),
    Bad(
        "pointwise_conv2d_group",
        {"biases": [t(2)]},
        "got 2 weights and 1 biases, needed at least one weight and as many biases; use None for no bias",
    ),
    Bad(
        "pointwise_conv2d_group",
        {"weights": [t(2, 3, 1, 1), t(4, 3, 1, 3)]},
        "got weights[1] of shape [4, 3, 1, 3], needed [K, C, 1, 1]; use conv2d_relu for larger filters",
    ),
    Bad(
        "depthwise_conv2d",
        {"weight": t(6, 3, 3, 3)},
        "got weight of shape [6, 3, 3, 3], needed [3 * multiplier, 1, R, S] for input of shape "
        "[2, 3, 5, 4]; use conv2d_relu for other groups",
    ),
    Bad(
        "depthwise_conv2d",
        {"weight": t(7, 1, 3, 3)},
        "got weight of shape [7, 1, 3, 3], needed [3 * multiplier, 1, R, S] for input of shape "
        "[2, 3, 5, 4]; use conv2d_relu for other groups",
    ),
    Bad(
        "depthwise_separable_conv2d",
        {"depthwise_weight": t(4, 1, 3, 3)},
        "got depthwise_weight of shape [4, 1, 3, 3], needed [3 * multiplier, 1, R, S] for input of "
        "shape [2, 3, 4, 4]; use conv2d_relu for other groups",
    ),
    Bad(
        "depthwise_separable_conv2d",
        {"pointwise_weight": t(4, 5, 1, 1)},
        "got 6 channels in input of shape [2, 6, 4, 4], needed 5 (pointwise_weight.shape[1] 5 x groups 1); "
        "change input, pointwise_weight or groups",
    ),
    Bad(
        "depthwise_separable_conv2d",
        {"depthwise_activation": "swish"},
        "got activation 'swish', needed 'none', 'relu' or 'relu6'; apply other activations after the op",
    ),
    Bad(
        "add_relu",
        {"input": t(3, 5).long(), "other": t(3, 5).long()},
        "got input of dtype int64, needed float32, float64, bfloat16 or float16; convert it with input.float()",
    ),
    Bad(
        "local_response_norm",
        {"input": t(6, 3)},
        "got input of shape [6, 3], needed at least 3 dimensions (N, C, ...); reshape it",
    ),
    Bad("local_response_norm", {"size": 0}, "got size 0, needed at least 1; pass the number of channels to sum over"),
    Bad(
        "local_response_norm",
        {"activation": "gelu"},
        "got activation 'gelu', needed 'none', 'relu' or 'relu6'; apply other activations after the op",
    ),
    Bad(
        "local_response_norm",
        {"input": t(2, 6, 3, dtype=torch.uint8)},
        "got input of dtype uint8, needed float32, float64, bfloat16 or float16; convert it with input.float()",
    ),
]


def on_place(where: str, arguments: Any) -> tuple[str | None, Any]:
    """The backend to ask for, and the arguments as it takes them."""
    if where == "meta":
        move = partial(torch.empty_strided, device="meta")
        return None, tree_map_only(Tensor, lambda x: move(x.shape, x.stride(), dtype=x.dtype), arguments)
    if where == "fake":
        return None, tree_map_only(Tensor, FakeTensorMode().from_tensor, arguments)
    device_of(where)
    return where, arguments


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        call()
    return str(caught.value)


def check_words(op: str, found: str) -> None:
    """One error: the op, what arrived, what was needed and the remedy, in few words."""
    assert re.match(rf"fastconv::{op}: got .+, needed .+; .+", found), found
    assert len(found) <= 400, found


def in_fake(arguments: dict[str, Any]) -> dict[str, Any]:
    mode = FakeTensorMode()

    def fake(x: Tensor) -> Tensor:
        return mode.from_tensor(x) if (x.layout, x.is_nested, x.is_quantized) == (torch.strided, False, False) else x

    return tree_map_only(Tensor, fake, arguments)

"""One table of bad arguments, run against the CPU kernel, fake tensors and the reference alike.

Each message names the op, what arrived, what was needed and the remedy; the words are the same
everywhere.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastconv import nn, ops, use_backend
from fastconv.operators import backends
from support.bad_calls import Bad, on_place, t
from support.cases import FIRST, named, run

# the first cases: conv2d_relu 2,3,5,4 * 4,3,3,3 padding 1; pointwise 2,3,3,4 * 5,3,1,1; see support/cases.py
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


@pytest.mark.parametrize("where", ["cpu", "fake", "meta", "reference"])
@pytest.mark.parametrize("bad", TABLE, ids=str)
def test_bad_arguments(bad: Bad, where: str) -> None:
    backend, arguments = on_place(where, {**FIRST[bad.op].arguments(), **bad.changes})
    with pytest.raises(RuntimeError, match=re.escape(f"fastconv::{bad.op}: {bad.message}")):
        run(bad.op, arguments, backend=backend if where == "reference" else None)


@pytest.mark.parametrize("op", ["conv2d_relu", "conv2d_add_relu", "pointwise_conv2d"])
def test_two_devices(op: str) -> None:
    """No second device here but meta, which the fake kernel serves."""
    arguments = named(op)[0].arguments()
    arguments["weight"] = arguments["weight"].to("meta")
    message = f"fastconv::{op}: got weight on meta beside input on cpu, needed one device; move it"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run(op, arguments)


def test_padding_by_name() -> None:
    x, w = t(1, 2, 5, 5), t(3, 2, 3, 3)
    with pytest.raises(RuntimeError, match="got padding 'full', needed integers, 'same' or 'valid'"):
        ops.conv2d_relu(x, w, padding="full")
    with pytest.raises(RuntimeError, match=r"got padding 'same' with stride \[2, 2\], needed stride 1"):
        ops.conv2d_relu(x, w, stride=2, padding="same")


def test_shapes_that_do_not_broadcast() -> None:
    with pytest.raises(RuntimeError, match=r"got other of shape \[2, 4\] beside input of shape \[2, 3\]"):
        ops.add_relu(t(2, 3), t(2, 4))


def test_same_shape_of_the_operator() -> None:
    """Callers of torch.ops get no broadcasting, and no reading out of bounds."""
    with pytest.raises(RuntimeError, match=r"got other of shape \[3\] beside input of shape \[2, 3\]"):
        torch.ops.fastconv.add_relu(t(2, 3), t(3), "relu")


# input, both weights, the depthwise bias and the geometry of a backward whose grad_output is 1,3,3,3
SEPARABLE = (t(1, 2, 5, 5), t(2, 1, 3, 3), t(3, 2, 1, 1), None, [1, 1], [0, 0], [1, 1])


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        (
            "conv2d_backward",
            (t(1, 3, 3, 3), None, t(1, 2, 5, 5), t(3, 2, 3, 3), [1, 1], [0, 0], [1, 1], 1, "relu"),
            "got no output, needed it for the activation's mask",
        ),
        (
            "conv2d_backward",
            (t(1, 3, 4, 3), None, t(1, 2, 5, 5), t(3, 2, 3, 3), [1, 1], [0, 0], [1, 1], 1, "none"),
            "got grad_output of shape [1, 3, 4, 3], needed [1, 3, 3, 3]",
        ),
        (
            "depthwise_separable_conv2d_backward",
            (t(1, 3, 3, 3), None, *SEPARABLE, "none", "relu"),
            "got no output, needed it for the activation's mask",
        ),
        (
            "depthwise_separable_conv2d_backward",
            (t(1, 3, 3, 3), t(1, 3, 3, 2), *SEPARABLE, "none", "relu"),
            "got output of shape [1, 3, 3, 2] beside input of shape [1, 3, 3, 3], needed one shape",
        ),
        (
            "depthwise_separable_conv2d_backward",
            (t(1, 3, 4, 3), None, *SEPARABLE, "relu", "none"),
            "got grad_output of shape [1, 3, 4, 3], needed [1, 3, 3, 3]",
        ),
        (
            "pointwise_conv2d_group_backward",
            ([t(1, 3, 5, 5)], [], t(1, 2, 5, 5), [t(3, 2, 1, 1)], "relu"),
            "got 1 weights, 1 gradients and 0 outputs, needed as many of each",
        ),
        (
            "pointwise_conv2d_group_backward",
            ([t(1, 3, 5, 5)], [t(1, 3, 5, 4)], t(1, 2, 5, 5), [t(3, 2, 1, 1)], "relu"),
            "got outputs[0] of shape [1, 3, 5, 4] beside input of shape [1, 3, 5, 5], needed one shape",
        ),
    ],
)
@pytest.mark.parametrize("where", ["cpu", "triton", "fake", "meta"])
def test_backward_operators(where: str, operator: str, arguments: tuple[Any, ...], message: str) -> None:
    backend, arguments = on_place(where, arguments)
    masked = {"conv2d": 4, "depthwise_separable_conv2d": 5, "pointwise_conv2d_group": 3}
    wanted = [True] * masked[operator.removesuffix("_backward")]
    with use_backend(backend or "auto"):  # which defines its operators
        function = getattr(getattr(torch.ops, backends.namespace(backend or "cpu")), operator)
    with pytest.raises(RuntimeError, match=re.escape(f"fastconv::{operator}: {message}")):
        function(*arguments, wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.PointwiseConv2d(3, 4, 3), "got kernel_size (3, 3), padding (0, 0), groups 1"),
        (lambda: nn.PointwiseConv2d(4, 4, 1, groups=2), "needed a 1x1 filter without padding in one"),
        (lambda: nn.DepthwiseConv2d(4, 4, 3, groups=2), "got groups 2, needed 4, the number of input"),
        (lambda: nn.Conv2dReLU(3, 4, 3, activation="tanh"), "got activation 'tanh', needed 'none'"),
    ],
)
def test_modules(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()

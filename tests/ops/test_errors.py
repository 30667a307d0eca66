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
from support.bad_calls import TABLE, Bad, on_place, t
from support.cases import FIRST, named, run


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

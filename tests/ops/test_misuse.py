"""What no op takes, by kind of argument: every op raises one short error, in the same words wherever it runs."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastconv import nn, ops, use_backend
from fastconv.measure.timing import true_float32
from fastconv.swapping.calls.addition import add_activation
from support.bad_calls import BACKENDS, check_words, in_fake, message_of
from support.cases import FIRST, run
from support.kernel_backends import device_of

FULL = (2, 3, 5, 4)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # prototypes and what is deprecated
    NO_STRIDED = {
        "sparse": torch.ones(2, 3).to_sparse(),
        "csr": torch.ones(2, 3).to_sparse_csr(),
        "mkldnn": torch.ones(2, 3).to_mkldnn(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "quantized": torch.quantize_per_tensor(torch.ones(FULL), 0.1, 0, torch.quint8),
    }
NO_TENSOR = {
    "None": None,
    "list": [1.0, 2.0],
    "tensors": [torch.ones(2)] * 20,
    "array": np.ones(FULL, np.float32),
    "number": 3.5,
    "text": "weight" * 100,
    "class": torch.nn.ReLU,
    "complex": torch.ones(FULL, dtype=torch.complex64),
    "float8": torch.ones(FULL).to(torch.float8_e4m3fn),
    **NO_STRIDED,
}
NO_IMAGE = {
    "integers": torch.ones(FULL, dtype=torch.int64),
    "bools": torch.ones(FULL, dtype=torch.bool),
    "0-dim": torch.tensor(1.0),
    "2-dim": torch.ones(2, 3),
    "5-dim": torch.ones(2, 1, 3, 5, 4),
    "40-dim": torch.ones([1] * 38 + [2, 3]),
}
HUGE = {
    **{f"2**{bits}": 2**bits for bits in (31, 61, 62, 63, 200)},
    "2**63-1": 2**63 - 1,
    "-2**63": -(2**63),
    "-2**64": -(2**64),
    "20,000 digits": 10**20_000,
}
NO_NUMBER = {"None": None, "text": "3", "bool": True, "tensor": torch.tensor(1), "array": np.ones(2), "object": object}
NO_PAIR = {
    **NO_NUMBER,
    **HUGE,
    "text": "two",
    "float": 1.5,
    "one": (1,),
    "three": (1, 1, 1),
    "thousands": [1] * 5000,
    "half": (1, 0.5),
    "tensors": (torch.tensor(1), 1),
    "nested": [[1, 1]],
    "negative": (1, -1),
    "huge": (1, 2**62),
    "texts": ["x" * 60] * 9,
    "objects": [type("A" * 40, (), {})()] * 9,
}
NO_COUNT = {**NO_NUMBER, **HUGE, "float": 1.0, "list": [1], "zero": 0}
NO_REAL = {**NO_NUMBER, "list": [1.0], "complex": 1j, "20,000 digits": 10**20_000}
NO_NAME = {"None": None, "other": "ReLU", "callable": F.relu, "list": ["relu"], "array": np.ones(2), "long": "x" * 5000}
NO_BACKEND = {**NO_NAME, "number": 3}
NO_LIST = {
    "None": None,
    "number": 3,
    "text": "weights",
    "tensor": torch.ones(2, 2, 3, 1, 1),
    "array": np.ones((2, 2, 3)),
    "dict": {0: torch.ones(2, 3, 1, 1)},
    "nested": [[torch.ones(2, 3, 1, 1)], torch.ones(4, 3, 1, 1)],
    "generator": (weight for weight in [torch.ones(2, 3, 1, 1)]),
    "empty": [],
    "short": [torch.ones(2, 3, 1, 1)],
    "long": [torch.ones(2, 3, 1, 1)] * 300,
    "sparse": [torch.ones(2, 3, 1, 1).to_sparse()] * 2,
}
KINDS = {
    **dict.fromkeys(("stride", "padding", "dilation"), NO_PAIR),
    **dict.fromkeys(("groups", "size"), NO_COUNT),
    **dict.fromkeys(("alpha", "beta", "k"), NO_REAL),
    **dict.fromkeys(("activation", "depthwise_activation", "pointwise_activation"), NO_NAME),
    **dict.fromkeys(("weights", "biases"), NO_LIST),
    "backend": NO_BACKEND,
    "out": {**NO_TENSOR, **NO_IMAGE},
}


def misuses(op: str, name: str) -> dict[str, Any]:
    """What the op does not take for this argument, by kind."""
    kinds = KINDS.get(name, NO_TENSOR if op in ("add_relu", "local_response_norm") else {**NO_TENSOR, **NO_IMAGE})
    if (op, name) == ("local_response_norm", "input"):
        kinds = {**kinds, **{kind: NO_IMAGE[kind] for kind in ("integers", "bools", "0-dim", "2-dim")}}
    if (op, name) == ("pointwise_conv2d_group", "out"):
        kinds = NO_LIST
    fine = [kind for kind, value in kinds.items() if value is None and "None" in getattr(ops, op).__annotations__[name]]
    fine += ["empty"] if name == "biases" else []
    kinds = {kind: value for kind, value in kinds.items() if kind not in fine}
    if FIRST[op].shapes.get(name) and name != "input":
        kinds["meta"] = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), FIRST[op].arguments()[name])
    return kinds


ARGUMENTS = [(op, name) for op in ops.__all__ for name in getattr(ops, op).__annotations__ if name != "return"]


@pytest.mark.parametrize(("op", "name"), ARGUMENTS, ids=lambda value: value)
def test_misuse(op: str, name: str) -> None:
    for kind, value in misuses(op, name).items():
        arguments = {**FIRST[op].arguments(), name: value}
        found = message_of(lambda given=arguments: run(op, given))
        check_words(op, found)
        if name != "backend" and kind != "generator":
            assert message_of(lambda given=arguments: run(op, given, backend="reference")) == found
            assert message_of(lambda given=arguments: run(op, in_fake(given))) == found


def test_misuse_covers_every_argument() -> None:
    assert all(misuses(*argument) for argument in ARGUMENTS)
    assert sum(len(misuses(*argument)) for argument in ARGUMENTS) >= 900


# ------------------------------------------------------------------------------------------- modules


MODULES: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "AddReLU": (nn.AddReLU, "add_relu"),
    "Conv2dReLU": (lambda: nn.Conv2dReLU(3, 4, 3), "conv2d_relu"),
    "Conv2dReLU, reflect": (lambda: nn.Conv2dReLU(3, 4, 3, padding=1, padding_mode="reflect"), "conv2d_relu"),
    "Conv2dAddReLU": (lambda: nn.Conv2dAddReLU(3, 4, 3), "conv2d_add_relu"),
    "DepthwiseConv2d": (
        lambda: nn.DepthwiseConv2d(3, 3, 3, padding=1, padding_mode="circular"),
        "depthwise_conv2d",
    ),
    "DepthwiseSeparableConv2d": (
        lambda: nn.DepthwiseSeparableConv2d(3, 4, 3, padding=1, padding_mode="replicate"),
        "depthwise_separable_conv2d",
    ),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(3), "local_response_norm"),
    "PointwiseConv2d": (lambda: nn.PointwiseConv2d(3, 4), "pointwise_conv2d"),
    "PointwiseConv2dGroup": (lambda: nn.PointwiseConv2dGroup(3, [4, 5]), "pointwise_conv2d_group"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_misused(name: str) -> None:
    make, op = MODULES[name]
    module, kinds = make(), {**NO_TENSOR, **NO_IMAGE}
    more = [torch.ones(FULL)] if op in ("add_relu", "conv2d_add_relu") else []
    for kind in kinds if op != "add_relu" else NO_TENSOR:
        if op == "local_response_norm" and kind in ("5-dim", "40-dim"):
            continue
        check_words(op, message_of(lambda given=kinds[kind]: module(given, *more)))
    for kind in NO_TENSOR if more else []:
        value = NO_TENSOR[kind]
        check_words(op, message_of(lambda given=value: module(torch.ones(FULL), given)))
    if "padding" in vars(module) and op != "conv2d_add_relu" and op != "pointwise_conv2d":
        check_words(op, message_of(lambda: module(torch.ones(2, 3, 0, 4))))
        check_words(op, message_of(lambda: module(torch.ones(2, 0, 5, 4))))


@pytest.mark.parametrize("kind", [*NO_NAME, "pair"])
def test_activations_of_modules(kind: str) -> None:
    for make in (nn.AddReLU, partial(nn.Conv2dReLU, 3, 4, 3), partial(nn.LocalResponseNorm, 3)):
        with pytest.raises(
            ValueError, match=r"^fastconv.nn.\w+: got activation .{1,60}, needed 'none', 'relu' or 'relu6'; "
        ):
            make(activation=NO_NAME.get(kind, ("relu", "relu")))


# ------------------------------------------------------------------------------------ sizes, large ones

WIDE = torch.ones(1).expand(1, 1, 2**62, 1)  # no more memory than for one element


@pytest.mark.parametrize("where", [*BACKENDS, "meta"])
def test_sizes_that_overflow(where: str) -> None:
    """Of the operator's own callers, too, who are not checked in Python first."""
    backend = None if where == "meta" else where
    if where != "meta":
        device_of(where)
    place = partial(torch.Tensor.to, device="meta") if where == "meta" else (lambda tensor: tensor)
    x, w = place(torch.ones(1, 1, 1, 1)), place(torch.ones(1, 1, 1, 1))
    most = 2**31 - 1

    def message(x: Tensor, w: Tensor, *geometry: Any) -> str:
        return message_of(lambda: ops.conv2d_relu(x, w, None, *geometry, backend=backend))

    wide = place(WIDE)
    assert f"got input of shape [1, 1, {2**62}, 1], needed at most {most} in dimension 2; split it" in message(wide, w)
    assert f"got weight of shape [1, 1, {2**62}, 1], needed at most {most} in dimension 2" in message(x, wide)
    assert f"got a padded height of {2**32 - 1}, needed at most {most}; pass" in message(x, w, 1, (most, 0))
    large = place(torch.ones(1).expand(2**31, 1, 1, 1))
    assert f"result of shape [{2**31}, 1, {2**31 - 1}, {2**31 - 1}]" in message(large, w, 1, 2**30 - 1)
    assert f"got a filter that spans {most + 1} pixels" in message(x, w.expand(1, 1, 2, 1), 1, 0, most)


@pytest.mark.parametrize("where", BACKENDS)
def test_the_largest_steps(where: str) -> None:
    """What reaches beyond the image makes no difference, and takes no longer."""
    device_of(where)
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    weight = torch.randn(4, 4, 1, 3, requires_grad=True)
    steps = ((2**31 - 1, 1, 1), (7, 1, 1)), (((1, 2**31 - 1), (0, 1), (2**31 - 1, 1)), ((1, 8), (0, 1), 1))
    for geometry, equal in steps:
        results = []
        for arguments, backend in ((geometry, where), (equal, "cpu")):
            with true_float32():
                result = ops.conv2d_relu(x, weight, None, *arguments, backend=backend)
                results.append((result, *torch.autograd.grad(result.square().sum(), (x, weight))))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("where", BACKENDS)
def test_the_largest_windows(where: str) -> None:
    """More channels than there are make no difference either, other than to the mean."""
    device_of(where)
    x = torch.randn(2, 5, 3, requires_grad=True)
    for size, equal in ((2**31 - 1, 13), (2**31 - 2, 12)):
        results = []
        for window, alpha, backend in ((size, 2.0 * size, where), (equal, 2.0 * equal, "cpu")):
            result = ops.local_response_norm(x, window, alpha, backend=backend)
            (grad,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
            results.append((result, grad, *torch.autograd.grad(grad.square().sum(), x)))
        torch.testing.assert_close(*results)


# ---------------------------------------------------------------------------------------- two tensors


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]
SHAPES = [(), (1, 1), (0, 9), (1, 9)]


@pytest.mark.parametrize("cast_to", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("where", ["cpu", "reference"])
def test_sums_are_promoted_as_eagers(where: str, cast_to: torch.dtype | None) -> None:
    """Every pair of dtypes and of dimensions, as a function, a module and in a swapped model's addition."""
    for one, two in itertools.product(itertools.product(DTYPES, SHAPES), repeat=2):
        pair = [torch.ones(shape).to(dtype) for dtype, shape in (one, two)]
        with torch.autocast("cpu", dtype=cast_to, enabled=cast_to is not None), use_backend(where):
            expected = pair[0] + pair[1]
            if not expected.is_floating_point():
                check_words("add_relu", message_of(lambda pair=pair: ops.add_relu(*pair)))
                continue
            expected = F.relu(expected)
            for found in (ops.add_relu(*pair), nn.AddReLU()(*pair), add_activation(*pair, "relu")):
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                torch.testing.assert_close(found, expected)


def test_a_failure_within_torch_keeps_its_reason() -> None:
    """From torch 2.13 on; before, it is on stderr."""
    if torch.__version__ < "2.13":
        pytest.skip("this torch keeps what it says to itself")
    vast = torch.ones(1).expand(2**33, 4, 1, 1)
    found = message_of(lambda: ops.conv2d_relu(vast, torch.ones(2, 4, 1, 1), backend="cpu"))
    assert re.match(r"fastconv: \S+ failed: .*you tried to allocate", found), found


@pytest.mark.parametrize("where", BACKENDS)
def test_the_branch_that_does_not_fit_is_named(where: str) -> None:
    device_of(where)
    x, weight, bias = torch.ones(1, 4, 2, 2), torch.ones(2, 4, 1, 1), torch.ones(2)
    for weights, biases, words in (
        ([weight, weight], [bias, torch.ones(3)], "got biases[1] of shape [3], needed [2]"),
        ([weight, weight[:0]], None, "got weights[1] of shape [0, 4, 1, 1], needed at least"),
        ([weight, weight.double()], None, "got weights[1] of dtype float64"),
        ([weight, weight[:, :3]], None, "needed 3 (weights[1].shape[1] 3 x groups 1)"),
    ):
        assert words in message_of(
            lambda weights=weights, biases=biases: ops.pointwise_conv2d_group(x, weights, biases, backend=where)
        )
    depthwise = torch.ones(4, 1, 1, 1)
    for call, words in (
        (partial(ops.depthwise_separable_conv2d, x, depthwise, weight.double()), "got pointwise_weight of dtype"),
        (partial(ops.depthwise_separable_conv2d, x, depthwise, weight, bias), "got depthwise_bias of shape [2]"),
    ):
        assert words in message_of(lambda call=call: call(backend=where))


@pytest.mark.parametrize("op", [op for op in ops.__all__ if "conv" in op])
def test_convolutions_take_one_dtype(op: str) -> None:
    for dtype, name in itertools.product((torch.float32, torch.bfloat16), FIRST[op].shapes):
        for other in {*DTYPES[:4]} - {dtype}:
            arguments = FIRST[op].arguments(dtype)
            arguments[name] = tree_map_only(Tensor, lambda x, other=other: x.to(other), arguments[name])
            found = message_of(lambda arguments=arguments: run(op, arguments))
            check_words(op, found)
            assert "needed one dtype; convert it with" in found
            given = arguments[name]
            assert (f"got {name}[0] of" if isinstance(given, list) else f"got {name} of") in found or name == "input"
            assert message_of(lambda arguments=arguments: run(op, arguments, backend="reference")) == found

"""Depthwise convolution on CUDA: every kernel against float64, emulated and on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle, poisoned_outputs
from support.cases import DTYPES, LAYOUTS, layout_of
from support.cuda_kernels import (
    among_nan,
    emulated_gpu,
    operators,
    random,
    through_mask,
)
from support.eager import activate
from support.kernel_backends import device_of, forced, kernel_table

PASSES = ("fprop", "dgrad", "wgrad")
FILTERS = ("nhwc_3x3", "nhwc_5x5", "nchw_3x3", "nchw_5x5", "nhwc", "any_3x3", "any_5x5", "any")
SEPARABLE = ("128_3x", "128", "64_3x", "64")

half_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def test_the_table_has_these_kernels(backend: str) -> None:
    names = {f"depthwise_conv2d_{kind}_{rest}" for kind, rest in itertools.product(PASSES, FILTERS)}
    names |= {f"depthwise_separable_conv2d_fprop_{kind}_{rest}" for kind in ("nhwc", "nhwc_tf32") for rest in SEPARABLE}
    assert {kernel["name"] for kernel in kernel_table(backend) if kernel["op"].startswith("depthwise")} == names


# ------------------------------------------------------------------------------------------------------- depthwise

# Filter height and width, stride, padding, dilation. Tiles and strips are two or four pixels wide; rows end within them
# and behind them.
GEOMETRIES = {
    "3x3": [(3, 3, 1, 1, 1), (3, 3, 2, 1, 1), (3, 3, 2, 0, 1), (3, 3, 1, (2, 4), 1), (3, 3, 2, (0, 3), 1)],
    "5x5": [(5, 5, 1, 2, 1), (5, 5, 2, 2, 1), (5, 5, 1, (7, 0), 1), (5, 5, 2, (1, 4), 1)],
    "": [
        (3, 3, 1, 2, 2),
        (2, 4, 3, 1, 1),
        (1, 1, 1, 0, 1),
        (7, 7, 2, 3, 1),
        (3, 3, 1, 1, 1),
        (2, 3, (3, 1), (2, 4), (2, 1)),
        (1, 5, (1, 2), (0, 7), 1),
    ],
}


def pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def check(
    backend: str,
    kinds: tuple[str, ...],
    input: Tensor,
    multiplier: int,
    geometry: tuple[Any, ...],
    activation: str,
    misaligned: bool = False,
) -> None:
    """Each pass by its operator, the gradients for an output of our choice, so that no mask hangs on rounding."""
    height, width, *rest = geometry
    stride, padding, dilation = map(pair, rest)
    channels, dtype = input.shape[1], input.dtype
    layout = "channels_last" if input.stride(1) == 1 and channels > 1 else "contiguous"
    weight = random(
        backend, channels * multiplier, 1, height, width, dtype=dtype, seed=1, scale=(height * width) ** -0.5
    )
    bias = random(backend, channels * multiplier, dtype=dtype, seed=2)
    arguments = (stride, padding, dilation, channels)
    size = F.conv2d(input.to("meta"), weight.to("meta"), None, *arguments).shape
    output, grad = (random(backend, *size, dtype=dtype, layout=layout, seed=seed, scale=3) for seed in (3, 4))
    if misaligned:
        input, output, grad = map(among_nan, (input, output, grad))
    what = f"{tuple(input.shape)} x {multiplier}, {geometry}, {activation}"

    if "fprop" in kinds:
        with poisoned_outputs():
            found = ops.depthwise_conv2d(input, weight, bias, stride, padding, dilation, activation=activation)
        oracle, baseline = (
            activate(F.conv2d(input.to(d), weight.to(d), bias.to(d), *arguments), activation)
            for d in (torch.float64, dtype)
        )
        assert_close_to_oracle(found, oracle, baseline, what=what, border=1)
        assert layout_of(found) == layout_of(baseline)
    mask = ["dgrad" in kinds, "wgrad" in kinds, "wgrad" in kinds]
    if not any(mask):
        return
    with poisoned_outputs():
        gradients = operators(backend).conv2d_backward(
            grad, None if activation == "none" else output, input, weight, *arguments, activation, [*mask, False]
        )
    masked = through_mask(grad, output, activation)

    def expected(d: torch.dtype) -> list[Tensor]:
        convolved = torch.ops.aten.convolution_backward(
            masked.to(d), input.to(d), weight.to(d), None, *arguments[:3], False, [0, 0], channels, [True, True, False]
        )
        return [*convolved[:2], masked.to(d).sum((0, 2, 3))]

    for name, wanted, *triple in zip(
        ("dgrad", "wgrad", "bias"), mask, gradients, expected(torch.float64), expected(dtype), strict=False
    ):
        if wanted:
            assert_close_to_oracle(*triple, what=f"{name} of {what}", border=1 if name == "dgrad" else None)


# conv2d_backward takes float64 to aten.
@pytest.mark.parametrize("rest", FILTERS)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, d) for k, d in itertools.product(PASSES, DTYPES) if k == "fprop" or d is not torch.float64],
    ids=str,
)
def test_every_kernel(backend: str, kind: str, rest: str, dtype: torch.dtype) -> None:
    order, _, filter = rest.partition("_")
    geometries, width = GEOMETRIES[filter], 9
    activations = itertools.cycle(["none", "relu", "relu6"])
    # (channels, multiplier, layout): channels that blocks share, that no vector divides, one alone
    operands = [(12, 1, "channels_last"), (36 if filter == "3x3" else 4, 1, "channels_last")]
    if order == "any":
        operands = [(3, 1, "contiguous"), (7, 1, "channels_last")]
        if kind != "dgrad" or not filter:
            operands += [(2, 3, "contiguous"), (3, 2, "channels_last")]
    if order == "nchw":  # rows of whole vectors, padded by half of the filter
        operands = [(3, 1, "contiguous")] + [(2, 3, "contiguous")] * (kind != "dgrad")
        half, width = int(filter[0]) // 2, 16
        geometries = [
            (*g[:2], stride, (above, half), 1) for g in geometries[:1] for stride in (1, 2) for above in (half, 0, 4)
        ]
    op = f"depthwise_conv2d_{kind}"
    with forced(backend, op, f"{op}_{rest}"):
        for geometry, (channels, multiplier, layout) in itertools.product(geometries, operands):
            input = random(backend, 2, channels, 7, width, dtype=dtype, layout=layout)
            check(backend, (kind,), input, multiplier, geometry, next(activations), misaligned=order == "any")


@layouts
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 13])
def test_rows_of_any_width(backend: str, width: int, layout: str) -> None:
    """Rows are cut into tiles, which for the gradient of the input begin where the stride wants it."""
    input = random(backend, 1, 4, 2, width, dtype=torch.bfloat16, layout=layout)
    for filter, stride, padding in itertools.product((3, 5), (1, 2), (1, 4)):
        if width + 2 * padding >= filter:
            check(backend, PASSES, input, 1, (2, filter, (1, stride), (1, padding), 1), "relu")


@layouts
@pytest.mark.parametrize("filter", [(11, 11), (4, 6), (1, 9), (9, 1)], ids=str)
def test_any_filter(backend: str, filter: tuple[int, int], layout: str) -> None:
    input = random(backend, 1, 4, 6, 7, dtype=torch.float16, layout=layout)
    check(backend, PASSES, input, 1, (*filter, 1, (filter[0] // 2, filter[1] // 2), 1), "relu6")


@layouts
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 8, 1, 1), (2, 4, 1, 5), (2, 4, 5, 1), (1, 260, 1, 2)], ids=str)
def test_small_images(backend: str, shape: tuple[int, ...], layout: str) -> None:
    for dtype in (torch.float32, torch.float16):
        check(backend, PASSES, random(backend, *shape, dtype=dtype, layout=layout), 1, (3, 3, 1, 1, 1), "relu")


def test_many_chunks() -> None:
    """Gradients of filters are sums over chunks of the pixels."""
    with emulated_gpu(multiprocessors=24):
        for layout in LAYOUTS:
            input = random("cuda-emulated", 3, 4, 33, 34, dtype=torch.float16, layout=layout)
            check("cuda-emulated", ("wgrad",), input, 1, (3, 3, 1, 1, 1), "relu")


@pytest.mark.parametrize(("filter", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 160, 17, 12), "channels_last"), ((4, 12, 17, 64), "contiguous"), ((4, 12, 17, 31), "contiguous")],
    ids=["nhwc", "nchw", "any"],
)
def test_long_strips(filter: int, stride: int, shape: tuple[int, ...], layout: str) -> None:
    """The fewer blocks run at once, the more rows a thread owns; the last strip has fewer of them."""
    with emulated_gpu(multiprocessors=1):
        input = random("cuda-emulated", *shape, dtype=torch.float16, layout=layout)
        check("cuda-emulated", PASSES, input, 1, (filter, filter, stride, filter // 2, 1), "relu6")


@pytest.mark.parametrize("make", ["slice of channels", "every other column", "expanded", "transposed"])
def test_strides(backend: str, make: str) -> None:
    """Inputs and gradients are read where they lie."""
    device = device_of(backend)
    torch.manual_seed(0)
    wide = torch.randn(2, 24, 6, 5, device=device).half().contiguous(memory_format=torch.channels_last)
    input = {
        "slice of channels": lambda: wide[:, 8:16],
        "every other column": lambda: torch.randn(2, 8, 6, 10, device=device).half()[..., ::2],
        "expanded": lambda: torch.randn(1, 1, 6, 5, device=device).half().expand(2, 8, 6, 5),
        "transposed": lambda: torch.randn(2, 8, 5, 6, device=device).half().mT,
    }[make]()
    weight = (torch.randn(8, 1, 3, 3, device=device) / 3).half()
    found = ops.depthwise_conv2d(input, weight, padding=1)
    oracle, baseline = (F.conv2d(input.to(d), weight.to(d), None, 1, 1, 1, 8) for d in (torch.float64, torch.float16))
    assert_close_to_oracle(found, oracle, baseline, what=make, border=1)
    leaf = torch.randn(2, 8, 6, 5, device=device).half().requires_grad_()
    parameter = weight.requires_grad_()
    gradients = torch.autograd.grad(ops.depthwise_conv2d(leaf, parameter, padding=1), (leaf, parameter), input)
    expected = [
        torch.ops.aten.convolution_backward(
            input.to(d), leaf.to(d), weight.to(d), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 8, [True, True, False]
        )
        for d in (torch.float64, torch.float16)
    ]
    for gradient, oracle, baseline in zip(gradients, *expected, strict=False):
        assert_close_to_oracle(gradient, oracle, baseline, what=f"gradient, {make}")


@layouts
@half_dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_special_values(backend: str, value: float, dtype: torch.dtype, layout: str) -> None:
    """An odd value, or an odd gradient, spoils what it meets, and no other channel."""
    input = random(backend, 1, 8, 6, 6, dtype=dtype, layout=layout)
    weight = random(backend, 8, 1, 3, 3, dtype=dtype, seed=1)
    odd = input.clone(memory_format=torch.preserve_format)
    odd[0, 3, 5, 5] = value  # in the corner: where a tile goes on beyond the row
    found, expected = (ops.depthwise_conv2d(odd, weight, padding=1, backend=b) for b in (None, "reference"))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    # What the corner meets: as a pixel the taps behind the first, as a gradient those before the last. Of the others
    # it may meet zeros of the padding.
    for x, g, pixels, taps in ((odd, input, slice(0), slice(1, 3)), (input, odd, slice(4, 6), slice(2))):
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        of_input, of_weight = torch.autograd.grad(ops.depthwise_conv2d(*leaves, padding=1), leaves, g)
        bad = torch.zeros_like(input, dtype=torch.bool)
        bad[:, 3, pixels, pixels] = True
        assert torch.equal(~of_input.isfinite(), bad)
        assert not of_weight[3, 0, taps, taps].isfinite().any()
        if x is odd:  # what gradients beyond the row's end would meet, if there were any
            assert of_weight[3, 0, 0].isfinite().all()
            assert of_weight[3, 0, :, 0].isfinite().all()
        assert of_weight[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_a_bias_gradient_of_many_pixels(backend: str) -> None:
    """A sum of 2^14 ones in bfloat16 would stop at 256."""
    input = torch.ones(1, 4, 128, 128, dtype=torch.bfloat16, device=device_of(backend))
    weight = torch.ones(4, 1, 1, 1, dtype=torch.bfloat16, device=device_of(backend))
    bias = torch.ones(4, dtype=torch.bfloat16, device=device_of(backend), requires_grad=True)
    ops.depthwise_conv2d(input, weight, bias, activation="relu").sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [2**14] * 4


def test_a_forced_kernel_that_does_not_fit(backend: str) -> None:
    input = random(backend, 1, 7, 5, 5, dtype=torch.float16)
    weights = [random(backend, *size, dtype=torch.float16) for size in ((7, 1, 3, 3), (4, 7, 1, 1))]
    op = "depthwise_conv2d_fprop"
    with (
        forced(backend, op, f"{op}_nhwc_3x3"),
        pytest.raises(RuntimeError, match="was forced, but needs channels side"),
    ):
        ops.depthwise_conv2d(input, weights[0])

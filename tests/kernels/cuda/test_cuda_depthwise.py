"""Depthwise and depthwise-separable convolution on CUDA: every kernel against float64, emulated and on a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle, poisoned_outputs
from support.cases import DTYPES, LAYOUTS, layout_of, named, run, tensors
from support.cuda_kernels import (
    among_nan,
    check_same_bits_in_any_order,
    emulated_gpu,
    operators,
    random,
    through_mask,
)
from support.eager import activate
from support.kernel_backends import as_tf32, device_of, emulated, forced, kernel_table, true_float32

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


# ------------------------------------------------------------------------------------------------------- separable


def check_separable(
    backend: str, shape: tuple[int, ...], out_channels: int, geometry: tuple[Any, ...], dtype: torch.dtype, acts: Any
) -> None:
    height, width, *rest = geometry
    stride, padding, dilation = map(pair, rest)
    channels = shape[1]
    input = random(backend, *shape, dtype=dtype, layout="channels_last")
    depthwise = random(backend, channels, 1, height, width, dtype=dtype, seed=1, scale=(height * width) ** -0.5)
    pointwise = random(backend, out_channels, channels, 1, 1, dtype=dtype, seed=2, scale=channels**-0.5)
    biases = [random(backend, n, dtype=dtype, seed=3) for n in (channels, out_channels)]
    arguments = [input, depthwise, pointwise, *biases, stride, padding, dilation]
    options = {"depthwise_activation": acts[0], "pointwise_activation": acts[1]}
    with poisoned_outputs():
        found = ops.depthwise_separable_conv2d(*arguments, **options)
    exact = [a.double() if isinstance(a, Tensor) else a for a in arguments]
    oracle = ops.depthwise_separable_conv2d(*exact, **options, backend="reference")
    baseline = ops.depthwise_separable_conv2d(*arguments, **options, backend="reference")
    what = f"{shape} to {out_channels}, {geometry}, {acts}"
    assert_close_to_oracle(found, oracle, baseline, what=what, border=1)
    assert layout_of(found) == layout_of(baseline)


@half_dtypes
@pytest.mark.parametrize("rest", SEPARABLE)
def test_every_separable_kernel(backend: str, rest: str, dtype: torch.dtype) -> None:
    """Fewer pixels than a block has, and more; channels beside the multiples of its steps; results that are not whole
    vectors."""
    geometries = [(3, 3, 1, 1, 1), (3, 3, 2, 1, 1)] if rest.endswith("3x") else [(5, 5, 1, 2, 1), (3, 3, 1, 2, 2)]
    op = "depthwise_separable_conv2d_fprop"
    with forced(backend, op, f"{op}_nhwc_{rest}"):
        for geometry, (shape, out_channels), acts in zip(
            geometries * 3,
            [((1, 8, 5, 5), 7), ((2, 72, 9, 7), 72), ((1, 168, 4, 6), 24), ((3, 24, 7, 7), 65)],
            [("none", "relu"), ("relu6", "none"), ("relu", "relu6"), ("none", "none")],
            strict=False,
        ):
            check_separable(backend, shape, out_channels, geometry, dtype, acts)


def sixteenths(tensor: Tensor) -> Tensor:
    """Numbers of few digits, whose products and sums no rounding touches."""
    return (16 * tensor).round() / 16


@pytest.mark.parametrize("rest", SEPARABLE)
def test_every_separable_kernel_in_tf32(backend: str, rest: str) -> None:
    """The depthwise result is exact, so that its rounding to TF32 is as well, and can be told in float64."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    stride, dilation = (2, 1) if rest.endswith("3x") else (1, 2)
    op = "depthwise_separable_conv2d_fprop"
    for shape, out_channels in [((1, 4, 5, 5), 7), ((2, 36, 9, 7), 72), ((1, 100, 4, 6), 24), ((3, 12, 7, 7), 65)]:
        channels = shape[1]
        input = sixteenths(3 * random(backend, *shape, dtype=torch.float32, layout="channels_last"))
        depthwise = sixteenths(random(backend, channels, 1, 3, 3, dtype=torch.float32, seed=1))
        pointwise = random(backend, out_channels, channels, 1, 1, dtype=torch.float32, seed=2, scale=channels**-0.5)
        first, second = (random(backend, n, dtype=torch.float32, seed=3) for n in (channels, out_channels))
        first = sixteenths(first)
        geometry = stride, dilation, dilation
        with forced(backend, op, f"{op}_nhwc_tf32_{rest}"), poisoned_outputs():
            found = ops.depthwise_separable_conv2d(
                input, depthwise, pointwise, first, second, *geometry, depthwise_activation="relu"
            )
        hidden = F.conv2d(input.double(), depthwise.double(), first.double(), *geometry, channels).relu()
        oracle, baseline = (
            F.conv2d(as_tf32(hidden.float()).to(t), as_tf32(pointwise).to(t), second.to(t))
            for t in (torch.float64, torch.float32)
        )
        assert_close_to_oracle(found, oracle, baseline, what=f"{shape} to {out_channels}", border=1)


def test_the_choice_of_a_separable_kernel() -> None:
    """One kernel while its channels are few enough, then two."""
    library = emulated()
    weights = {c: random("cuda-emulated", 24, c, 1, 1, dtype=torch.float16, scale=0.1) for c in (16, 640)}
    for channels, pixels, expected in (
        (16, 6, ["depthwise_separable_conv2d_fprop_nhwc_64_3x"]),
        (16, 30, ["depthwise_separable_conv2d_fprop_nhwc_128_3x"]),
        (640, 6, ["depthwise_conv2d_fprop_nhwc_3x3"]),  # and conv2d
    ):
        input = random("cuda-emulated", 1, channels, pixels, pixels, dtype=torch.float16, layout="channels_last")
        filters = random("cuda-emulated", channels, 1, 3, 3, dtype=torch.float16)
        library.reset_statistics()
        ops.depthwise_separable_conv2d(input, filters, weights[channels], padding=1, backend="cuda-emulated")
        assert [name for name in library.launches() if name.startswith("depthwise")] == expected


@pytest.mark.parametrize(
    ("precision", "kernel"), [("tf32", "separable_conv2d_fprop_nhwc_tf32"), ("ieee", "conv2d_fprop")]
)
def test_torch_decides_on_tf32_in_the_separable_kernel(precision: str, kernel: str) -> None:
    library = emulated()
    with true_float32():
        torch.backends.cudnn.conv.fp32_precision = precision
        input = random("cuda-emulated", 1, 8, 5, 5, dtype=torch.float32, layout="channels_last")
        weights = torch.zeros(8, 1, 3, 3), torch.zeros(4, 8, 1, 1)
        library.reset_statistics()
        ops.depthwise_separable_conv2d(input, *weights, backend="cuda-emulated")
    (name,) = (name for name in library.launches() if name.startswith("depthwise"))
    assert name.startswith(f"depthwise_{kernel}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_special_values_through_the_separable_kernel(backend: str, dtype: torch.dtype) -> None:
    """NaN stays NaN behind both activations, and padding of channels or pixels does not multiply with it."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for value in (torch.nan, torch.inf):
        input = random(backend, 1, 8, 5, 5, dtype=dtype, layout="channels_last")
        input[0, 3, 4, 4] = value
        weights = [random(backend, *size, dtype=dtype, seed=1) for size in ((8, 1, 3, 3), (12, 8, 1, 1))]
        found, expected = (
            ops.depthwise_separable_conv2d(
                input, *weights, padding=1, depthwise_activation="relu", pointwise_activation="relu", backend=b
            )
            for b in (None, "reference")
        )
        assert torch.equal(found.isnan(), expected.isnan())


# -------------------------------------------------------------------------------------------------------- the rest


def test_a_forced_kernel_that_does_not_fit(backend: str) -> None:
    input = random(backend, 1, 7, 5, 5, dtype=torch.float16)
    weights = [random(backend, *size, dtype=torch.float16) for size in ((7, 1, 3, 3), (4, 7, 1, 1))]
    op = "depthwise_conv2d_fprop"
    with (
        forced(backend, op, f"{op}_nhwc_3x3"),
        pytest.raises(RuntimeError, match="was forced, but needs channels side"),
    ):
        ops.depthwise_conv2d(input, weights[0])


def test_the_same_bits_in_any_order() -> None:
    arguments = named("depthwise_separable_conv2d")[1].arguments(torch.float16, "channels_last", requires_grad=True)

    def call() -> list[Tensor]:
        (output,) = run("depthwise_separable_conv2d", arguments, backend="cuda-emulated")
        return [output, *torch.autograd.grad(output, tensors(arguments), torch.ones_like(output))]

    check_same_bits_in_any_order(call)

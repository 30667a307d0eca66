"""Depthwise-separable convolution on CUDA: every kernel against float64, emulated and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.measure.timing import true_float32
from fastconv.measure.tolerance import assert_close_to_oracle, poisoned_outputs
from support.cases import layout_of, named, run, tensors
from support.cuda_kernels import (
    check_same_bits_in_any_order,
    random,
)
from support.kernel_backends import as_tf32, emulated, forced

SEPARABLE = ("128_3x", "128", "64_3x", "64")

half_dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


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


def test_the_same_bits_in_any_order() -> None:
    arguments = named("depthwise_separable_conv2d")[1].arguments(torch.float16, "channels_last", requires_grad=True)

    def call() -> list[Tensor]:
        (output,) = run("depthwise_separable_conv2d", arguments, backend="cuda-emulated")
        return [output, *torch.autograd.grad(output, tensors(arguments), torch.ones_like(output))]

    check_same_bits_in_any_order(call)

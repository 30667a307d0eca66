"""The convolution kernels that read photographs as they lie, against float64: in the emulator, and on a GPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle
from fastconv.operators import kernels
from support.cases import Concatenation
from support.cuda_convolutions import FORMATS, check_special_values, convolution
from support.cuda_kernels import among_nan, check_same_bits_in_any_order, emulated_gpu, operators, random
from support.eager import activate
from support.kernel_backends import emulated, forced, kernel_table

STRIDES, FILTERS, NAMES = (1, 2, 4), (32, 48, 64), ("fp16", "bf16")
WGRAD_TILES = ("32x64", "64x64", "64x256")
FPROP, WGRAD = "conv2d_fprop", "conv2d_wgrad"


def kernel_name(stride: int, filters: int = 64, name: str = "fp16") -> str:
    return f"{FPROP}_{name}_256x{filters}_stem_s{stride}_sm80"


def wgrad_name(stride: int, tile: str, name: str = "fp16") -> str:
    return f"{WGRAD}_{name}_{tile}_stem_s{stride}_sm80"


def test_the_table_has_these_kernels(backend: str) -> None:
    names = {kernel_name(*each) for each in itertools.product(STRIDES, FILTERS, NAMES)}
    names |= {wgrad_name(*each) for each in itertools.product(STRIDES, WGRAD_TILES, NAMES)}
    assert {kernel["name"] for kernel in kernel_table(backend) if "stem" in kernel["name"]} == names


# How an image of [2, c, h, w] may lie; the result is written by channels, by columns or element by element.
LAYOUTS = {
    "contiguous": lambda image: image.contiguous(),
    "channels_last": lambda image: image.contiguous(memory_format=torch.channels_last),
    "transposed": lambda image: image.mT.contiguous().mT,
    "every second": lambda image: image.repeat_interleave(2, 3)[..., ::2],
    "cut out": lambda image: F.pad(image, (3, 2, 1, 4))[:, :, 1:-4, 3:-2],
    "of more channels": lambda image: F.pad(image, (0, 0, 0, 0, 1, 2))[:, 1:-2],
    "one for all": lambda image: image[:1].expand_as(image),
    "odd address": among_nan,
}

# Image, filter, stride of rows, padding, dilation of rows
GEOMETRIES = [
    ((19, 35), (3, 3), None, 1, 1),
    ((33, 18), (7, 7), None, 3, 1),
    ((20, 40), (1, 1), None, 0, 1),
    ((24, 23), (4, 4), None, (0, 2), 1),
    ((21, 70), (2, 11), 1, (5, 4), 1),
    ((37, 20), (11, 2), 3, 0, 1),
    ((30, 21), (5, 5), 2, 2, 3),
    ((3, 2), (3, 9), None, (1, 9), 1),
]


@contextlib.contextmanager
def alone(backend: str, op: str, kernel: str) -> Iterator[None]:
    """No other kernel of the op runs inside; in shared memory no two rows meet in a bank."""
    if backend == "cuda-emulated":
        emulated().reset_statistics()
    with forced(backend, op, kernel):
        yield
    if backend == "cuda-emulated":
        statistics = emulated().statistics()
        ran = {name for name in statistics["launches"] if name.startswith(op) and "reduce" not in name}
        assert ran == {kernel}
        assert statistics["ldmatrix_conflicts"] == 0


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel(backend: str, name: str, stride: int, filters: int) -> None:
    """Each of eight geometries with another layout, number of channels and activation."""
    shift = 3 * STRIDES.index(stride) + FILTERS.index(filters)
    layouts, channels = list(LAYOUTS.values()), (3, 4, 1, 2)
    with alone(backend, FPROP, kernel_name(stride, filters, name)):
        for i, (size, filter, rows, padding, dilation) in enumerate(GEOMETRIES):
            count, activation = channels[(i + shift) % 4], ("relu", "none", "relu6")[(i + shift) % 3]
            # One more than a tile has, a multiple of 8, and less
            k = (filters + 1, filters + 8, filters, 5)[(i + shift // 4) % 4]
            image = random(backend, 2, count, *size, dtype=FORMATS[name])
            weight = random(backend, k, count, *filter, dtype=FORMATS[name], seed=1, scale=0.3)
            weight = layouts[(i + 2 * shift + 3) % 6](weight)
            bias = random(backend, k, dtype=FORMATS[name], seed=2) if i % 3 else None
            geometry = ((rows or stride, stride), padding, (dilation, 1))
            check(layouts[(i + shift) % 8](image), weight, bias, geometry, activation)
    if backend == "cuda-emulated":
        assert "conv2d_pack_any" not in emulated().launches()


@pytest.mark.parametrize("tile", WGRAD_TILES)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_of_the_gradient(backend: str, name: str, stride: int, tile: str) -> None:
    """Likewise; where a filter has more taps than a tile, several blocks share them."""
    shift = 3 * STRIDES.index(stride) + WGRAD_TILES.index(tile)
    layouts, channels = list(LAYOUTS.values()), (3, 4, 1, 2)
    with alone(backend, WGRAD, wgrad_name(stride, tile, name)):
        for i, (size, filter, rows, padding, dilation) in enumerate(GEOMETRIES):
            image = random(backend, 2, channels[(i + shift) % 4], *size, dtype=FORMATS[name])
            k = (65, 72, 32, 5)[(i + shift // 4) % 4]
            geometry = ((rows or stride, stride), padding, (dilation, 1))
            check_gradient(layouts[(i + shift) % 8](image), (k, image.shape[1], *filter), geometry, 1 / 3)


def check_gradient(image: Tensor, shape: tuple[int, ...], geometry: tuple[object, ...], scale: float = 1.0) -> None:
    def gradient(dtype: torch.dtype, own: bool = False) -> Tensor:
        weight = torch.zeros(shape, dtype=dtype, device=image.device, requires_grad=True)
        if own:
            result = ops.conv2d_relu(image, weight, None, *geometry, activation="none")
        else:
            result = F.conv2d(image.to(dtype), weight, None, *geometry)
        grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)) * scale
        grad = grad.to(image.device, image.dtype).contiguous(memory_format=torch.channels_last)
        return torch.autograd.grad(result, weight, grad.to(dtype))[0]

    found = gradient(image.dtype, own=True)
    assert_close_to_oracle(found, gradient(torch.float64), gradient(image.dtype), what=f"{geometry}")


def check(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[object, ...],
    activation: str = "relu",
    out: Tensor | None = None,
) -> Tensor:
    found = ops.conv2d_relu(image, weight, bias, *geometry, activation=activation, out=out)
    oracle, baseline = (
        activate(F.conv2d(image.to(d), weight.to(d), None if bias is None else bias.to(d), *geometry), activation)
        for d in (torch.float64, image.dtype)
    )
    assert_close_to_oracle(found, oracle, baseline, what=f"{geometry}", border=1)
    return found


@pytest.mark.parametrize("filters", [48, 35])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("width", [64, 71], ids=["whole runs", "odd columns"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0, 8, 3])
def test_into_a_concatenation(backend: str, offset: int, layout: str, width: int, stride: int, filters: int) -> None:
    """By channels, by columns, or one by one: in place, and nothing beside it."""
    image = random(backend, 2, 3, 20, width, dtype=torch.float16, layout=layout)
    weight = random(backend, filters, 3, 3, 3, dtype=torch.float16, layout=layout, seed=1, scale=0.3)
    geometry = stride, 1
    like = F.conv2d(image, weight, None, *geometry)
    joined = Concatenation.of([like], offset, layout, 8)
    with forced(backend, FPROP, kernel_name(stride)), kernels.choices() as made:
        assert check(image, weight, None, geometry, out=joined.slices[0]) is joined.slices[0]
    joined.check_the_rest()
    assert [each.chosen for each in made if each.op == FPROP] == [kernel_name(stride)]


def test_into_some_columns(backend: str) -> None:
    """Of rows that vectors fit: those of the last columns would reach beyond."""
    image = random(backend, 2, 3, 18, 45, dtype=torch.float16)
    weight = random(backend, 16, 3, 3, 3, dtype=torch.float16, seed=1, scale=0.3)
    wide = torch.full((2, 16, 18, 48), -7.0, dtype=torch.float16, device=image.device)
    with forced(backend, FPROP, kernel_name(1)):
        assert check(image, weight, None, (1, 1), out=wide[..., :45]).data_ptr() == wide.data_ptr()
    assert (wide[..., 45:] == -7).all()


@pytest.mark.parametrize("blocks", [1, 5, 100])
def test_one_tile_after_the_other(blocks: int) -> None:
    """Of several images, in as many blocks as there are multiprocessors for, which have brought the filters once."""
    image = random("cuda-emulated", 3, 3, 50, 41, dtype=torch.float16)
    weight = random("cuda-emulated", 130, 3, 7, 7, dtype=torch.float16, seed=1, scale=0.1)
    with emulated_gpu(multiprocessors=blocks), forced("cuda-emulated", FPROP, kernel_name(2)):
        check(image, weight, None, (2, 3))
    with emulated_gpu(multiprocessors=blocks), forced("cuda-emulated", WGRAD, wgrad_name(2, "64x256")):
        check_gradient(image, weight.shape, (2, 3))


def test_the_same_bits_in_any_order() -> None:
    image = random("cuda-emulated", 2, 3, 40, 39, dtype=torch.float16)
    weight = random("cuda-emulated", 40, 3, 5, 5, dtype=torch.float16, seed=1)
    with emulated_gpu(multiprocessors=2), forced("cuda-emulated", FPROP, kernel_name(2, 32)):
        check_same_bits_in_any_order(lambda: [ops.conv2d_relu(image, weight, None, 2, 2)])
    grad = random("cuda-emulated", 2, 40, 20, 20, dtype=torch.float16, layout="channels_last", seed=2)
    arguments = grad, None, image, weight, [2, 2], [2, 2], [1, 1], 1, "none", [False, True, False, False]
    # 40 parts, which slices of threads add up
    with emulated_gpu(multiprocessors=20), forced("cuda-emulated", WGRAD, wgrad_name(2, "32x64")):
        check_same_bits_in_any_order(lambda: [operators("cuda-emulated").conv2d_backward(*arguments)[1]])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 8])
def test_special_values(backend: str, side: int, stride: int, value: float) -> None:
    """A pixel beside the filter, which a product meets with weights of 0, says nothing."""
    conv = convolution(backend, "fp16", (2, 3, 21, 43), (8, 3, side, side), stride=stride, padding=side // 2)
    conv.input[0, 1, ::5, ::6] = value
    conv.input[1, :, 7, 0] = value
    with forced(backend, FPROP, kernel_name(stride, 32)):
        check_special_values(conv)


@pytest.mark.parametrize("tile", WGRAD_TILES)
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0), (2, 2), (4, 3)])
def test_special_values_in_the_gradient(backend: str, stride: int, padding: int, tile: str) -> None:
    """Taps that meet NaN have it; what lies beyond the last column or row, which a tile reaches, says nothing."""
    for row, column in ((0, 0), (8, 9), (-1, -1), (-1, 3), (2, -1), (-2, -2)):
        conv = convolution(backend, "fp16", (1, 3, 24, 22), (8, 3, 3, 5), stride=stride, padding=padding)
        conv.input[0, 1, row, column] = torch.nan
        arguments = conv.grad, None, conv.input, conv.weight, *conv.geometry, "none", [False, True, False, False]
        with forced(backend, WGRAD, wgrad_name(stride, tile)):
            found = operators(backend).conv2d_backward(*arguments)[1]
        assert torch.equal(found.isnan(), conv.backward(torch.float64)[1].isnan())


# Image, filter, stride, padding: the first layers of networks
STEMS = {
    "VGG": ((32, 3, 224, 224), (64, 3, 3, 3), 1, 1),
    "ResNet, GoogLeNet, DenseNet": ((32, 3, 224, 224), (64, 3, 7, 7), 2, 3),
    "Inception-v3, Xception": ((32, 3, 299, 299), (32, 3, 3, 3), 2, 0),
    "MobileNet, EfficientNet": ((32, 3, 224, 224), (32, 3, 3, 3), 2, 1),
}
A100 = (80, 108, 2048, 163 << 10, 164 << 10, 40 << 20)  # csrc/cuda/runtime/device_info.h


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("network", STEMS)
def test_first_layers_are_not_packed(network: str, layout: torch.memory_format) -> None:
    """Of a batch on an A100, in the forward and for the gradient of the weight."""
    shape, filters, stride, padding = STEMS[network]
    image, weight = (torch.empty(size, dtype=torch.bfloat16, memory_format=layout) for size in (shape, filters))
    size = F.conv2d(image.to("meta"), weight.to("meta"), None, stride, padding).shape
    grad = torch.empty(size, dtype=torch.bfloat16, memory_format=torch.channels_last)
    geometry = [stride] * 2, [padding] * 2, [1, 1], 1, "none"
    with emulated_gpu() as library:
        library.device(A100)
        with library.planning() as noted:
            ops.conv2d_relu(image, weight, None, stride, padding)
            operators("cuda-emulated").conv2d_backward(
                grad, None, image, weight, *geometry, [False, True, False, False]
            )
    forward, gradient, reduction = (launch["kernel"] for launch in noted)
    assert forward.startswith(FPROP)
    assert gradient.startswith(WGRAD)
    assert "stem" in forward
    assert "stem" in gradient
    assert "reduce" in reduction


def test_a_packed_image_is_weighed_too() -> None:
    """Qualification may prefer a kernel that wants the image packed: then it is, before that kernel runs."""
    conv = convolution("cuda-emulated", "fp16", (1, 3, 64, 64), (64, 3, 7, 7), stride=2, padding=3)
    with emulated_gpu(multiprocessors=1) as library:
        with kernels.choices() as made:
            ops.conv2d_relu(conv.input, conv.weight, None, *conv.geometry)
        (choice,) = (each for each in made if each.op == FPROP)
        able = [each.kernel for each in choice.candidates if not each.reason]
        assert "stem_s2" in choice.chosen
        assert f"{FPROP}_fp16_128x64_narrow_sm80" in able
        library.reset_statistics()
        with forced("cuda-emulated", FPROP, f"{FPROP}_fp16_128x64_narrow_sm80"):
            check(conv.input, conv.weight, conv.bias, conv.geometry)
        assert library.launches() == {"conv2d_pack_any": 2, f"{FPROP}_fp16_128x64_narrow_sm80": 1}


REFUSED = {
    "more than four channels, groups, branches, or a residual": ((1, 8, 9, 9), (8, 8, 3, 3), {}),
    "it is for another stride": ((1, 3, 9, 9), (8, 3, 3, 3), {"stride": 3}),
    "the filter is dilated": ((1, 3, 9, 9), (8, 3, 3, 3), {"dilation": 2}),
    "the filter or its step is too large": ((1, 3, 9, 80), (8, 3, 1, 65), {"padding": 4}),
    "the patch does not fit into shared memory": ((1, 3, 60, 60), (64, 3, 51, 51), {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    shape, filters, options = REFUSED[reason]
    conv = convolution("cuda-emulated", "fp16", shape, filters, **options)
    with emulated_gpu(), kernels.choices() as made:
        check(conv.input, conv.weight, conv.bias, conv.geometry)
    (choice,) = (each for each in made if each.op == FPROP)
    assert {each.reason for each in choice.candidates if "stem_s1" in each.kernel and "fp16" in each.kernel} == {reason}
    with (
        emulated_gpu(),
        forced("cuda-emulated", FPROP, kernel_name(1)),
        pytest.raises(
            RuntimeError, match="needs an image of at most 4 channels, no groups or residual, its own stride"
        ),
    ):
        ops.conv2d_relu(conv.input, conv.weight, conv.bias, *conv.geometry)


def test_more_filters_than_a_grid_has_room_for() -> None:
    image, weight = (torch.ones(n, 3, 1, 1, dtype=torch.float16) for n in (1, 32 * 65535 + 1))
    with emulated_gpu() as library, library.planning(), kernels.choices() as made:
        ops.conv2d_relu(image, weight)
    reasons = {each.kernel: each.reason for choice in made for each in choice.candidates}
    assert reasons[kernel_name(1, 32)] == "there are too many filters"
    assert reasons[kernel_name(1, 48)] == ""


def test_residuals_and_groups_take_other_kernels() -> None:
    image = random("cuda-emulated", 1, 4, 8, 8, dtype=torch.float16)
    with emulated_gpu() as library:
        weight = random("cuda-emulated", 8, 4, 1, 1, dtype=torch.float16, seed=1)
        ops.conv2d_add_relu(image, weight, None, torch.ones(1, 8, 8, 8, dtype=torch.float16))
        ops.conv2d_relu(image, weight[:, :2], None, groups=2)
        ops.pointwise_conv2d_group(image, [weight, weight])
        assert not any("stem" in name for name in library.launches())

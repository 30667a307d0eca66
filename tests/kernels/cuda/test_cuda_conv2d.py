"""The CUDA convolution kernels: every one of the table, against float64, in the emulator and on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle
from fastconv.operators import kernels
from support.cuda_convolutions import FORMATS, PASSES, check, check_branches, convolution, deep, reduced
from support.cuda_kernels import check_same_bits_in_any_order, emulated_gpu, operators
from support.kernel_backends import device_of, emulated, forced, kernel_table


def variants() -> list[tuple[str, str]]:
    """(pass, the rest of the name) of every kernel but the reductions."""
    found = []
    for kind, name in itertools.product(PASSES, FORMATS):
        tiles = ["64x64", "gather"]
        if name != "fp32":
            tiles += ["128x128", "128x64"]
        if FORMATS[name] is not torch.float32:
            tiles += ["256x128", "256x64"]
            tiles += {
                "fprop": ["128x96", "256x48", "256x32", "128x64_narrow", "128x96_narrow"],
                "dgrad": ["128x96", "256x48", "256x32", "128x64_narrow"],
                "wgrad": ["96x128", "64x128", "32x256", "64x128_narrow", "96x128_narrow"],
            }[kind]
        found += [(kind, f"{name}_{tile}") for tile in tiles]
    return found


def test_the_table_has_these_kernels(backend: str) -> None:
    names = {f"conv2d_{kind}_{rest}_sm80" for kind, rest in variants()}
    names |= {"conv2d_pack_any", "conv2d_gradient_vec16", "conv2d_gradient_vec1", "conv2d_gradient_bias"}
    names |= {f"conv2d_{kind}_{dtype}_reduce_sm80" for kind in PASSES for dtype in ("fp16", "bf16", "fp32")}
    found = {kernel["name"] for kernel in kernel_table(backend) if kernel["op"].startswith("conv2d")}
    assert {name for name in found if not name.endswith("_sm90a") and "stem" not in name} == names


@pytest.mark.parametrize(("kind", "rest"), variants(), ids=lambda value: value)
def test_every_kernel(backend: str, kind: str, rest: str) -> None:
    """Tiles that are full and tiles that are not, along every extent; in shared memory no two rows meet in a bank."""
    if backend == "cuda-emulated":
        emulated().reset_statistics()
    name, tile = rest.split("_", 1)
    gathers, is_narrow = tile.endswith("gather"), tile.endswith("narrow")
    if gathers:
        channels, filters = 10, 14  # in groups of odd channels: others are packed into vectors
    elif is_narrow:
        channels, filters = 12, 76
    elif "96" in tile or "48" in tile:
        channels, filters = 56, 104
    else:
        channels, filters = (24, 136) if "128" in tile else (16, 72)
    groups = 2 if gathers else 1
    with forced(backend, f"conv2d_{kind}", f"conv2d_{kind}_{rest}_sm80"):
        for activation, stride in itertools.product(("none", "relu", "relu6"), (1, 2)):
            options = {"stride": stride, "padding": 1, "groups": groups, "activation": activation}
            shape, weight = (2, channels, 9, 8), (filters, channels // groups, 3, 3)
            check(backend, convolution(backend, name, shape, weight, **options), (kind,))
    if backend == "cuda-emulated":
        assert emulated().statistics()["ldmatrix_conflicts"] == 0


LAYERS = {
    "AlexNet's first": ((1, 3, 35, 35), (24, 3, 11, 11), {"stride": 4}),
    "AlexNet's second, in two groups": ((1, 16, 9, 9), (32, 8, 5, 5), {"padding": 2, "groups": 2}),
    "VGG": ((1, 64, 7, 7), (64, 64, 3, 3), {"padding": 1}),
    "ResNet's stem": ((1, 3, 23, 22), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "ResNet's strided 3x3": ((2, 32, 10, 10), (32, 32, 3, 3), {"stride": 2, "padding": 1}),
    "ResNet's shortcut": ((1, 32, 8, 8), (64, 32, 1, 1), {"stride": 2}),
    "the end of a bottleneck": ((2, 32, 7, 7), (128, 32, 1, 1), {}),
    "Inception's 1x7": ((1, 24, 9, 9), (24, 24, 1, 7), {"padding": 3}),
    "ResNeXt's groups of 4": ((1, 32, 6, 6), (32, 4, 3, 3), {"padding": 1, "groups": 8}),
    "one channel": ((1, 1, 12, 12), (6, 1, 5, 5), {}),
    "dilated": ((1, 8, 12, 12), (8, 8, 3, 3), {"dilation": 3, "padding": 3}),
    "stride beyond the filter": ((1, 8, 10, 10), (8, 8, 2, 2), {"stride": 3}),
    "padding beyond the filter": ((1, 8, 4, 4), (8, 8, 3, 3), {"padding": 5}),
    "one pixel": ((3, 16, 1, 1), (24, 16, 1, 1), {}),
    "a filter of more rows than a kernel has bits for": ((1, 8, 20, 9), (8, 8, 17, 1), {"padding": 2}),
    "one row of pixels for a whole filter": ((1, 8, 11, 11), (8, 8, 11, 11), {}),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["fp16", "tf32"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_networks(backend: str, layer: str, name: str, layout: torch.memory_format) -> None:
    shape, filters, options = LAYERS[layer]
    conv = convolution(backend, name, shape, filters, activation="relu", layout=layout, **options)
    check(backend, conv)


# ----------------------------------------------------------------------------------------------- splitting, layout


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_split_depth(name: str, kind: str) -> None:
    """Small grids are spread over the GPU, deterministically."""
    with emulated_gpu(multiprocessors=24) as library:
        check("cuda-emulated", deep(name, kind), (kind,))
        assert f"conv2d_{kind}_{reduced(name)}_reduce_sm80" in library.launches()


@pytest.mark.parametrize("name", FORMATS)
def test_many_parts(name: str) -> None:
    """Slices of them have a thread each; of runs that are whole and others."""
    with emulated_gpu(multiprocessors=100) as library:
        fprop = convolution("cuda-emulated", name, (1, 1024, 2, 3), (20, 1024, 3, 3), padding=1, activation="relu6")
        wgrad = convolution("cuda-emulated", name, (3, 24, 50, 50), (13, 24, 1, 1), activation="relu")
        with kernels.choices() as made:
            check("cuda-emulated", fprop, ("fprop",))
            check("cuda-emulated", wgrad, ("wgrad",))
        splits = [
            next(each.splits for each in choice.candidates if each.kernel == choice.chosen)
            for choice in made
            if choice.op in ("conv2d_fprop", "conv2d_wgrad")
        ]
        assert min(splits) > 40, splits
        assert sum("reduce" in name for name in library.launches()) == 2


@pytest.mark.parametrize(("kind", "tile"), [("fprop", "128x96"), ("dgrad", "256x48"), ("wgrad", "96x128")])
def test_a_split_depth_in_tiles_that_are_no_power_of_two(kind: str, tile: str) -> None:
    """Of the lanes that write a row's parts some are idle."""
    kernel = f"conv2d_{kind}_fp16_{tile}_sm80"
    with emulated_gpu(multiprocessors=24) as library, forced("cuda-emulated", f"conv2d_{kind}", kernel):
        check("cuda-emulated", deep("fp16", kind), (kind,))
        assert {kernel, f"conv2d_{kind}_fp16_reduce_sm80"} <= set(library.launches())


def test_the_same_bits_in_any_order() -> None:
    def call() -> list[Tensor]:
        conv = deep("fp16", "dgrad")
        arguments = conv.grad, conv.output, conv.input, conv.weight, *conv.geometry, "relu"
        return operators("cuda-emulated").conv2d_backward(*arguments, [True] * 3 + [False])[:3]

    with emulated_gpu(multiprocessors=24):
        check_same_bits_in_any_order(call)


def test_channel_slices_are_read_in_place(backend: str) -> None:
    """The pixel pitch is that of the wider tensor: Inception's concatenation costs nothing."""
    device = device_of(backend)
    wide = torch.randn(2, 64, 6, 5, device=device).half().contiguous(memory_format=torch.channels_last)
    input = wide[:, 16:48]
    weight = (0.2 * torch.randn(24, 32, 1, 1, device=device)).half()
    kernel = "conv2d_fprop_fp16_64x64_sm80"
    with forced(backend, "conv2d_fprop", kernel):  # which takes vectors only
        found = ops.pointwise_conv2d(input, weight, None, activation="relu")
    exact, baseline = (F.relu(F.conv2d(input.to(d), weight.to(d))) for d in (torch.float64, torch.float16))
    assert_close_to_oracle(found, exact, baseline, what="slice")


def test_a_forced_kernel_that_does_not_fit(backend: str) -> None:
    conv = convolution(backend, "fp16", (1, 10, 6, 6), (4, 5, 3, 3), groups=2)
    message = r"was forced, but needs channels_last.* \(a group's channels are not whole vectors\)"
    with forced(backend, "conv2d_fprop", "conv2d_fprop_fp16_64x64_sm80"), pytest.raises(RuntimeError, match=message):
        ops.conv2d_relu(conv.input, conv.weight, None, *conv.geometry)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("sizes", [[8, 24, 16], [3, 5], [8] * 10], ids=["vectors", "odd", "more than one launch"])
def test_branches(backend: str, sizes: list[int], activation: str) -> None:
    check_branches(backend, sizes, (2, 16, 5, 6), activation)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_special_values(backend: str, name: str, value: float) -> None:
    conv = convolution(backend, name, (1, 16, 6, 6), (8, 16, 3, 3), padding=1, activation="relu")
    conv.input[0, 3, 2, 2] = value
    torch.backends.cudnn.conv.fp32_precision = "tf32" if conv.tf32 else "ieee"
    found = ops.conv2d_relu(conv.input, conv.weight, conv.bias, *conv.geometry)
    expected = F.relu(F.conv2d(conv.input, conv.weight, conv.bias, *conv.geometry))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())

"""The convolution kernels for Hopper (sm_90a), every one of the table, against float64: in the emulator, and on a GPU
of that compute capability."""

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
from fastconv.qualification.variants import cuda_variants
from support import numerics
from support.cases import Case, named, run
from support.cuda_convolutions import (
    DEEP,
    PASSES,
    Convolution,
    check,
    check_branches,
    check_out_with_a_residual,
    check_slices,
    check_special_values,
    convolution,
)
from support.cuda_kernels import check_same_bits_in_any_order, emulated_hopper, operators
from support.kernel_backends import device_of, emulated, kernel_table

TILES = (
    "128x256",
    "128x256_pair",
    "128x192",
    "128x192_pair",
    "256x128",
    "256x128_pair",
    "128x128",
    "128x128_pair",
    "256x64",
)
NAMES = ("fp16", "bf16")
VARIANTS = list(itertools.product(PASSES, NAMES, TILES))


pytestmark = pytest.mark.usefixtures("on_hopper")


@contextlib.contextmanager
def forced(backend: str, name: str, tile: str, passes: tuple[str, ...] = PASSES) -> Iterator[None]:
    """These passes run the kernels of this tile, or fail."""
    with contextlib.ExitStack() as stack:
        for kind in passes:
            stack.enter_context(kernels.forced(f"conv2d_{kind}", f"conv2d_{kind}_{name}_{tile}_sm90a", backend))
        yield


def test_the_table_has_these_kernels(backend: str) -> None:
    names = {f"conv2d_{kind}_{name}_{tile}_sm90a" for kind, name, tile in VARIANTS}
    assert {kernel["name"] for kernel in kernel_table(backend) if is_ours(kernel["name"])} == names


def is_ours(name: str) -> bool:
    """Those with a halo have a file of their own."""
    return name.endswith("sm90a") and "halo" not in name


@pytest.mark.parametrize(("kind", "name", "tile"), VARIANTS)
def test_every_kernel(backend: str, kind: str, name: str, tile: str) -> None:
    """More tiles than multiprocessors, full ones and others; in shared memory no two rows meet in a bank."""
    if backend == "cuda-emulated":
        emulated().reset_statistics()
    with forced(backend, name, tile, (kind,)):
        # For bfloat16 it is the same source.
        for activation, stride in (("relu", 2), ("none", 1), ("relu6", 1))[: 3 if name == "fp16" else 1]:
            # Pixels, channels and filters are no multiples of tiles, nor of boxes.
            options = {"stride": stride, "padding": 1, "activation": activation}
            check(backend, convolution(backend, name, (3, 72, 17, 13), (136, 72, 3, 3), **options), (kind,))
        check(backend, convolution(backend, name, (2, 72, 9, 11), (328, 72, 1, 1)), (kind,))
    if backend == "cuda-emulated":
        statistics = emulated().statistics()
        assert statistics["wgmma"] > 0
        assert statistics["stmatrix_conflicts"] == 0


LAYERS = {
    "VGG": ((2, 64, 7, 7), (64, 64, 3, 3), {"padding": 1}),
    "ResNet's strided 3x3": ((2, 32, 10, 10), (32, 32, 3, 3), {"stride": 2, "padding": 1}),
    "an odd image, strided": ((2, 16, 9, 7), (24, 16, 3, 3), {"stride": 2, "padding": 1}),
    "ResNet's shortcut": ((1, 32, 8, 8), (64, 32, 1, 1), {"stride": 2}),
    "the end of a bottleneck": ((2, 32, 7, 7), (128, 32, 1, 1), {}),
    "Inception's 1x7": ((1, 24, 9, 9), (24, 24, 1, 7), {"padding": 3}),
    "Inception's 5x5": ((2, 16, 6, 8), (48, 16, 5, 5), {"padding": 2}),
    "dilated": ((1, 8, 12, 12), (8, 8, 3, 3), {"dilation": 3, "padding": 3}),
    "dilated and strided": ((2, 16, 11, 14), (8, 16, 3, 2), {"dilation": 2, "padding": 2, "stride": 3}),
    "stride beyond the filter": ((1, 8, 10, 10), (8, 8, 2, 2), {"stride": 3}),
    "padding beyond the filter": ((1, 8, 4, 4), (8, 8, 3, 3), {"padding": 5}),
    "1x1 with padding": ((2, 16, 5, 6), (8, 16, 1, 1), {"padding": 2}),
    "one pixel": ((3, 16, 1, 1), (24, 16, 1, 1), {}),
    "one row": ((2, 16, 1, 9), (24, 16, 1, 3), {}),
    "a filter as large as the image": ((3, 24, 7, 7), (40, 24, 7, 7), {}),
    "many small images": ((40, 8, 2, 3), (16, 8, 2, 2), {"padding": 1}),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_networks(backend: str, layer: str) -> None:
    shape, filters, options = LAYERS[layer]
    with forced(backend, "fp16", "128x128"):
        check(backend, convolution(backend, "fp16", shape, filters, activation="relu", **options))


def deep(backend: str, name: str, kind: str) -> Convolution:
    return convolution(backend, name, *DEEP[kind], padding=DEEP[kind][1][2] // 2, activation="relu")


@pytest.mark.parametrize("tile", ["256x128", "128x128_pair"])
@pytest.mark.parametrize("kind", PASSES)
def test_a_split_depth(kind: str, tile: str) -> None:
    """Small grids are spread over the GPU, deterministically."""
    with emulated_hopper(multiprocessors=24) as library, forced("cuda-emulated", "bf16", tile, (kind,)):
        check("cuda-emulated", deep("cuda-emulated", "bf16", kind), (kind,))
        assert f"conv2d_{kind}_bf16_reduce_sm80" in library.launches()


def test_the_same_bits_in_any_order() -> None:
    def call() -> list[Tensor]:
        conv = deep("cuda-emulated", "fp16", "dgrad")
        arguments = conv.grad, conv.output, conv.input, conv.weight, *conv.geometry, "relu"
        return operators("cuda-emulated").conv2d_backward(*arguments, [True] * 3 + [False])[:3]

    with emulated_hopper(multiprocessors=24), forced("cuda-emulated", "fp16", "128x256"):
        check_same_bits_in_any_order(call)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("offset", [0, 8])
def test_out_with_a_residual(backend: str, offset: int, tile: str) -> None:
    conv = convolution(backend, "fp16", (3, 40, 11, 9), (328, 40, 1, 1))
    with forced(backend, "fp16", tile, ("fprop",)):
        check_out_with_a_residual(conv, "relu", offset)


@pytest.mark.parametrize("side", [1, 3])
def test_slices_are_read_in_place(backend: str, side: int) -> None:
    with forced(backend, "fp16", "128x128", ("fprop",)):
        check_slices(backend, side)


def test_expanded_images(backend: str) -> None:
    """Whose pixels lie all in one place, or whose images do: no map has these, so others run."""
    device = device_of(backend)
    pixel = torch.randn(1, 64, 1, 1, device=device).half().contiguous(memory_format=torch.channels_last)
    image = torch.randn(1, 64, 5, 6, device=device).half().contiguous(memory_format=torch.channels_last)
    weight = (0.1 * torch.randn(64, 64, 1, 1, device=device)).half()
    names = {f"conv2d_{kind}": f"conv2d_{kind}_fp16_128x128_sm90a" for kind in PASSES}
    for x in (pixel.expand(2, 64, 5, 6), image.expand(3, 64, 5, 6), image[..., :1].expand(1, 64, 5, 6)):
        grad = x
        with kernels.preferred(names, backend):
            found = [ops.conv2d_relu(x, weight, None, activation="none")]
            geometry = [1, 1], [0, 0], [1, 1], 1
            backward = operators(backend).conv2d_backward
            found += backward(grad, None, x, weight, *geometry, "none", [True, True, False, False])[:2]
        for result, (oracle, baseline) in zip(
            found,
            zip(*(_convolved(x.to(d), weight.to(d), grad.to(d)) for d in (torch.float64, torch.float16)), strict=True),
            strict=True,
        ):
            assert_close_to_oracle(result, oracle, baseline, what="expanded")


def _convolved(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """With both gradients."""
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return [F.conv2d(x, weight), *gradients[:2]]


@pytest.mark.parametrize("tile", ["128x256", "128x128_pair"])
@pytest.mark.parametrize("sizes", [[8, 72, 16], [64, 128], [8] * 10], ids=["vectors", "boxes", "more than one launch"])
def test_branches(backend: str, sizes: list[int], tile: str) -> None:
    with forced(backend, "fp16", tile):
        check_branches(backend, sizes, (2, 72, 9, 8), "relu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_special_values(backend: str, value: float) -> None:
    """Whatever else is in their boxes."""
    conv = convolution(backend, "fp16", (2, 16, 6, 6), (8, 16, 3, 3), padding=1, activation="relu")
    conv.input[0, 3, 2, 2] = value
    with forced(backend, "fp16", "128x256", ("fprop",)):
        check_special_values(conv)


@pytest.mark.parametrize(
    ("tile", "layout"), [("128x128", "contiguous"), ("128x128", "channels_last"), ("256x128_pair", "channels_last")]
)
@pytest.mark.parametrize(
    "case", named("conv2d_relu", "conv2d_add_relu", "pointwise_conv2d", "pointwise_conv2d_group"), ids=str
)
def test_ops(backend: str, case: Case, layout: str, tile: str) -> None:
    """The suite of the ops, with these kernels wherever they can run a call."""
    dtype, device = torch.float16, device_of(backend)
    names = {f"conv2d_{kind}": f"conv2d_{kind}_fp16_{tile}_sm90a" for kind in PASSES}
    with kernels.preferred(names, backend):
        numerics.check_forward(case, dtype, layout, device)
        numerics.check_out(case, dtype, layout, device)
        numerics.check_backward(case, dtype, layout, device)
        if case.shapes["input"][0] and tile == "128x128":
            arguments = numerics.arguments_off_the_kinks(case, dtype, layout, device)
            outputs = run(case.op, arguments)
            for make in numerics.ODD_GRADIENTS if outputs[0].dim() == 4 else ():
                numerics.check_gradients(case, arguments, [make(output) for output in outputs])


REFUSED = {
    "it has groups": ((1, 32, 6, 6), (16, 16, 3, 3), {"groups": 2}),
    "a group's channels are not whole vectors": ((1, 12, 6, 6), (16, 12, 3, 3), {}),
    "the filters, or results, are not whole vectors": ((1, 16, 6, 6), (12, 16, 3, 3), {}),
    "more than an im2col map can have": ((1, 8, 30, 30), (8, 8, 3, 3), {"stride": 9}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_forced_kernel_that_does_not_fit(backend: str, reason: str) -> None:
    shape, filters, options = REFUSED[reason]
    conv = convolution(backend, "fp16", shape, filters, **options)
    with forced(backend, "fp16", "128x128", ("fprop",)), pytest.raises(RuntimeError, match=reason):
        ops.conv2d_relu(conv.input, conv.weight, None, *conv.geometry)


def test_strides_that_no_map_has(backend: str) -> None:
    image = torch.randn(2, 8, 9, 12, device=device_of(backend)).half().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 8, 1, 1, device=device_of(backend)).half()
    with (
        forced(backend, "fp16", "128x128", ("fprop",)),
        pytest.raises(RuntimeError, match="no multiples of each other"),
    ):
        ops.conv2d_relu(image[..., ::5], weight, None)


def test_they_are_chosen_where_they_are_preferred(backend: str) -> None:
    """By what `fastconv.qualify` found; until then their score is told, and another runs."""
    conv = convolution(backend, "fp16", (4, 64, 32, 32), (64, 64, 1, 1))

    def call() -> Tensor:
        return ops.conv2d_relu(conv.input, conv.weight, None)

    def choice() -> kernels.Choice:
        with kernels.choices() as made:
            call()
        return made[-1]

    free = choice()
    best = max(free.candidates, key=lambda candidate: candidate.score)
    assert best.unproven
    assert best.kernel.endswith("sm90a")
    assert "only where it is qualified" in best.outlook
    assert free.chosen.endswith("sm80")
    assert cuda_variants(call, backend, 4)[0] == {"conv2d_fprop": best.kernel}, "it is tried first"
    with kernels.preferred({"conv2d_fprop": best.kernel}, backend):
        assert choice().chosen == best.kernel

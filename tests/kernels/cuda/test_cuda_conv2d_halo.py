"""The convolution kernels for Hopper that bring a pixel once for all positions of a filter, against float64: in the
emulator, and on a GPU of that compute capability."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastconv import ops
from fastconv.operators import kernels
from support import numerics
from support.cases import Case, named
from support.cuda_convolutions import (
    check,
    check_out_with_a_residual,
    check_slices,
    check_special_values,
    convolution,
)
from support.cuda_kernels import check_same_bits_in_any_order, emulated_hopper, operators
from support.kernel_backends import device_of, emulated, kernel_table

TILES = {"fprop": "256x64", "dgrad": "256x64", "wgrad": "64x576"}
PASSES = ("fprop", "dgrad")
NAMES = ("fp16", "bf16")

pytestmark = pytest.mark.usefixtures("on_hopper")


@contextlib.contextmanager
def forced(backend: str, name: str = "fp16", passes: tuple[str, ...] = PASSES) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind in passes:
            stack.enter_context(kernels.forced(f"conv2d_{kind}", kernel_name(kind, name), backend))
        yield


def kernel_name(kind: str, name: str) -> str:
    return f"conv2d_{kind}_{name}_{TILES[kind]}_halo_sm90a"


def test_the_table_has_these_kernels(backend: str) -> None:
    names = {kernel_name(kind, name) for kind, name in itertools.product(TILES, NAMES)}
    assert {kernel["name"] for kernel in kernel_table(backend) if "halo" in kernel["name"]} == names


# Image, filters, options
LAYERS = {
    "VGG's, of 64 channels": ((2, 64, 20, 19), (64, 64, 3, 3), {"padding": 1}),
    "more channels than stay in the ring": ((2, 136, 14, 15), (72, 136, 3, 3), {"padding": 1}),
    "patches that fill the ring": ((1, 72, 4, 130), (136, 72, 3, 3), {"padding": 1}),
    "filters of several tiles": ((3, 64, 9, 11), (200, 64, 3, 3), {"padding": 1}),
    "few channels": ((3, 16, 17, 9), (24, 16, 3, 3), {"padding": 1}),
    "Inception's 5x5": ((2, 32, 14, 14), (96, 32, 5, 5), {"padding": 2}),
    "Inception's 1x7": ((2, 64, 17, 17), (64, 64, 1, 7), {"padding": 3}),
    "Inception's 7x1": ((2, 72, 17, 17), (64, 72, 7, 1), {"padding": 3}),
    "dilated, without padding": ((2, 64, 19, 23), (64, 64, 3, 2), {"dilation": 3}),
    "padding beyond the filter": ((2, 8, 5, 4), (8, 8, 3, 3), {"padding": 5}),
    "a row": ((3, 24, 1, 40), (16, 24, 1, 3), {"padding": 1}),
    "a column": ((3, 24, 40, 1), (16, 24, 3, 1), {"padding": 0}),
    "many small images": ((60, 64, 3, 2), (64, 64, 2, 2), {"padding": 1}),
    "a filter as large as the image": ((3, 24, 7, 7), (40, 24, 7, 7), {}),
    "rows as long as the ring allows": ((1, 16, 5, 264), (8, 16, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kernel(backend: str, layer: str, name: str) -> None:
    shape, filters, options = LAYERS[layer]
    passes = tuple(TILES) if filters[2:] == (3, 3) else PASSES
    with forced(backend, name, passes):
        check(backend, convolution(backend, name, shape, filters, activation="relu", **options), passes)


def test_phases_of_a_stride(backend: str) -> None:
    """The gradient of a strided convolution's input: phases with four positions, two, one and none."""
    for shape, filters, options in (
        ((2, 64, 19, 18), (64, 64, 3, 3), {"stride": 2, "padding": 1}),
        ((2, 16, 20, 17), (24, 16, 5, 4), {"stride": 3, "padding": 2}),
        ((1, 8, 22, 50), (128, 8, 2, 5), {"stride": 3}),
    ):
        with forced(backend, passes=("dgrad",)):
            check(backend, convolution(backend, "fp16", shape, filters, activation="relu6", **options), ("dgrad",))


@st.composite
def convolutions(draw: st.DrawFn, kind: str) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Image, filters, options"""
    r, s = (3, 3) if kind == "wgrad" else draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    options = {"dilation": draw(st.sampled_from((1, 2, 3, 5))), "padding": draw(st.integers(0, 9))}
    options["stride"] = draw(st.integers(1, 3)) if kind == "dgrad" else 1
    channels, filters = (8 * draw(st.sampled_from((1, 2, 5, 8, 9, 17))) for _ in range(2))
    least = [max(1, options["dilation"] * (side - 1) + 1 - 2 * options["padding"]) for side in (r, s)]
    rows, columns = draw(st.integers(least[0], 24)), draw(st.integers(least[1], 70))
    return (draw(st.integers(1, 3)), channels, rows, columns), (filters, channels, r, s), options


@pytest.mark.parametrize("kind", TILES)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_convolutions(kind: str, data: st.DataObject) -> None:
    shape, filters, options = data.draw(convolutions(kind))
    multiprocessors = data.draw(st.sampled_from((1, 3, 16, 132)))
    conv = convolution("cuda-emulated", "fp16", shape, filters, **options)
    with (
        emulated_hopper(multiprocessors),
        kernels.preferred({f"conv2d_{kind}": kernel_name(kind, "fp16")}, "cuda-emulated"),
    ):
        check("cuda-emulated", conv, (kind,))


@pytest.mark.parametrize("multiprocessors", [1, 2, 132])
def test_runs_of_tiles(multiprocessors: int) -> None:
    """One block that does all tiles, a block for each column of them, and a block for each tile."""
    # In wgrad the second row of a filter begins in the last pixel of a box, as the rows are of 63.
    conv = convolution("cuda-emulated", "fp16", (1, 64, 24, 61), (128, 64, 3, 3), padding=1, activation="relu")
    passes = tuple(TILES)
    with emulated_hopper(multiprocessors), forced("cuda-emulated", passes=passes):
        emulated().reset_statistics()
        check("cuda-emulated", conv, passes)
    statistics = emulated().statistics()
    assert statistics["wgmma"] > 0
    assert statistics["stmatrix_conflicts"] == 0


@pytest.mark.parametrize("channels", [64, 128], ids=["sliding", "patches"])
def test_the_same_bits_in_any_order(channels: int) -> None:
    conv = convolution("cuda-emulated", "fp16", (2, channels, 21, 22), (64, channels, 3, 3), padding=1)
    residual = conv.grad

    def call() -> list[Tensor]:
        arguments = conv.grad, None, conv.input, conv.weight, *conv.geometry, "none"
        found = operators("cuda-emulated").conv2d_backward(*arguments, [True, True, False, False])[:2]
        return [*found, ops.conv2d_add_relu(conv.input, conv.weight, conv.bias, residual, padding=1)]

    with emulated_hopper(2), forced("cuda-emulated", passes=tuple(TILES)):
        check_same_bits_in_any_order(call)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("offset", [0, 8])
def test_out_with_a_residual(backend: str, offset: int, activation: str) -> None:
    """ResNet's basic block"""
    conv = convolution(backend, "fp16", (2, 64, 17, 20), (72, 64, 3, 3), padding=1)
    with forced(backend, passes=("fprop",)):
        check_out_with_a_residual(conv, activation, offset)


def test_slices_are_read_in_place(backend: str) -> None:
    with forced(backend, passes=("fprop",)):
        check_slices(backend, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_special_values(backend: str, value: float) -> None:
    """At the end of a row, too, where those of the next one follow."""
    conv = convolution(backend, "fp16", (2, 16, 6, 6), (8, 16, 3, 3), padding=1, activation="relu")
    conv.input[0, 3, 2, 5] = conv.input[1, 2, 5, 0] = value
    with forced(backend, passes=("fprop",)):
        check_special_values(conv)


@pytest.mark.parametrize("case", named("conv2d_relu", "conv2d_add_relu"), ids=str)
def test_ops(backend: str, case: Case) -> None:
    """The suite of the ops, with these kernels wherever they can run a call."""
    dtype, layout, device = torch.float16, "channels_last", device_of(backend)
    with kernels.preferred({f"conv2d_{kind}": kernel_name(kind, "fp16") for kind in TILES}, backend):
        numerics.check_forward(case, dtype, layout, device)
        numerics.check_out(case, dtype, layout, device)
        numerics.check_backward(case, dtype, layout, device)


# Why not, the pass, image, filters, options
REFUSED = [
    ("it has groups", "fprop", (1, 32, 6, 6), (16, 16, 3, 3), {"groups": 2}),
    ("the filter has one position", "fprop", (1, 16, 6, 6), (16, 16, 1, 1), {}),
    ("it has a stride", "fprop", (1, 16, 9, 9), (16, 16, 3, 3), {"stride": 2}),
    ("a group's channels are not whole vectors", "fprop", (1, 12, 6, 6), (16, 12, 3, 3), {}),
    ("the filters, or results, are not whole vectors", "fprop", (1, 16, 6, 6), (12, 16, 3, 3), {}),
    ("do not fit into shared memory", "fprop", (1, 8, 5, 300), (8, 8, 3, 3), {"padding": 1}),
    ("do not fit into shared memory", "wgrad", (1, 8, 5, 520), (8, 8, 3, 3), {"padding": 1}),
    ("too long for a map", "dgrad", (1, 8, 9, 9), (8, 8, 3, 3), {"padding": 130}),
    ("too long for a map", "fprop", (1, 8, 140, 6), (8, 8, 3, 1), {"dilation": 64}),
    ("too long for a map", "dgrad", (1, 16, 6, 6), (16, 16, 4, 4), {"stride": 2, "dilation": 6, "padding": 256}),
    ("the filter is not 3x3", "wgrad", (1, 8, 9, 9), (8, 8, 3, 2), {}),
    ("columns lie too far apart", "wgrad", (1, 8, 2, 70), (8, 8, 3, 3), {"dilation": 33, "padding": 33}),
]


@pytest.mark.parametrize(("reason", "kind", "shape", "filters", "options"), REFUSED)
def test_a_forced_kernel_that_does_not_fit(
    backend: str, reason: str, kind: str, shape: tuple[int, ...], filters: tuple[int, ...], options: dict[str, int]
) -> None:
    conv = convolution(backend, "fp16", shape, filters, **options)
    with forced(backend, passes=(kind,)), pytest.raises(RuntimeError, match=reason):
        check(backend, conv, (kind,))

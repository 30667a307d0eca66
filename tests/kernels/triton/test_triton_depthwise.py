"""Triton's depthwise kernels: what a patch of pixels meets, however taps, strides, edges and tensors lie."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.kernel_backends import on_triton
from support.numerics import judge, random

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with on_triton() as found:
        yield found


DEPTHWISE_CASES = [
    # (channels, multiplier), image, filter, stride, padding, dilation
    pytest.param((16, 1), (9, 13), (3, 3), (1, 1), (1, 1), (1, 1), id="patches that the image cuts off"),
    pytest.param((24, 1), (9, 16), (3, 3), (2, 2), (1, 1), (1, 1), id="between strides"),
    pytest.param((5, 2), (8, 12), (3, 3), (2, 2), (1, 1), (1, 1), id="multiplier and stride"),
    pytest.param((4, 3), (14, 15), (3, 3), (3, 3), (1, 1), (1, 1), id="a stride that is no vector"),
    pytest.param((6, 1), (12, 11), (3, 2), (1, 1), (2, 1), (2, 3), id="dilation"),
    pytest.param((4, 1), (14, 16), (3, 3), (2, 1), (0, 2), (3, 2), id="dilation and stride"),
    pytest.param((8, 1), (12, 12), (5, 5), (2, 2), (2, 2), (1, 1), id="5x5 between strides"),
    pytest.param((8, 2), (9, 12), (7, 7), (2, 1), (3, 3), (1, 1), id="rows in a loop", marks=pytest.mark.slow),
    pytest.param(
        (8, 1), (8, 8), (8, 9), (2, 4), (4, 9), (1, 1), id="padding as large as the filter", marks=pytest.mark.slow
    ),
    pytest.param((3, 1), (11, 12), (2, 3), (5, 5), (1, 2), (1, 1), id="strides beyond the filter"),
    pytest.param((2, 1), (5, 40), (1, 31), (1, 1), (0, 15), (1, 1), id="a row of many taps"),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("channels", "image", "filter", "stride", "padding", "dilation"), DEPTHWISE_CASES)
def test_depthwise_patches(
    channels: tuple[int, int],
    image: tuple[int, int],
    filter: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    layout: torch.memory_format,
) -> None:
    """What a patch meets, along channels and along pixels: every way in which taps, strides and edges fall."""
    C, M = channels
    arguments = {
        "input": random(2, C, *image).contiguous(memory_format=layout),
        "weight": random(C * M, 1, *filter) * 0.3,
        "bias": random(C * M),
    }
    judge("depthwise_conv2d", {**arguments, "stride": stride, "padding": padding, "dilation": dilation})


@pytest.mark.slow
@pytest.mark.parametrize("channels", [8, 19])
def test_depthwise_tensors_that_lie_otherwise(channels: int) -> None:
    """Slices are read and written as they lie, the rest is copied; none of it changes a result."""
    from fastconv.operators.convolution import FusedConvolution, Geometry
    from fastconv.triton_kernels import depthwise

    def lying(values: Tensor) -> Iterator[Tensor]:
        N, C, H, W = values.shape
        yield values.mT.contiguous().mT
        yield torch.stack([values] * 2, -1).flatten(3)[..., ::2]
        for layout in (torch.contiguous_format, torch.channels_last):
            wide = torch.full((N, C + 5, H, W + 3), torch.nan).contiguous(memory_format=layout)
            wide[:, 3 : 3 + C, :, 1 : 1 + W] = values
            yield wide[:, 3 : 3 + C, :, 1 : 1 + W]

    geometry = Geometry([1, 1], [1, 1], [1, 1], channels)
    x, grad, weight = random(2, channels, 7, 9), random(2, channels, 7, 9), random(channels, 1, 3, 3)
    expected = F.conv2d(x, weight, None, 1, 1, 1, channels) + x
    wanted = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], channels, [True, True, False]
    )
    for input, g in zip(lying(x), lying(grad), strict=True):
        for output in lying(torch.empty_like(x)):
            depthwise.fprop(FusedConvolution(input, weight, None, input, geometry, "none"), output)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
            depthwise.dgrad(g, weight, output, geometry)
            torch.testing.assert_close(output, wanted[0], rtol=1e-4, atol=1e-4)
        for other in lying(x):
            grad_weight = torch.empty_like(weight)
            depthwise.wgrad(g, other, grad_weight, geometry)
            torch.testing.assert_close(grad_weight, wanted[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", ["channels", "pixels"])
@pytest.mark.parametrize(
    "sizes", [{"BLOCK": 1}, {"BLOCK": 32, "BLOCK_H": 1, "BLOCK_W": 1}, {"BLOCK": 256, "BLOCK_H": 8, "BLOCK_W": 2},
              {"BLOCK_N": 8, "BLOCK_H": 1, "BLOCK_W": 16}], ids=str
)  # fmt: skip
def test_depthwise_patches_of_any_size(sizes: dict[str, int], layout: str) -> None:
    """What `python -m fastconv qualify --search` may try."""
    from fastconv.triton_kernels import table

    memory_format = torch.channels_last if layout == "channels" else torch.contiguous_format
    kernels = [f"depthwise_{name}" for name in ("fprop", "dgrad", "wgrad")]
    entries = {f"{kernel} {layout}": table.SHIPPED[kernel][layout] for kernel in kernels}
    preferred = {entry: {k: sizes.get(k, v) for k, v in config.items()} for entry, config in entries.items()}
    input = random(1, 3, 4, 5).contiguous(memory_format=memory_format)
    arguments = {"input": input, "weight": random(3, 1, 3, 3) * 0.3}
    with table.preferred(preferred), table.noted() as asked:
        judge("depthwise_conv2d", {**arguments, "stride": 2, "padding": 1})
    assert {one.entry: one.config for one in asked if one.entry.startswith("depthwise")} == preferred


def test_depthwise_numbers_compile_nothing() -> None:
    """No integer of these kernels is looked at, a batch size or another: all but constants and pointers."""
    from fastconv.triton_kernels import depthwise

    separable = importlib.import_module("fastconv.triton_kernels.depthwise_separable_conv2d")
    kernels = [depthwise.depthwise_fprop, depthwise.depthwise_dgrad, depthwise.depthwise_wgrad]
    for kernel in (*kernels, separable.depthwise_separable_fprop):
        names = kernel.fn.__code__.co_varnames[: kernel.fn.__code__.co_argcount]
        constants = set(kernel.fn.__annotations__)
        assert {n for n in names if n not in constants and not n.endswith("_ptr")} <= set(depthwise.NUMBERS)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("channels", "outputs", "taps", "stride"), [(40, 100, 3, 1), (40, 600, 3, 1), (70, 33, 5, 2), (6, 8, 7, 1)]
)
def test_separable_tiles(channels: int, outputs: int, taps: int, stride: int, layout: torch.memory_format) -> None:
    """Several columns, and more of them than the fused kernel takes; steps that are not full; rows in a loop."""
    judge(
        "depthwise_separable_conv2d",
        {
            "input": random(2, channels, 6, 7).contiguous(memory_format=layout),
            "depthwise_weight": random(channels, 1, taps, taps) * 0.3,
            "pointwise_weight": random(outputs, channels, 1, 1) * 0.2,
            "padding": taps // 2, "stride": stride,
        },
        grad=False,
    )  # fmt: skip

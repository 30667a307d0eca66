"""What the CUDA convolutions read in place of tensors that no vectors fit, and what they make of gradients first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle
from support.cases import layout_of
from support.cuda_convolutions import FORMATS, check, convolution
from support.cuda_kernels import emulated_gpu, operators, random
from support.kernel_backends import forced

EMULATED = "cuda-emulated"
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


def gathered(launches: dict[str, int]) -> list[str]:
    return [name for name in launches if "gather" in name]


@LAYOUTS
@pytest.mark.parametrize("filters", [8, 10])
@pytest.mark.parametrize("channels", [1, 2, 3, 6, 12, 17])
@pytest.mark.parametrize("name", FORMATS)
def test_any_number_of_channels_comes_in_vectors(
    name: str, channels: int, filters: int, layout: torch.memory_format
) -> None:
    with emulated_gpu() as library:
        shape, weight = (2, channels, 7, 6), (filters, channels, 3, 3)
        conv = convolution(EMULATED, name, shape, weight, stride=2, padding=1, activation="relu", layout=layout)
        check(EMULATED, conv)
        launches = library.launches()
    assert gathered(launches) == []
    assert ("conv2d_pack_any" in launches) == (channels % 4 != 0 or layout is torch.contiguous_format)


@pytest.mark.parametrize("name", FORMATS)
def test_a_slice_that_is_not_aligned_is_packed(backend: str, name: str) -> None:
    conv = convolution(backend, name, (2, 24, 5, 6), (8, 24, 1, 1))
    wide = torch.zeros_like(conv.input).repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)
    conv.input = wide[:, 3:27].copy_(conv.input)
    check(backend, conv)


@pytest.mark.parametrize("name", FORMATS)
def test_strides_of_one_element_say_nothing(name: str) -> None:
    """Of one image, one row, one column; also where they are odd, and no vector could follow them."""
    with emulated_gpu() as library:
        for shape, strides in (
            ((1, 16, 1, 1), (3, 1, 5, 7)),
            ((1, 16, 2, 1), (1, 1, 16, 9)),
            ((2, 16, 1, 1), (16, 1, 1, 1)),
        ):
            conv = convolution(EMULATED, name, shape, (8, 16, 1, 1))
            conv.input = torch.empty_strided(shape, strides, dtype=FORMATS[name]).copy_(conv.input)
            check(EMULATED, conv)
        launches = library.launches()
    assert gathered(launches) == []
    assert "conv2d_pack_any" not in launches


@LAYOUTS
def test_gradients_of_packed_channels_have_eagers_layout(backend: str, layout: torch.memory_format) -> None:
    """Also where the packed one would pass for contiguous; and they own their memory."""
    for shape, weight in (((1, 3, 1, 1), (1, 3, 1, 1)), ((2, 3, 5, 4), (8, 3, 3, 3)), ((1, 6, 4, 4), (1, 6, 1, 1))):
        conv = convolution(backend, "fp16", shape, weight, layout=layout)
        arguments = conv.grad, None, conv.input, conv.weight, *conv.geometry, "none", [True, True, False, False]
        for found, like in zip(
            operators(backend).conv2d_backward(*arguments)[:2], (conv.input, conv.weight), strict=True
        ):
            assert layout_of(found) == layout_of(like)
            assert not found._is_view()
            assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


def test_padding_beyond_any_image(backend: str) -> None:
    """Where every tap meets padding, whatever the sum of two large coordinates is."""
    x, weight = random(backend, 2, 8, 1, 1, dtype=torch.float16), random(backend, 8, 8, 2, 1, dtype=torch.float16)
    grad = random(backend, 2, 8, 1, 1, dtype=torch.float16)
    geometry = [1, 1], [2**29, 0], [2**30, 1], 1, "none"
    found = operators(backend).conv2d_backward(grad, None, x, weight, *geometry, [True, True, False, False])
    assert not any(gradient.any() for gradient in found[:2])


@pytest.mark.parametrize("kernel", ["vec16", "vec1"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_gradients_are_masked_and_summed(backend: str, name: str, activation: str, kernel: str) -> None:
    """Of more pixels than a block has, for one and for several blocks of channels."""
    for channels in (8, 272) if kernel == "vec16" else (3, 41):
        conv = convolution(backend, name, (2, 8, 19, 23), (channels, 8, 1, 1), activation=activation)
        with forced(backend, "conv2d_gradient", f"conv2d_gradient_{kernel}"):
            check(backend, conv, ("wgrad",))


def test_the_sum_of_many_numbers(backend: str) -> None:
    """Adding one to the next would lose what is below the 24 bits of the sum."""
    grad = random(backend, 1, 4, 260, 250, dtype=torch.float32, layout="channels_last") + 100
    x, weight = torch.ones_like(grad), random(backend, 4, 4, 1, 1, dtype=torch.float32)
    arguments = grad, None, x, weight, [1, 1], [0, 0], [1, 1], 1, "none"
    found = operators(backend).conv2d_backward(*arguments, [False, False, True, False])[2]
    exact: Tensor = grad.double().sum((0, 2, 3))
    assert_close_to_oracle(found, exact, grad.sum((0, 2, 3)), what="bias")
    assert ((found - exact).abs() <= 2e-7 * exact).all()


def test_extents_that_32_bits_do_not_count_are_refused(backend: str) -> None:
    """Before anything of that size is made; kernels look ahead, so that the last thousand does not count."""
    x, weight = random(backend, 1, 8, 1, 1, dtype=torch.float16), random(backend, 8, 8, 1, 1, dtype=torch.float16)
    for rows in (2**16, 2**15 - 1):  # 2^31 pixels, and 2^31 - 2^16, which fit by their number
        wide = x.contiguous(memory_format=torch.channels_last).expand(1, 8, rows, 2**15 if rows == 2**16 else 65538)
        with pytest.raises(
            RuntimeError, match=r"got a convolution with 21474\d+ input pixels, needed at most 2\^31 - 1025"
        ):
            ops.conv2d_relu(wide, weight)

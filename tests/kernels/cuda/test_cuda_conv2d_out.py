"""The CUDA convolution kernels writing into the caller's tensor: at any offset of its channels, and nothing else."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastconv import ops
from fastconv.measure.tolerance import assert_close_to_oracle
from fastconv.operators import backends
from support.cases import Concatenation
from support.cuda_convolutions import FORMATS, Convolution, convolution, deep, reduced
from support.cuda_kernels import emulated_gpu
from support.eager import activate
from support.kernel_backends import emulated, forced


def check_out(
    conv: Convolution,
    offset: int,
    residual: Tensor | None = None,
    layout: str = "channels_last",
    multiple: int = 8,
) -> None:
    """Into a slice of the channels of a wider tensor, the rest of which stays as it is."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if conv.tf32 else "ieee"
    inner = replace(conv, activation="none") if residual is not None else conv
    oracle, baseline = inner.forward(torch.float64), inner.forward(conv.input.dtype)
    joined = Concatenation.of([baseline], offset, layout, multiple)
    arguments = {"stride": conv.geometry[0], "padding": conv.geometry[1], "groups": conv.geometry[3]}
    arguments |= {"activation": conv.activation, "out": joined.slices[0]}
    if residual is None:
        found = ops.conv2d_relu(conv.input, conv.weight, conv.bias, **arguments)
    else:
        found = ops.conv2d_add_relu(conv.input, conv.weight, conv.bias, residual, **arguments)
        oracle, baseline = (activate(y + residual.to(y.dtype), conv.activation) for y in (oracle, baseline))
    assert found is joined.slices[0]
    joined.check_the_rest()
    assert_close_to_oracle(found, oracle, baseline, what="out", border=1)


OFFSETS = (0, 8, 1, 3)  # in fp16 the second is the only one of the last three at which vectors of 16 bytes fit


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", FORMATS)
def test_out_at_any_offset(backend: str, name: str, offset: int) -> None:
    """At pitches that vectors allow and at others; the second has a stride, and filters that no vector divides."""
    one = convolution(backend, name, (2, 16, 6, 5), (24, 16, 3, 3), padding=1, activation="relu")
    two = convolution(backend, name, (2, 16, 7, 7), (19, 16, 3, 3), stride=2, activation="relu6")
    for conv, multiple in itertools.product((one, two), (8, 13)):
        check_out(conv, offset, multiple=multiple)


@pytest.mark.parametrize("kernel", ["256x128", "64x64", "gather"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_out_of_every_kernel(backend: str, offset: int, kernel: str) -> None:
    with forced(backend, "conv2d_fprop", f"conv2d_fprop_fp16_{kernel}_sm80"):
        groups = 2 if kernel == "gather" else 1
        conv = convolution(backend, "fp16", (1, 10, 6, 5), (136, 10 // groups, 3, 3), groups=groups, activation="relu")
        check_out(conv, offset)


@pytest.mark.parametrize("offset", OFFSETS)
def test_out_in_groups(backend: str, offset: int) -> None:
    check_out(convolution(backend, "fp16", (1, 32, 6, 6), (48, 16, 3, 3), groups=2), offset)
    check_out(convolution(backend, "fp16", (1, 16, 6, 6), (16, 1, 3, 3), groups=16), offset)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("where", ["beside", "elsewhere"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_out_with_a_residual(backend: str, offset: int, where: str, layout: str) -> None:
    """The kernels read a residual with the strides of the result."""
    conv = convolution(backend, "fp16", (2, 16, 6, 5), (24, 16, 3, 3), padding=1, activation="relu")
    residual = conv.grad
    if where == "beside":
        joined = Concatenation.of([residual], offset, layout)
        residual = joined.slices[0].copy_(residual)
    check_out(conv, offset, residual, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_out_of_a_photograph(backend: str, layout: str) -> None:
    """A few contiguous channels are read as they lie, the result is written as it lies."""
    conv = convolution(backend, "fp16", (1, 3, 11, 11), (24, 3, 5, 5), stride=2, layout=torch.contiguous_format)
    check_out(conv, 3, layout=layout)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", FORMATS)
def test_out_of_a_split_depth(name: str, offset: int) -> None:
    with emulated_gpu(multiprocessors=24) as library:
        conv = deep(name)
        check_out(conv, offset)
        check_out(conv, offset, conv.grad)
        assert library.launches()[f"conv2d_fprop_{reduced(name)}_reduce_sm80"] == 2


@pytest.mark.parametrize("name", ["fp16", "tf32"])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("sizes", [[8, 24, 16], [3, 5, 8], [8] * 10], ids=["vectors", "odd", "more than one launch"])
def test_branches_into_one_tensor(backend: str, sizes: list[int], offset: int, name: str) -> None:
    """An Inception module's concatenation."""
    conv = convolution(backend, name, (2, 16, 5, 6), (sum(sizes), 16, 1, 1), activation="relu")
    torch.backends.cudnn.conv.fp32_precision = "tf32" if conv.tf32 else "ieee"
    oracle, baseline = conv.forward(torch.float64), conv.forward(conv.input.dtype)
    joined = Concatenation.of(list(baseline.split(sizes, 1)), offset, "channels_last")
    weights, biases = conv.weight.split(sizes), conv.bias.split(sizes)
    ops.pointwise_conv2d_group(conv.input, weights, biases, activation="relu", out=joined.slices)
    joined.check_the_rest()
    assert_close_to_oracle(joined.inside, oracle, baseline, what="concatenation")


def test_branches_share_a_launch() -> None:
    library = emulated()
    conv = convolution("cuda-emulated", "fp16", (2, 16, 5, 6), (80, 16, 1, 1))
    joined = Concatenation.of(list(conv.grad.split(8, 1)), 8, "channels_last")
    library.reset_statistics()
    ops.pointwise_conv2d_group(conv.input, conv.weight.split(8), out=joined.slices, backend="cuda-emulated")
    assert sum(library.launches().values()) == 2  # ten branches, at most eight at once


def memory_operators(backend: str, conv: Convolution, out: Tensor, residual: Tensor | None = None) -> list[str]:
    """The operators that allocate or copy while the result is computed into `out`."""
    ops.conv2d_relu(conv.input, conv.weight, conv.bias)  # what is done once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if residual is None:
            ops.conv2d_relu(conv.input, conv.weight, conv.bias, out=out)
        else:
            ops.conv2d_add_relu(conv.input, conv.weight, conv.bias, residual, out=out)
    names = [event.name for event in profile.events()]
    assert f"{backends.namespace(backend)}::conv2d_{'add_' if residual is not None else ''}relu" in names
    return [name for name in names if name.startswith(("aten::empty", "aten::new_empty", "aten::copy_"))]


def test_out_costs_no_copy(backend: str) -> None:
    """Where its channels lie side by side, and those of a residual likewise, the kernel writes it in place."""
    conv = convolution(backend, "fp16", (2, 16, 6, 5), (24, 16, 3, 3))
    shape = [2, 40, 4, 3]
    slices = conv.input.new_zeros(shape).contiguous(memory_format=torch.channels_last)
    planes = conv.input.new_zeros(shape)
    residual = torch.zeros_like(slices)
    assert memory_operators(backend, conv, conv.grad) == []
    assert memory_operators(backend, conv, slices[:, 3:27]) == []
    assert memory_operators(backend, conv, slices[:, 3:27], residual[:, :24]) == []
    assert memory_operators(backend, conv, planes[:, 3:27]).count("aten::copy_") == 1
    assert memory_operators(backend, conv, slices[:, 3:27], conv.grad).count("aten::copy_") == 1

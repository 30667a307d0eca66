"""Which Triton kernels a call launches, as `launch.recorded` lists them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastconv import ops
from support.kernel_backends import on_triton


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with on_triton() as device:
        yield device


def kernels(op: str, *args: Any, **options: Any) -> tuple[list[str], list[str]]:
    """Of the forward, and of a backward for all of the arguments."""
    from fastconv.triton_kernels import launch

    lists = [arg if isinstance(arg, list) else [arg] for arg in args]
    leaves = [leaf.requires_grad_() for leaves in lists for leaf in leaves if isinstance(leaf, Tensor)]
    with launch.recorded() as forward:
        results = getattr(ops, op)(*args, **options)
    results = results if isinstance(results, list) else [results]
    with launch.recorded() as backward:
        torch.autograd.grad(sum(result.square().sum() for result in results), leaves)
    return [one.kernel for one in forward], [one.kernel for one in backward if one.kernel != "sum_parts_kernel"]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


GRADIENTS = ["conv2d_dgrad", "conv2d_wgrad"]
DEPTHWISE = ["depthwise_dgrad", "depthwise_wgrad"]


def test_convolutions() -> None:
    """By the filter; float64 by aten."""
    x, w, depthwise = values(1, 4, 4, 4), values(4, 4, 3, 3), values(4, 1, 3, 3)
    assert kernels("conv2d_relu", x, w) == (["conv2d_fprop"], ["mask_and_sum_kernel", *GRADIENTS])
    assert kernels("conv2d_relu", x, w, activation="none") == (["conv2d_fprop"], GRADIENTS)
    assert kernels("conv2d_relu", x, depthwise, groups=4, activation="none") == (["depthwise_fprop"], DEPTHWISE)
    assert kernels("depthwise_conv2d", x, depthwise) == (["depthwise_fprop"], DEPTHWISE)
    assert kernels("conv2d_relu", x.detach().double(), w.detach().double()) == ([], [])


def test_depthwise_separable() -> None:
    """One kernel; two where a wide result would have the depthwise one computed too often."""
    x, depthwise = values(1, 4, 4, 4), values(4, 1, 3, 3)
    backward = ["depthwise_fprop", *GRADIENTS, *DEPTHWISE]
    narrow, wide = values(8, 4, 1, 1), values(600, 4, 1, 1)
    assert kernels("depthwise_separable_conv2d", x, depthwise, narrow) == (["depthwise_separable_fprop"], backward)
    assert kernels("depthwise_separable_conv2d", x, depthwise, wide)[0] == ["depthwise_fprop", "conv2d_fprop"]


def test_group() -> None:
    """Four branches to a launch, one convolution for the gradients of all."""
    x, weights = values(1, 4, 2, 2), [values(3, 4, 1, 1) for _ in range(5)]
    assert kernels("pointwise_conv2d_group", x, weights) == (
        ["pointwise_group"] * 2,
        [*["mask_and_sum_kernel"] * 5, *GRADIENTS],
    )


def test_elementwise() -> None:
    """Tensors that lie alike in memory; windows that fit a tile."""
    x = values(1, 4, 2, 2)
    assert kernels("add_relu", x, values(1, 4, 2, 2)) == (["add_relu_fprop"], ["add_relu_dgrad"])
    assert kernels("add_relu", x, values(1, 4, 2, 2).mT)[0] == []
    assert kernels("local_response_norm", x, 5) == (["local_response_norm_kernel"], ["local_response_norm_kernel"])
    assert kernels("local_response_norm", values(1, 5000, 1, 1), 4001)[0] == []


def test_block_sizes_are_those_of_the_table() -> None:
    from fastconv.triton_kernels import launch, table

    x = values(1, 4, 2, 2)
    with launch.recorded() as found:
        ops.add_relu(x, x)
    (one,) = found
    assert one.programs == 1
    assert one.meta.items() >= table.config("add_relu", "any").items()
    ops.add_relu(x, x)
    assert len(found) == 1

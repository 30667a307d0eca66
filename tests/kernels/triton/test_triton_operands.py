"""Triton's convolutions: operands in vectors whatever the number of channels, split depth, divisions, TF32 factors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastconv import ops
from support.kernel_backends import on_triton
from support.numerics import judge, random

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with on_triton() as found:
        yield found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [(24, 40), (20, 12), (9, 30), (3, 17)], ids=str)
def test_channels_that_vectors_do_not_fill(
    channels: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Steps that end within a tap's channels; copies with zeros behind the channels; both ways, with a residual."""
    C, K = channels
    arguments = {
        "input": random(2, C, 6, 5, dtype=dtype).contiguous(memory_format=layout),
        "weight": (random(K, C, 3, 2) * 0.1).to(dtype),
        "bias": random(K, dtype=dtype),
        "residual": random(2, K, 6, 6, dtype=dtype).contiguous(memory_format=layout),
    }
    judge("conv2d_add_relu", {**arguments, "padding": 1, "activation": "none"})


@pytest.mark.parametrize("groups", [2, 5])
def test_groups_that_vectors_do_not_fill(groups: int) -> None:
    """Every group's channels are padded, and its gradients' zeros cut off."""
    arguments = {
        "input": random(2, 3 * groups, 6, 5, dtype=torch.float16),
        "weight": (random(7 * groups, 3, 3, 3) * 0.2).half(),
        "bias": random(7 * groups, dtype=torch.float16),
    }
    judge("conv2d_relu", {**arguments, "padding": 1, "groups": groups, "activation": "none"})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_zeros_behind_channels_meet_no_special_values(value: float, layout: torch.memory_format) -> None:
    """What lies beside the operands in memory takes no part, whatever it is."""
    wide = torch.full((2, 16, 5, 6), value).contiguous(memory_format=layout)
    wide[:, 4:11] = random(2, 7, 5, 6)
    weights = torch.full((12, 16, 3, 3), value)
    weights[2:11, 3:10] = random(9, 7, 3, 3)
    judge("conv2d_relu", {"input": wide[:, 4:11], "weight": weights[2:11, 3:10], "padding": 2, "activation": "none"})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_small_grid_splits_its_depth(layout: torch.memory_format) -> None:
    """One tile; bias, residual and activation come after the parts' sum, and the bits are the same every time."""
    from fastconv.triton_kernels import launch as launching

    arguments = {
        "input": random(1, 48, 4, 4).contiguous(memory_format=layout),
        "weight": random(20, 48, 3, 3) * 0.1,
        "bias": random(20),
        "residual": random(1, 20, 4, 4).contiguous(memory_format=layout),
        "padding": 1,
    }
    with launching.recorded() as found:
        first = ops.conv2d_add_relu(**arguments)
    assert [one.kernel for one in found] == ["conv2d_fprop", "finish_parts_kernel"]
    assert found[0].programs > 1
    assert torch.equal(first, ops.conv2d_add_relu(**arguments))
    judge("conv2d_add_relu", {**arguments, "activation": "none"})
    assert ops.conv2d_relu(arguments["input"][:0], arguments["weight"]).shape == (0, 20, 2, 2)
    strided = {"input": arguments["input"], "weight": arguments["weight"], "stride": 2}
    judge("conv2d_relu", {**strided, "activation": "none"})


def test_division_by_multiplication() -> None:
    """Of every kind of divisor, at both sides of its multiples."""
    from fastconv.triton_kernels.operands import divisor

    for value in [1, 2, 3, 5, 7, 56, 112, 641, 2**16 - 1, 2**16 + 1, 2**30 - 1, 2**31 - 1]:
        found = divisor(value)
        magic = found.magic % 2**32
        largest = (2**31 - 1) // value
        for multiple in {0, 1, 2, 1000, largest // 2, largest}:
            for n in (multiple * value - 1, multiple * value, multiple * value + 1):
                if 0 <= n < 2**31:
                    assert (2 * n * magic >> 32) >> found.shift == n // value, (n, value)


def test_tf32_factors_are_scaled_before_they_are_cut_off() -> None:
    """What has few bits stays as it is; the rest is off by less than the last bit kept, on average by nothing."""
    from fastconv.triton_kernels.device import TF32_SCALE

    def cut(values: Tensor) -> Tensor:
        return ((values * TF32_SCALE.value).view(torch.int32) & ~0x1FFF).view(torch.float32)

    exact = (torch.randn(2**16).view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert torch.equal(cut(exact), exact)
    values = 2 ** torch.rand(2**20)  # mantissas with density 1 / m
    off = (cut(values).double() - values.double()) * 2**10
    assert off.abs().max() < 1
    assert abs(off.mean()) < 2e-3
    for special in (torch.nan, torch.inf, -torch.inf, 0.0):
        torch.testing.assert_close(cut(torch.tensor([special])), torch.tensor([special]), equal_nan=True)

"""Which Triton kernels a call launches and with what block sizes, as `launch.recorded` lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
    """Of the forward, and of a backward for all of the arguments; not those that add parts."""
    from fastconv.triton_kernels import launch

    lists = [arg if isinstance(arg, list) else [arg] for arg in args]
    leaves = [leaf.requires_grad_() for leaves in lists for leaf in leaves if isinstance(leaf, Tensor)]
    with launch.recorded() as forward:
        results = getattr(ops, op)(*args, **options)
    results = results if isinstance(results, list) else [results]
    with launch.recorded() as backward:
        torch.autograd.grad(sum(result.square().sum() for result in results), leaves)
    names = [[one.kernel for one in found if "parts_kernel" not in one.kernel] for found in (forward, backward)]
    return names[0], names[1]


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
    """Tensors that lie alike in memory; windows that a thread's registers hold, and wider ones."""
    x = values(1, 4, 2, 2)
    assert kernels("add_relu", x, values(1, 4, 2, 2)) == (["add_relu_fprop"], ["add_relu_dgrad"])
    assert kernels("add_relu", x, values(1, 4, 2, 2).mT)[0] == []
    assert kernels("local_response_norm", x, 5) == (["local_response_norm_kernel"], ["local_response_norm_kernel"])
    wide = ["local_response_norm_wide"]
    assert kernels("local_response_norm", values(1, 150, 1, 1), 131) == (wide, wide * 2)


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


def test_boxes() -> None:
    """The TMA brings operands where the table says so: of dense 1x1 convolutions, in vectors of 16 bytes."""
    from fastconv.triton_kernels import launch, table

    entries = {f"{kernel} {name}": config for kernel, rows in table.LARGE.items() for name, config in rows.items()}

    def boxes(x: Tensor, w: Tensor, **options: Any) -> list[bool]:
        leaves = [x.requires_grad_(), w.requires_grad_()]
        with table.preferred(entries), launch.recorded() as found:
            torch.autograd.grad(ops.conv2d_relu(x, w, activation="none", **options).sum(), leaves)
        return [one.meta["BOXES"] for one in found if one.kernel.startswith("conv2d")]

    x, w = (values(*shape, dtype=torch.float16) for shape in ((2, 16, 5, 6), (8, 16, 1, 1)))
    x = x.contiguous(memory_format=torch.channels_last)
    assert boxes(x, w) == [True] * 3
    assert boxes(x.detach(), w.detach(), stride=2) == [False] * 3
    assert boxes(x.detach(), w.detach(), padding=1) == [False] * 3
    assert boxes(x.detach()[:, :12], w.detach()[:, :12].contiguous()) == [False] * 3


def test_plans_are_made_once() -> None:
    """For the same shapes, whatever lies there; not for others, nor within another preference."""
    from fastconv.triton_kernels import launch, table

    launch.forget_plans()
    x, w = values(2, 16, 5, 6), values(8, 16, 1, 1)
    made = []
    for call in (
        lambda: ops.conv2d_relu(x, w),
        lambda: ops.conv2d_relu(x + 1, w * 2),
        lambda: ops.conv2d_relu(x[:1], w),
        lambda: ops.conv2d_relu(x, w, stride=2),
    ):
        call()
        made.append(launch.plans())
    assert made[0] == made[1] < made[2] < made[3]
    wanted = shipped(POINTWISE, BLOCK_N=16)
    for _ in range(2):
        with table.preferred({POINTWISE: wanted}):
            assert launched(ops.conv2d_relu, x.shape, w.shape) == wanted
    assert launched(ops.conv2d_relu, x.shape, w.shape)["BLOCK_N"] == shipped(POINTWISE)["BLOCK_N"]


# ------------------------------------------------------------------------------------- preferences

ADD, POINTWISE, SPATIAL = "add_relu any", "conv2d_fprop ieee pointwise narrow", "conv2d_fprop ieee spatial narrow"
SPATIAL_SHAPES = ((1, 16, 6, 6), (8, 16, 3, 3))
POINTWISE_SHAPES = ((1, 16, 6, 6), (8, 16, 1, 1))


def shipped(entry: str, **changes: int) -> dict[str, int]:
    from fastconv.triton_kernels import table

    kernel, name = table.split_entry(entry)
    return {**table.SHIPPED[kernel][name], **changes}


def launched(function: Callable[..., Any], *shapes: tuple[int, ...]) -> dict[str, int]:
    """The block sizes of a call's kernel."""
    from fastconv.triton_kernels import launch, table

    with table.noted() as asked, launch.recorded() as found:
        function(*(values(*shape) for shape in shapes))
    # where a depth is split, another kernel adds the parts
    return {key: int(found[0].meta[key]) for key in asked[0].config}


def add() -> dict[str, int]:
    return launched(ops.add_relu, (1, 4, 2, 2), (1, 4, 2, 2))


def test_what_is_preferred_is_taken() -> None:
    """Entry by entry, and the results stay the same."""
    from fastconv.triton_kernels import table

    wanted = shipped(POINTWISE, BLOCK_M=16, BLOCK_N=16, num_warps=2)
    x, w = torch.randn(1, 16, 6, 6), torch.randn(8, 16, 1, 1)
    expected = ops.pointwise_conv2d(x, w)
    with table.preferred({ADD: shipped(ADD, BLOCK=64), POINTWISE: wanted}):
        assert add() == shipped(ADD, BLOCK=64)
        assert launched(ops.pointwise_conv2d, *POINTWISE_SHAPES) == wanted
        assert launched(ops.conv2d_relu, *SPATIAL_SHAPES) == shipped(SPATIAL)
        torch.testing.assert_close(ops.pointwise_conv2d(x, w), expected)
    assert add() == shipped(ADD)
    assert launched(ops.pointwise_conv2d, *POINTWISE_SHAPES) == shipped(POINTWISE)


def test_the_guard_holds_for_what_is_preferred() -> None:
    """8 warps are for 1x1 filters alone."""
    from fastconv.triton_kernels import table

    with table.preferred({entry: shipped(entry, num_warps=8) for entry in (POINTWISE, SPATIAL)}):
        assert launched(ops.pointwise_conv2d, *POINTWISE_SHAPES)["num_warps"] == 8
        assert launched(ops.conv2d_relu, *SPATIAL_SHAPES)["num_warps"] == 4


def test_preferences_within_preferences() -> None:
    """The innermost counts, entry by entry; an error ends a block, too; one object serves many blocks."""
    from fastconv.triton_kernels import table

    smaller, larger = (table.preferred({ADD: shipped(ADD, BLOCK=size)}) for size in (64, 128))
    with smaller:
        with larger, table.preferred({POINTWISE: shipped(POINTWISE, BLOCK_N=16)}):
            assert add()["BLOCK"] == 128
            with smaller, smaller, table.preferred({}):
                assert add()["BLOCK"] == 64
                assert launched(ops.pointwise_conv2d, *POINTWISE_SHAPES)["BLOCK_N"] == 16
            with pytest.raises(KeyboardInterrupt), smaller:
                raise KeyboardInterrupt
            assert add()["BLOCK"] == 128
        assert add()["BLOCK"] == 64
    assert add() == shipped(ADD)


def test_a_preference_is_its_threads() -> None:
    """Two threads within their blocks at once, and a third without one."""
    from fastconv.triton_kernels import table

    smaller, larger = (table.preferred({ADD: shipped(ADD, BLOCK=size)}) for size in (64, 128))
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other, ExitStack() as ones, ExitStack() as others:
        one.submit(ones.enter_context, smaller).result()
        assert other.submit(add).result() == shipped(ADD)
        other.submit(others.enter_context, larger).result()
        assert [one.submit(add).result()["BLOCK"], other.submit(add).result()["BLOCK"]] == [64, 128]
        assert add() == shipped(ADD)
        one.submit(ones.close).result()
        assert [one.submit(add).result()["BLOCK"], other.submit(add).result()["BLOCK"]] == [1024, 128]
        other.submit(others.close).result()


def test_what_may_not_stand_in_the_table_is_passed_over() -> None:
    """And the rest is not. Later changes of what was given change nothing."""
    from fastconv.triton_kernels import table

    given: dict[str, Any] = {
        ADD: shipped(ADD, BLOCK=100),
        "add_relu some": shipped(ADD),
        "": shipped(ADD),
        POINTWISE: shipped(POINTWISE, BLOCK_N=16),
        SPATIAL: None,
    }
    preference = table.preferred(given)
    given[POINTWISE]["BLOCK_N"] = 1000
    with preference:
        assert add() == shipped(ADD)
        assert launched(ops.conv2d_relu, *SPATIAL_SHAPES) == shipped(SPATIAL)
        assert launched(ops.pointwise_conv2d, *POINTWISE_SHAPES) == shipped(POINTWISE, BLOCK_N=16)


def test_what_a_call_asks_for_is_noted() -> None:
    """Forward and backward, within the block, on any thread; a block within a block notes for both."""
    from fastconv.triton_kernels import table

    x, w = (values(*shape).requires_grad_() for shape in SPATIAL_SHAPES)
    wanted = shipped(SPATIAL, BLOCK_M=16)
    with table.noted() as outer:
        with table.preferred({SPATIAL: wanted}), table.noted() as inner:
            y = ops.conv2d_relu(x, w)
        with ThreadPoolExecutor(1) as other:
            other.submit(torch.autograd.grad, y, (x, w), torch.ones_like(y)).result()
    y = ops.conv2d_relu(x, w)
    assert inner[:1] == [table.Asked(SPATIAL, 9, wanted)]
    assert outer[: len(inner)] == inner
    dgrad, wgrad = "conv2d_dgrad ieee spatial narrow", "conv2d_wgrad ieee spatial narrow"
    entries = [one.entry for one in outer[1:] if "_parts" not in one.entry]
    assert sorted(entries) == sorted([dgrad, wgrad, "mask_and_sum pixels"])
    assert {one.entry: one.taps for one in outer[1:]}[dgrad] == 9
    assert all(one.config == shipped(one.entry) for one in outer[1:])

"""The choice among CUDA kernels: what is considered, why the others were not taken, and what depends on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv
from fastconv import ops
from fastconv.operators import kernels
from support.cases import FIRST, Case, run, tensors
from support.cuda_kernels import emulated_gpu
from support.kernel_backends import device_of, kernel_table


def made(function: Any, *args: Any, **named: Any) -> list[kernels.Choice]:
    with kernels.choices() as found:
        function(*args, **named)
    return found


@pytest.mark.parametrize("case", FIRST.values(), ids=FIRST)
def test_all_kernels_are_considered(case: Case, backend: str) -> None:
    """Forward and backward: each kernel of the table has a score or a reason, and the best score runs."""
    arguments = case.arguments(requires_grad=True, device=device_of(backend))

    def forward_backward() -> None:
        outputs = run(case.op, arguments)
        torch.autograd.grad(outputs, tensors(arguments), [torch.ones_like(o) for o in outputs])

    found = made(forward_backward)
    assert found
    for choice in found:
        listed = [entry["name"] for entry in kernel_table(backend) if entry["op"] == choice.op]
        assert sorted(candidate.kernel for candidate in choice.candidates) == sorted(listed)
        scores = {c.kernel: c.score for c in choice.candidates if not c.reason}
        assert all(0 < score <= 1 for score in scores.values())
        assert choice.chosen == max(scores, key=scores.__getitem__, default="")
        assert all(c.score == 0 for c in choice.candidates if c.reason)
        assert str(choice).count("\n") == len(listed)


def image(backend: str, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device=device_of(backend)).to(dtype, memory_format=torch.channels_last)


def reasons(choice: kernels.Choice) -> dict[str, str]:
    return {c.kernel: c.reason for c in choice.candidates if c.reason}


def test_reasons_are_those_of_the_call(backend: str) -> None:
    (choice,) = made(ops.conv2d_relu, image(backend, 1, 5, 6, 6), image(backend, 4, 5, 3, 3))
    assert choice.chosen == "conv2d_fprop_fp16_gather_sm80"
    assert reasons(choice)["conv2d_fprop_fp16_64x64_sm80"] == "a group's channels are not whole vectors of 16 bytes"
    assert reasons(choice)["conv2d_fprop_bf16_gather_sm80"] == "the tensors have another dtype"

    x, weight = image(backend, 1, 8, 6, 6), torch.randn(8, 1, 3, 3, device=device_of(backend)).half()
    (choice,) = made(ops.depthwise_conv2d, x, weight, dilation=2)
    assert choice.chosen == "depthwise_conv2d_fprop_nhwc"
    assert reasons(choice)["depthwise_conv2d_fprop_nhwc_3x"] == "the filter is dilated along the row"

    (choice,) = made(ops.local_response_norm, image(backend, 1, 8, 6, 6), 3)
    assert choice.chosen == "local_response_norm_fprop_nhwc_vec"
    assert reasons(choice)["local_response_norm_fprop_nchw"] == "the window has another size"

    (choice,) = made(ops.add_relu, image(backend, 1, 8, 6, 6), image(backend, 1, 8, 6, 6))
    assert choice.chosen == "add_relu_fprop_vec16"
    assert reasons(choice) == {"add_relu_fprop_strided": "the tensors lie in memory alike"}


def test_large_tiles_where_they_fill_the_device() -> None:
    """One GEMM of 4 x 2 tiles of 128x128, or 8 x 4 of 64x64, on few multiprocessors and on many."""
    x, weight = image("cuda-emulated", 2, 16, 16, 16), image("cuda-emulated", 256, 16, 1, 1)
    chosen = {}
    for count in (4, 32):
        with emulated_gpu(multiprocessors=count):
            (choice,) = made(ops.pointwise_conv2d, x, weight)
        chosen[count] = choice.chosen
        assert choice.multiprocessors == count
    assert chosen == {4: "conv2d_fprop_fp16_128x128_sm80", 32: "conv2d_fprop_fp16_64x64_sm80"}


def test_shared_memory_is_the_devices() -> None:
    """The same call with less of it: the fused kernel does not fit, and two others run."""
    x, taps = image("cuda-emulated", 1, 64, 8, 8), torch.randn(64, 1, 3, 3).half()
    pointwise = image("cuda-emulated", 16, 64, 1, 1)
    with emulated_gpu():
        expected = ops.depthwise_separable_conv2d(x, taps, pointwise, padding=1)
        assert made(ops.depthwise_separable_conv2d, x, taps, pointwise, padding=1)[0].chosen.endswith("_64_3x")
    with emulated_gpu(shared_per_block=32 * 1024):
        first, *others = made(ops.depthwise_separable_conv2d, x, taps, pointwise, padding=1)
        found = ops.depthwise_separable_conv2d(x, taps, pointwise, padding=1)
    assert first.chosen == ""
    assert reasons(first)["depthwise_separable_conv2d_fprop_nhwc_64_3x"] == (
        "the depthwise result does not fit into shared memory"
    )
    assert [choice.op for choice in others] == ["depthwise_conv2d_fprop", "conv2d_fprop"]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_blocks_of_much_shared_memory_give_way_to_two_kernels() -> None:
    """640 channels fit where a block may have what an A100's has, but leave no room for a second block."""
    x, taps = image("cuda-emulated", 1, 640, 4, 8), torch.randn(640, 1, 3, 3).half()
    pointwise = image("cuda-emulated", 16, 640, 1, 1)
    with emulated_gpu(shared_per_block=163 * 1024):
        first, *others = made(ops.depthwise_separable_conv2d, x, taps, pointwise, padding=1)
    assert first.chosen == ""
    assert reasons(first)["depthwise_separable_conv2d_fprop_nhwc_64_3x"] == (
        "two kernels are better than blocks of so much shared memory"
    )
    assert [choice.op for choice in others] == ["depthwise_conv2d_fprop", "conv2d_fprop"]


def test_small_grids_keep_the_faster_kernel() -> None:
    """Slower kernels have more blocks, and fill more of a large device; the rates make up for that."""
    with emulated_gpu(multiprocessors=108):
        (choice,) = made(ops.local_response_norm, image("cuda-emulated", 1, 96, 27, 27), 5)
        assert choice.chosen == "local_response_norm_fprop_nhwc_vec"
        x, taps = image("cuda-emulated", 1, 64, 9, 9), torch.randn(64, 1, 3, 3).half().requires_grad_()
        with kernels.choices() as found:
            output = ops.depthwise_conv2d(x, taps, padding=1)
            torch.autograd.grad(output, taps, torch.ones_like(output))
    assert [choice.chosen for choice in found] == ["depthwise_conv2d_fprop_nhwc_3x", "depthwise_conv2d_wgrad_nhwc_3x"]


def test_names_are_unique(backend: str) -> None:
    names = [entry["name"] for entry in kernel_table(backend)]
    assert len(set(names)) == len(names)


def test_blocks_within_blocks(backend: str) -> None:
    """Each list has what was chosen within its block; what was forced outside is so again after a block within."""
    x = image(backend, 1, 8, 4, 4)
    op, kinds = "add_relu_fprop", ("add_relu_fprop_vec1", "add_relu_fprop_vec16")
    with kernels.choices() as outer, kernels.forced(op, kinds[0], backend):
        ops.add_relu(x, x)
        with kernels.choices() as inner, kernels.forced(op, kinds[1], backend):
            ops.add_relu(x, x)
        ops.add_relu(x, x)
    assert [choice.chosen for choice in outer] == [kinds[0], kinds[1], kinds[0]]
    assert [choice.chosen for choice in inner] == [kinds[1]]
    assert made(ops.add_relu, x, x)[0].chosen == kinds[1]


def test_a_kernel_without_a_choice_cannot_be_forced(backend: str) -> None:
    name = "conv2d_fprop_fp32_reduce_sm80"
    with pytest.raises(ValueError, match=f"got kernel '{name}' of 'conv2d_reduce'"):
        kernels.forced("conv2d_reduce", name, backend).__enter__()


def test_an_unknown_kernel_cannot_be_forced(backend: str) -> None:
    message = "got kernel 'nothing' of 'conv2d_wgrad', needed one of conv2d_wgrad_fp16_128x128_sm80, "
    with pytest.raises(ValueError, match=message), kernels.forced("conv2d_wgrad", "nothing", backend):
        pass


def test_nothing_is_noted_outside(backend: str) -> None:
    x = image(backend, 1, 8, 4, 4)
    fastconv.ops.add_relu(x, x)
    assert made(lambda: None) == []


def test_explain_names_the_kernels(backend: str) -> None:
    """Of the ops that a swapped model calls; why the others were not taken is in `choices`."""
    layers = (torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 1), torch.nn.LocalResponseNorm(5))
    model = torch.nn.Sequential(*layers).eval().to(device_of(backend), torch.float16)
    conv, _, lrn = fastconv.explain(model, image(backend, 1, 8, 8, 8)).kernels
    assert conv.kernel.startswith(f"conv2d_relu float16, {backend}")
    assert conv.kernel.endswith(f": {conv.choices[0].chosen}")
    assert conv.choices[0].op == "conv2d_fprop"
    assert lrn.kernel == f"local_response_norm float16, {backend}: local_response_norm_fprop_nhwc_vec"

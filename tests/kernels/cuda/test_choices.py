"""The choice among CUDA kernels: what is considered, why the others were not taken, and what depends on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
        assert all(c.blocks > 0 and c.resident > 0 and c.splits > 0 for c in choice.candidates if c.score)
        assert all(0 < c.fill <= 1 and 0 < c.waves <= 1 for c in choice.candidates if c.score)
        assert str(choice).count("\n") == len(listed)


def image(backend: str, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device=device_of(backend)).to(dtype, memory_format=torch.channels_last)


def reasons(choice: kernels.Choice) -> dict[str, str]:
    return {c.kernel: c.reason for c in choice.candidates if c.reason}


def test_reasons_are_those_of_the_call(backend: str) -> None:
    (choice,) = made(ops.conv2d_relu, image(backend, 1, 10, 6, 6), image(backend, 4, 5, 3, 3), groups=2)
    assert choice.chosen == "conv2d_fprop_fp16_gather_sm80"
    assert reasons(choice)["conv2d_fprop_fp16_64x64_sm80"] == "a group's channels are not whole vectors"
    assert reasons(choice)["conv2d_fprop_bf16_gather_sm80"] == "the tensors have another dtype"

    x, weight = image(backend, 1, 8, 6, 6), torch.randn(8, 1, 3, 3, device=device_of(backend)).half()
    (choice,) = made(ops.depthwise_conv2d, x, weight, dilation=2)
    assert choice.chosen == "depthwise_conv2d_fprop_nhwc"
    assert reasons(choice)["depthwise_conv2d_fprop_nhwc_3x3"] == "the filter is dilated"

    (choice,) = made(ops.local_response_norm, image(backend, 1, 8, 6, 6), 3)
    assert choice.chosen == "local_response_norm_fprop_nhwc_vec"
    assert reasons(choice)["local_response_norm_fprop_nchw"] == "the window has another size"

    (choice,) = made(ops.add_relu, image(backend, 1, 8, 6, 6), image(backend, 1, 8, 6, 6))
    assert choice.chosen == "add_relu_fprop_vec16"
    assert reasons(choice) == {"add_relu_fprop_strided": "the tensors lie in memory alike"}


def test_large_tiles_where_they_fill_the_device() -> None:
    """One GEMM of 2 x 2 tiles of 256x128, or 8 x 4 of 64x64, on few multiprocessors and on many."""
    x, weight = image("cuda-emulated", 2, 16, 16, 16), image("cuda-emulated", 256, 16, 1, 1)
    chosen = {}
    for count in (4, 32):
        with emulated_gpu(multiprocessors=count):
            (choice,) = made(ops.pointwise_conv2d, x, weight)
        chosen[count] = choice.chosen
        assert choice.multiprocessors == count
    assert chosen == {4: "conv2d_fprop_fp16_256x128_sm80", 32: "conv2d_fprop_fp16_64x64_sm80"}


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
        assert choice.chosen == "local_response_norm_fprop_nhwc_lanes"
        x, taps = image("cuda-emulated", 1, 64, 9, 9), torch.randn(64, 1, 3, 3).half().requires_grad_()
        with kernels.choices() as found:
            output = ops.depthwise_conv2d(x, taps, padding=1)
            torch.autograd.grad(output, taps, torch.ones_like(output))
    assert [choice.chosen for choice in found] == ["depthwise_conv2d_fprop_nhwc_3x3", "depthwise_conv2d_wgrad_nhwc_3x3"]


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


# ------------------------------------------------------------------------------------- preferences

ADD, ADD_1, ADD_16 = "add_relu_fprop", "add_relu_fprop_vec1", "add_relu_fprop_vec16"


def chosen(function: Any, *args: Any, **named: Any) -> list[str]:
    return [choice.chosen for choice in made(function, *args, **named)]


def test_what_is_preferred_is_taken(backend: str) -> None:
    """Of each op of a call; what ran is what was chosen, and computes the same."""
    x, taps = image(backend, 1, 64, 8, 8), torch.randn(64, 1, 3, 3, device=device_of(backend)).half()
    pointwise = image(backend, 16, 64, 1, 1)
    expected = ops.depthwise_separable_conv2d(x, taps, pointwise, padding=1)
    family = "depthwise_separable_conv2d_fprop"
    (free,) = chosen(ops.depthwise_separable_conv2d, x, taps, pointwise, padding=1)
    others = {f"{family}_nhwc_64_3x", f"{family}_nhwc_64", f"{family}_nhwc_128"} - {free}
    for other in others:
        with kernels.preferred({ADD: ADD_1, family: other}, backend):
            assert chosen(ops.depthwise_separable_conv2d, x, taps, pointwise, padding=1) == [other]
            found = ops.depthwise_separable_conv2d(x, taps, pointwise, padding=1)
            assert chosen(ops.add_relu, x, x) == [ADD_1]
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert chosen(ops.depthwise_separable_conv2d, x, taps, pointwise, padding=1) == [free]


def test_the_preferred_kernel_is_launched() -> None:
    x = image("cuda-emulated", 1, 8, 4, 4)
    with emulated_gpu() as library:
        with kernels.preferred({ADD: ADD_1}, "cuda-emulated"):
            ops.add_relu(x, x)
        assert library.launches() == {ADD_1: 1}
        ops.add_relu(x, x)
        assert library.launches() == {ADD_1: 1, ADD_16: 1}


def test_a_preferred_kernel_that_cannot_run_leaves_the_choice_free(backend: str) -> None:
    x, weight = image(backend, 1, 8, 6, 6), image(backend, 8, 8, 3, 3)
    free = made(ops.conv2d_relu, x, weight)
    with kernels.preferred({"conv2d_fprop": "conv2d_fprop_bf16_64x64_sm80"}, backend):
        assert made(ops.conv2d_relu, x, weight) == free
    with kernels.preferred({ADD: "add_relu_fprop_strided"}, backend):
        assert chosen(ops.add_relu, x, x) == [ADD_16]
        assert chosen(ops.add_relu, x, image(backend, 1, 8, 6, 6).contiguous()) == ["add_relu_fprop_strided"]


def test_a_preferred_kernel_runs_although_it_should_not() -> None:
    """Rates are estimates, a preference was measured: the fused kernel, to which two were thought better."""
    x, taps = image("cuda-emulated", 1, 640, 4, 8), torch.randn(640, 1, 3, 3).half()
    pointwise = image("cuda-emulated", 16, 640, 1, 1)
    family, kernel = "depthwise_separable_conv2d_fprop", "depthwise_separable_conv2d_fprop_nhwc_64_3x"
    with emulated_gpu(shared_per_block=163 * 1024):
        assert chosen(ops.depthwise_separable_conv2d, x, taps, pointwise, padding=1)[0] == ""
        with kernels.preferred({family: kernel}, "cuda-emulated"):
            assert chosen(ops.depthwise_separable_conv2d, x, taps, pointwise, padding=1) == [kernel]


def test_force_goes_before_preference(backend: str) -> None:
    x = image(backend, 1, 8, 4, 4)
    with kernels.preferred({ADD: ADD_1}, backend), kernels.forced(ADD, ADD_16, backend):
        assert chosen(ops.add_relu, x, x) == [ADD_16]
        with kernels.preferred({ADD: ADD_1}, backend):
            assert chosen(ops.add_relu, x, x) == [ADD_16]
    impossible = kernels.forced(ADD, "add_relu_fprop_strided", backend)
    refused = pytest.raises(RuntimeError, match="add_relu_fprop_strided was forced")
    with kernels.preferred({ADD: ADD_1}, backend), impossible, refused:
        ops.add_relu(x, x)


def test_preferences_within_preferences(backend: str) -> None:
    """The innermost counts, op by op; an error within a block ends it, too; one object serves many blocks."""
    x, weight = image(backend, 1, 64, 8, 8), image(backend, 64, 64, 1, 1)
    conv = "conv2d_fprop_fp16_gather_sm80"
    preference = kernels.preferred({ADD: ADD_1}, backend)

    def both() -> list[str]:
        return chosen(ops.add_relu, x, x) + chosen(ops.pointwise_conv2d, x, weight)

    free = both()
    assert free[0] == ADD_16
    assert free[1] != conv
    with preference:
        with kernels.preferred({ADD: ADD_16, "conv2d_fprop": conv}, backend):
            assert both() == [ADD_16, conv]
            with preference, preference, kernels.preferred({}, backend):
                assert both() == [ADD_1, conv]
            with pytest.raises(KeyboardInterrupt), kernels.preferred({ADD: ADD_1}, backend):
                raise KeyboardInterrupt
            assert both() == [ADD_16, conv]
        assert both() == [ADD_1, free[1]]
    assert both() == free


def test_a_preference_is_its_threads(backend: str) -> None:
    """Two threads within their blocks at once, and a third without one."""
    x, weight = image(backend, 1, 64, 8, 8), image(backend, 64, 64, 1, 1)

    def call() -> list[str]:
        return chosen(ops.pointwise_conv2d, x, weight)

    free = call()
    (mine, its) = (f"conv2d_fprop_fp16_{tile}_sm80" for tile in ("gather", "128x128"))
    assert free not in ([mine], [its])
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other, ExitStack() as ones, ExitStack() as others:
        one.submit(ones.enter_context, kernels.preferred({"conv2d_fprop": mine}, backend)).result()
        assert other.submit(call).result() == free
        other.submit(others.enter_context, kernels.preferred({"conv2d_fprop": its}, backend)).result()
        for _ in range(2):
            assert [one.submit(call).result(), other.submit(call).result(), call()] == [[mine], [its], free]
        one.submit(ones.close).result()
        assert [one.submit(call).result(), other.submit(call).result(), call()] == [free, [its], free]
        other.submit(others.close).result()


@pytest.mark.parametrize(
    "names",
    [
        {ADD: "nothing"},
        {"nothing": ADD_1},
        {"conv2d_fprop": ADD_1},
        {"conv2d_reduce": "conv2d_fprop_fp32_reduce_sm80"},
        {ADD: "", "": ADD_1},
    ],
    ids=str,
)
def test_unknown_names_are_passed_over(names: dict[str, str], backend: str) -> None:
    """As a table of another version has them; what else it prefers counts."""
    x = image(backend, 1, 8, 4, 4)
    with kernels.preferred(names, backend):
        assert chosen(ops.add_relu, x, x) == [ADD_16]
    with kernels.preferred({**names, ADD: ADD_1}, backend):
        assert chosen(ops.add_relu, x, x) == [ADD_1]


def test_numbers_that_no_kernel_has_are_passed_over() -> None:
    x = image("cuda-emulated", 1, 8, 4, 4)
    listed = len(kernels.table("cuda-emulated"))
    with emulated_gpu() as library:
        library.end_preference()
        library.prefer_kernels([-1, -(2**31), listed, 2**31 - 1, *range(listed)])
        try:
            ops.add_relu(x, x)
        finally:
            library.end_preference()
        library.end_preference()
        assert chosen(ops.add_relu, x, x) == [ADD_16]


def test_a_backend_without_cuda_kernels_has_no_preferences() -> None:
    with pytest.raises(ValueError, match="got backend 'cpu', needed one with CUDA kernels"):
        kernels.preferred({}, "cpu")


# ------------------------------------------------------------------------------------- what is disabled


@pytest.fixture
def disabling() -> Iterator[Callable[..., None]]:
    yield lambda *names: kernels.disable(names)
    kernels.disable([])


def test_a_disabled_kernel_does_not_run(backend: str, disabling: Callable[..., None]) -> None:
    """Neither by its score nor preferred or forced; nor does it once others are disabled in its place."""
    x = image(backend, 1, 8, 4, 4)
    disabling(ADD_16, "nothing")
    (choice,) = made(ops.add_relu, x, x)
    assert choice.chosen == ADD_1
    assert reasons(choice)[ADD_16] == "disabled: its instruction differs on this GPU"
    with kernels.preferred({ADD: ADD_16}, backend):
        assert chosen(ops.add_relu, x, x) == [ADD_1]
    refused = r"add_relu_fprop_vec16 was forced, but cannot run this call \(disabled: its instruction differs"
    with kernels.forced(ADD, ADD_16, backend), pytest.raises(RuntimeError, match=refused):
        ops.add_relu(x, x)
    (conv,) = made(ops.pointwise_conv2d, x, image(backend, 8, 8, 1, 1))
    assert not any("disabled" in reason for reason in reasons(conv).values())
    disabling(ADD_1)
    assert chosen(ops.add_relu, x, x) == [ADD_16]
    disabling()
    assert reasons(made(ops.add_relu, x, x)[0]).keys() == {"add_relu_fprop_strided"}


def test_a_call_that_only_disabled_kernels_could_run(backend: str, disabling: Callable[..., None]) -> None:
    """An error that says so; what has another way to run the call, takes that."""
    x, taps = image(backend, 1, 64, 8, 8), torch.randn(64, 1, 3, 3, device=device_of(backend)).half()
    pointwise = image(backend, 16, 64, 1, 1)
    listed = [entry["name"] for entry in kernel_table(backend)]
    disabling(ADD_1, ADD_16, *(name for name in listed if name.startswith("depthwise_separable")))
    message = "add_relu_fprop has no CUDA kernel for this call: 2 of them are disabled, an instruction differs"
    with pytest.raises(RuntimeError, match=message):
        ops.add_relu(x, x)
    first, *others = made(ops.depthwise_separable_conv2d, x, taps, pointwise, padding=1)
    assert first.chosen == ""
    assert [choice.op for choice in others] == ["depthwise_conv2d_fprop", "conv2d_fprop"]


def test_a_library_that_comes_later_is_told(disabling: Callable[..., None]) -> None:
    disabling(ADD_16)
    with emulated_gpu() as library:
        library.disable_kernels([])
        x = image("cuda-emulated", 1, 8, 4, 4)
        assert chosen(ops.add_relu, x, x) == [ADD_16]
        kernels.add("cuda-emulated", library)
        assert chosen(ops.add_relu, x, x) == [ADD_1]


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
    assert lrn.kernel == f"local_response_norm float16, {backend}: local_response_norm_fprop_nhwc_lanes"

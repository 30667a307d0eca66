"""Which instructions the kernels use, as their table says it: by what ran in the emulator."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastconv import ops
from fastconv.operators import kernels
from support.cuda_kernels import emulated_gpu, emulated_hopper, operators, random
from support.kernel_backends import kernel_table

BACKEND = "cuda-emulated"
HALVES = (torch.float16, torch.bfloat16)
# Those that run for float64 alone, where aten has the convolution: of their code for 16-bit types nothing runs.
FLOAT64_ALONE = {"activation_fprop_vec16", "activation_fprop_vec1"}

Call = Callable[[], Any]


def convolutions(dtype: torch.dtype, layout: str, channels: int = 16, size: int = 6) -> Iterator[Call]:
    draw = functools.partial(random, BACKEND, dtype=dtype, layout=layout)
    x, weight, grad = (
        draw(2, channels, size, size),
        draw(channels + 8, channels, 3, 3),
        draw(2, channels + 8, size, size),
    )
    geometry = [1, 1], [1, 1], [1, 1], 1
    yield lambda: ops.conv2d_add_relu(x, weight, draw(channels + 8), grad, padding=1)
    for activation in ("relu", "none"):
        backward = operators(BACKEND).conv2d_backward
        yield functools.partial(backward, grad, grad, x, weight, *geometry, activation, [True, True, True, False])


def photographs(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    draw = functools.partial(random, BACKEND, dtype=dtype, layout=layout)
    x, weight = draw(1, 3, 9, 9), draw(8, 3, 3, 3)
    for stride in (1, 2, 4):
        yield functools.partial(gradients, ops.conv2d_relu, x, weight, stride=stride, padding=1)


def depthwise(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    draw = functools.partial(random, BACKEND, dtype=dtype, layout=layout)
    x, pointwise = draw(1, 16, 6, 8), draw(24, 16, 1, 1)
    for size in (3, 5, 7):
        taps = draw(16, 1, size, size)
        yield functools.partial(gradients, ops.depthwise_conv2d, x, taps, padding=size // 2, activation="relu")
        yield functools.partial(ops.depthwise_separable_conv2d, x, taps, pointwise, padding=size // 2)


def others(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    x = random(BACKEND, 1, 16, 5, 8, dtype=dtype, layout=layout)
    for other in (x, x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3)):
        yield functools.partial(gradients, ops.add_relu, x, other)
        yield functools.partial(operators(BACKEND).add_relu_backward, x, other, "relu")
    for beta, activation in itertools.product((0.75, 0.6), ("none", "relu")):
        yield functools.partial(gradients, ops.local_response_norm, x, 5, beta=beta, activation=activation)


def gradients(op: Callable[..., Any], *tensors: Any, **options: Any) -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    output = op(*leaves, *(one for one in tensors if not isinstance(one, torch.Tensor)), **options)
    torch.autograd.grad(output, leaves, torch.ones_like(output))


def with_every_kernel(call: Call, among: str = "") -> None:
    """Of those that the call may choose among, and whose names have this; where one cannot run it, another does."""
    with kernels.choices() as made:
        call()
    for op, kernel in {(choice.op, one.kernel) for choice in made for one in choice.candidates if may_run(one, among)}:
        with kernels.preferred({op: kernel}, BACKEND), torch.autograd.set_multithreading_enabled(False):
            call()


def may_run(candidate: kernels.Candidate, among: str) -> bool:
    return among in candidate.kernel and candidate.reason in (
        "",
        "its blocks do not fill the device",
    )  # of which the second is no refusal


@pytest.mark.slow
def test_kernels_use_what_their_table_says() -> None:
    """On a large GPU convolutions split their depth, on a small one they do not."""
    ran: dict[str, set[str]] = {}
    for count, layout in ((64, "contiguous"), (1, "channels_last")):
        with emulated_gpu(multiprocessors=count, shared_per_block=163 * 1024) as library:
            for dtype, calls in itertools.product((*HALVES, torch.float32), (convolutions, depthwise, others)):
                for call in calls(dtype, layout):
                    with_every_kernel(call)
                for call in photographs(dtype, layout) if calls is convolutions and dtype in HALVES else ():
                    with_every_kernel(call, "stem")
                if calls is convolutions:
                    # Of few pixels with many channels, of many with few, and of channels that are packed
                    for channels, size in ((136, 4), (8, 32), (5, 6)):
                        for call in calls(dtype, layout, channels, size):
                            call()
            torch.backends.cudnn.allow_tf32 = True  # until the end of `emulated_gpu`
            for calls in (convolutions, depthwise):
                for call in calls(torch.float32, layout):
                    with_every_kernel(call)
            for name, used in library.statistics()["instructions"].items():
                ran.setdefault(name, set()).update(used)
    for count, channels, size in ((64, 72, 4), (64, 16, 16), (1, 16, 6)):
        with emulated_hopper(count) as library:
            for dtype in HALVES:
                for call in convolutions(dtype, "channels_last", channels, size):
                    with_every_kernel(call, "_sm90a")
            for name, used in library.statistics()["instructions"].items():
                if name.endswith("_sm90a"):
                    ran.setdefault(name, set()).update(used)
    said = {kernel["name"]: set(kernel["uses"]) for kernel in kernel_table(BACKEND)}
    differs = {name: (ran.get(name), used) for name, used in said.items() if ran.get(name) != used}
    assert differs.keys() == FLOAT64_ALONE
    assert not any(found for found, _ in differs.values())

"""What the emulator notes of calls that it does not run: the launches, as they would be; for any GPU, of any size."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from fastconv import ops
from fastconv.operators import kernels
from support.cuda_kernels import emulated_gpu


def image(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float16).to(memory_format=torch.channels_last)


def test_what_is_planned_is_what_runs() -> None:
    """Each launch, also of the phases of a stride and of the second kernel that adds the parts of a split depth."""

    def call() -> None:
        backward = torch.ops.fastconv_emulated.conv2d_backward
        given = image(1, 64, 4, 4), None, image(1, 64, 8, 8), image(64, 64, 3, 3)
        backward(*given, [2, 2], [1, 1], [1, 1], 1, "none", [True, False, False, False])
        given = image(4, 64, 32, 32), None, image(4, 64, 32, 32), image(64, 64, 1, 1)
        backward(*given, [1, 1], [0, 0], [1, 1], 1, "none", [False, True, False, False])

    with emulated_gpu(multiprocessors=108) as library:
        with library.planning() as planned:
            call()
        names = Counter(launch["kernel"] for launch in planned)
        assert names == library.launches()
        library.reset_statistics()
        call()
        assert names == library.launches()
        blocks = sum(math.prod(launch["grid"]) for launch in planned)
        assert blocks == library.statistics()["blocks"]
    assert 4 in names.values()
    assert any("reduce" in name for name in names)


def test_planning_touches_no_tensor() -> None:
    """Not even one that takes more memory than there is time to fill."""
    x, weight = image(1, 8, 4, 4), image(8, 8, 1, 1)
    out = torch.full_like(x, 3)
    huge = torch.empty(512, 64, 224, 224, dtype=torch.float16, memory_format=torch.channels_last)
    with emulated_gpu() as library, kernels.choices() as chosen:
        with library.planning() as planned:
            ops.pointwise_conv2d(x, weight, out=out)
            ops.add_relu(huge, huge)
        assert (out == 3).all()
        ops.pointwise_conv2d(x, weight, out=out)
        assert not (out == 3).any()
    assert [launch["kernel"] for launch in planned] == [choice.chosen for choice in chosen[:2]]
    assert math.prod(planned[1]["grid"]) == huge.numel() / (256 * 2 * 8)


def test_the_emulated_gpu_can_be_another() -> None:
    """All that the choice knows of it."""
    x = image(1, 8, 4, 4)
    with emulated_gpu() as library:
        library.device((70, 5, 2048, 160 << 10, 164 << 10, 1 << 20))
        with pytest.raises(RuntimeError, match="has no CUDA kernel for this call"), kernels.choices() as made:
            ops.add_relu(x, x)
    assert (made[0].arch, made[0].multiprocessors) == (70, 5)
    assert {candidate.reason for candidate in made[0].candidates} == {"it is for other GPUs"}

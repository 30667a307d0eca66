"""Where the tests of the kernels for Hopper run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from support.cuda_kernels import emulated_hopper


@pytest.fixture
def on_hopper(backend: str) -> Iterator[None]:
    """On an emulated one, or on a GPU of compute capability 9.0; skips where there is another one."""
    if backend == "cuda-emulated":
        with emulated_hopper():
            yield
    elif torch.cuda.get_device_capability() == (9, 0):
        yield
    else:
        pytest.skip("the GPU here is not of compute capability 9.0")

"""The CUDA kernels run in the emulator, and on a GPU where there is one."""

from collections.abc import Iterator

import pytest
import torch

from support.cuda_kernels import emulated_hopper
from support.kernel_backends import CUDA, on


@pytest.fixture(params=CUDA)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ops of the test run on it."""
    with on(request.param):
        yield request.param


@pytest.fixture
def on_hopper(backend: str) -> Iterator[None]:
    """The backend's GPU is an emulated one of compute capability 9.0, or a real one; else the test skips."""
    if backend == "cuda-emulated":
        with emulated_hopper():
            yield
    elif torch.cuda.get_device_capability() == (9, 0):
        yield
    else:
        pytest.skip("the GPU here is not of compute capability 9.0")

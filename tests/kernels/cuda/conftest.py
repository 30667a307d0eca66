"""The CUDA kernels run in the emulator, and on a GPU where there is one."""

from collections.abc import Iterator

import pytest

from support.kernel_backends import CUDA, on


@pytest.fixture(params=CUDA)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ops of the test run on it."""
    with on(request.param):
        yield request.param

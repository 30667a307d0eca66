"""Several workers (pytest -n) share the cores: one thread each. Without workers torch keeps its threads.

Without a GPU Triton's kernels run in its interpreter, on CPU tensors. Triton reads the switch when it is imported.
"""

import os
from types import SimpleNamespace

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only-backend", metavar="NAME", help="only the kernels' tests on it: cuda-emulated or cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Slow ones first: workers that are done would wait for one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    name = config.option.only_backend
    if name is None:
        return
    chosen = {item: name in getattr(item, "callspec", _NO_PARAMETERS).params.values() for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not chosen[item]])
    items[:] = [item for item in items if chosen[item]]


_NO_PARAMETERS = SimpleNamespace(params={})


def pytest_runtest_setup() -> None:
    """Every test sees the same numbers, whichever ran before it."""
    torch.manual_seed(0)

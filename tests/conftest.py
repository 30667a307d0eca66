"""Several workers (pytest -n) share the cores: one thread each. Without workers torch keeps its threads."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

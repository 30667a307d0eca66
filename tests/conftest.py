"""Several workers (pytest -n) share the cores: one thread each. Without workers torch keeps its threads.

Without a GPU Triton's kernels run in its interpreter, on CPU tensors. Triton reads the switch when it is imported.
"""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

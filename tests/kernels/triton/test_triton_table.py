"""The shipped table of block sizes: every entry compiles, without spills and with tensor cores."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

COMPILE = Path(__file__).parents[2] / "support" / "triton_compile.py"


def test_no_more_than_four_warps_for_large_filters() -> None:
    from fastconv.triton_kernels import table

    for kernel in ("conv2d_fprop", "conv2d_dgrad", "conv2d_wgrad"):
        for entry in table.SHIPPED[kernel]:
            assert table.config(kernel, entry, filter=(3, 3))["num_warps"] <= 4
    assert any(entry["num_warps"] == 8 for entry in table.SHIPPED["conv2d_fprop"].values())


# Shared memory a block may have: 163 KiB on sm_80, 227 KiB on sm_90 and sm_100, but 99 KiB on the smaller cards of
# each generation (sm_86, sm_89, sm_120), which the table is for, too.
MOST_SHARED = 99 * 1024
# ptxas parks a value or two (of 8 bytes) outside of the loop to reach a number of registers that it likes; that is no
# register pressure of the tile, which costs hundreds of bytes at once.
PARKED = 16
MATRIX_KERNELS = {"conv2d_fprop", "conv2d_dgrad", "conv2d_wgrad", "pointwise_group", "depthwise_separable_fprop"}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_entry_of_the_table_compiles(architecture: int) -> None:
    """To machine code, without a GPU: no spills, shared memory within bounds, tensor cores in use."""
    from fastconv.triton_kernels import table

    done = subprocess.run(
        [sys.executable, COMPILE, str(architecture)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    compiled = {(k["kernel"], k["entry"]) for k in kernels}
    assert compiled == {(kernel, entry) for kernel, rows in table.SHIPPED.items() for entry in rows}
    for kernel in kernels:
        if not kernel["wide"]:
            assert kernel["LOCAL"] + kernel["STACK"] <= PARKED, f"spills: {kernel}"
        assert kernel["shared"] <= MOST_SHARED, kernel
        if kernel["kernel"] in MATRIX_KERNELS and not kernel["entry"].startswith("ieee"):
            assert kernel["tensor_core"], f"no tensor cores: {kernel}"

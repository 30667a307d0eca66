"""The table of block sizes: what may stand in it, and what its entries compile to, as tools/triton_code.py counts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from fastconv.triton_kernels import launch, table

REPOSITORY = Path(__file__).parents[3]
CODE = REPOSITORY / "tools" / "triton_code.py"


def test_no_more_than_four_warps_for_large_filters() -> None:
    for kernel in ("conv2d_fprop", "conv2d_dgrad", "conv2d_wgrad"):
        for entry in table.SHIPPED[kernel]:
            assert table.ask(kernel, entry, filter=(3, 3)).config["num_warps"] <= 4
    assert any(entry["num_warps"] == 8 for entry in table.SHIPPED["conv2d_fprop"].values())


def test_entries_for_larger_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the place of those for every card, which have the same names and sizes."""
    device = torch.device("cuda")
    monkeypatch.setattr(launch, "has_large_tiles", lambda device: True)
    for kernel, rows in table.LARGE.items():
        for name, config in rows.items():
            assert table.problem(kernel, name, config) is None
            assert table.shipped(kernel, name, device) == config != table.shipped(kernel, name)
    only_shipped = "conv2d_fprop", "ieee spatial wide"
    assert table.shipped(*only_shipped, device) == table.shipped(*only_shipped)
    monkeypatch.undo()
    assert not launch.has_large_tiles(torch.device("cpu"))


ADD_RELU = table.SHIPPED["add_relu"]["any"]
POINTWISE = table.SHIPPED["conv2d_fprop"]["ieee pointwise wide"]
WGRAD = table.SHIPPED["conv2d_wgrad"]["ieee spatial wide"]
POWER = "needed a power of two from"


@pytest.mark.parametrize(
    ("entry", "config", "problem"),
    [
        ("add_relu any", {**ADD_RELU, "BLOCK": 1}, None),
        ("add_relu any", {"BLOCK": 4096, "num_warps": 16, "num_stages": 8}, None),
        ("conv2d_wgrad ieee spatial wide", {**WGRAD, "BLOCK_K": 64}, None),
        ("conv2d_fprop ieee pointwise wide", {**POINTWISE, "BOXES": 1}, None),
        ("conv2d_fprop ieee pointwise wide", {**POINTWISE, "BOXES": 2}, " has BOXES = 2, needed 0 or 1"),
        ("add_relu some", ADD_RELU, " is unknown"),
        ("nothing any", ADD_RELU, " is unknown"),
        ("", ADD_RELU, " is unknown"),
        ("add_relu any", {"BLOCK": 64}, " is {'BLOCK': 64}, needed one with BLOCK, num_warps, num_stages"),
        ("add_relu any", 3, " is 3, needed one with BLOCK, num_warps, num_stages"),
        *(
            ("add_relu any", {**ADD_RELU, "BLOCK": value}, f" has BLOCK = {value!r}, {POWER} 1 to 4096")
            for value in (100, 0, 64.0, True, "64", [64], 8192)
        ),
        ("add_relu any", {**ADD_RELU, "num_warps": 3}, " has num_warps = 3, needed 1, 2, 4, 8 or 16"),
        ("add_relu any", {**ADD_RELU, "num_stages": 9}, " has num_stages = 9, needed 1 to 8"),
        ("conv2d_wgrad ieee spatial wide", {**WGRAD, "BLOCK_K": 8}, f" has BLOCK_K = 8, {POWER} 16 to 4096"),
    ],
    ids=str,
)
def test_what_may_stand_in_the_table(entry: str, config: Any, problem: str | None) -> None:
    kernel, name = table.split_entry(entry)
    wanted = None if problem is None else f"the entry '{kernel}', '{name}'{problem}"
    assert table.problem(kernel, name, config) == wanted


def test_all_that_is_shipped_may_stand_in_the_table() -> None:
    for kernel, rows in table.SHIPPED.items():
        assert [table.problem(kernel, name, config) for name, config in rows.items()] == [None] * len(rows)


# Shared memory a block may have: 163 KiB on sm_80, 227 KiB on sm_90 and sm_100, but 99 KiB on the smaller cards of
# each generation (sm_86, sm_89, sm_120), which SHIPPED is for, too.
MOST_SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# ptxas parks a value or two (of 8 bytes) outside of the loop to reach a number of registers that it likes; that is no
# register pressure of the tile, which costs hundreds of bytes at once.
PARKED = 16
MATRIX_KERNELS = {"conv2d_fprop", "conv2d_dgrad", "conv2d_wgrad", "pointwise_group", "depthwise_separable_fprop"}
# Of vectors of 8 bytes: channels that those of 16 do not divide, and a photograph's.
THIN = ("thin", "stem", "20 channels")


def code(*options: str) -> str:
    """What the tool prints, which compiles: in a process of its own."""
    done = subprocess.run(
        [sys.executable, CODE, *options], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-9000:]
    return done.stdout


# Of what is recorded, the kernels that do spill, and bytes.
SPILLS = {
    ("3.6.0 sm_100", "conv2d_wgrad | 16bit thin wide"): 40,
    ("3.9.0 sm_100", "depthwise_dgrad | pixels"): 64,
}


def test_recorded_kernels_do_not_spill() -> None:
    recorded = json.loads((REPOSITORY / "benchmarks" / "expected" / "triton.json").read_text())
    spilled: dict[tuple[str, str], int] = {}
    for version, kernels in recorded.items():
        for key, kernel in kernels.items():
            if kernel["stack"] > PARKED:
                which = version, key.rpartition(" | ")[0]
                spilled[which] = max(kernel["stack"], spilled.get(which, 0))
    assert spilled == SPILLS


@pytest.mark.slow
def test_goals_are_reached() -> None:
    assert "| on sm_90, float16" in code("--goals")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_entry_of_the_table_compiles(architecture: int) -> None:
    """To machine code, without a GPU: no spills, shared memory within bounds, tensor cores, vectors, pipelines; and for
    versions of Triton that are recorded, the very instructions."""
    kernels = [json.loads(line) for line in code(str(architecture), "--brief", "--json", "--compare").splitlines()]
    compiled = {(k["kernel"], k["entry"]) for k in kernels}
    shipped = {(kernel, entry) for kernel, rows in table.SHIPPED.items() for entry in rows}
    assert compiled == {one for one in shipped if architecture == 80 or not one[1].startswith("ieee")}
    for kernel in kernels:
        if not kernel["wide"]:
            assert kernel["stack"] <= PARKED, f"spills: {kernel}"
            assert "local" not in kernel["kinds"], f"spills in its loop: {kernel}"
        assert kernel["shared"] <= MOST_SHARED[architecture], kernel
        if kernel["kernel"] in MATRIX_KERNELS and not kernel["entry"].startswith("ieee"):
            assert kernel["tensor_core"], f"no tensor cores: {kernel}"
        if kernel["kernel"] in MATRIX_KERNELS - {"depthwise_separable_fprop"} and not kernel["wide"]:
            copies = kernel["accesses"]["copy"].keys()
            assert copies, f"nothing is pipelined: {kernel}"
            assert copies <= {"16", "box", *(["8"] if is_thin(kernel) else [])}, kernel


def is_thin(kernel: dict[str, Any]) -> bool:
    return any(word in f"{kernel['entry']} {kernel['call']}" for word in THIN)

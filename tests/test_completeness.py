"""Fails when an op lacks a layer, from its schema to its line in the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import CASES, DTYPES

import fastconv
from fastconv import nn, ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fastconv.__file__).parent
SCHEMAS = ROOT / "csrc" / "schemas.cpp"
OPERATORS = re.findall(r'"(\w+)\(Tensor', SCHEMAS.read_text())
BACKWARDS = [name for name in OPERATORS if name.endswith("_backward")]

# module names: conv2d_relu -> Conv2dReLU
MODULES = {module.lower(): module for module in nn.__all__}


def has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastconv::{operator}", key)


def test_schemas_and_public_functions_agree() -> None:
    assert sorted(set(OPERATORS) - set(BACKWARDS)) == sorted(ops.__all__)


@pytest.mark.parametrize("key", ["CPU", "Meta", "Autograd", "FuncTorchBatched"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels(operator: str, key: str) -> None:
    assert has_kernel(operator, key)


@pytest.mark.parametrize("operator", OPERATORS)
def test_cuda_kernels(operator: str) -> None:
    """Of the sources, as the library may have been built without a CUDA toolkit."""
    glue = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cpp"))
    assert f'm.impl("{operator}"' in glue


@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_kernels(operator: str) -> None:
    pytest.importorskip("triton")
    from fastconv import triton

    assert operator in triton.OPERATORS
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastconv_triton::{operator}", "CUDA")


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
@pytest.mark.parametrize("op", ops.__all__)
def test_autocast(op: str, key: str) -> None:
    assert has_kernel(op, key)


@pytest.mark.parametrize("op", ops.__all__)
def test_every_layer(op: str) -> None:
    assert (PACKAGE / "ops" / f"{op}.py").is_file()
    assert (PACKAGE / "nn" / f"{op}.py").is_file()
    assert op.replace("_", "") in MODULES
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()
    assert sum(case.op == op for case in CASES) >= 4
    readme = (ROOT / "README.md").read_text()
    assert f"`{op}`" in readme
    assert f"`{MODULES[op.replace('_', '')]}`" in readme


@pytest.mark.parametrize("op", ops.__all__)
def test_public_docstrings(op: str) -> None:
    """Arguments, result, errors and the source; every argument by name."""
    function = getattr(ops, op)
    text = function.__doc__
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert section in text
    for name in function.__annotations__:
        if name != "return":
            assert re.search(rf"\b{name}\b", text), f"{op}: {name} is not described"


def test_cases_have_names_of_their_own_and_reasons() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)
    assert all(case.why for case in CASES)
    assert set(DTYPES) == {torch.float32, torch.float64, torch.bfloat16, torch.float16}

"""Fails when an op lacks a layer, from its schema to its line in the README."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv import aten_kernels, models, nn, ops
from fastconv.aten_kernels import cudnn
from fastconv.measure.layers import layers_of
from fastconv.operators.schemas import SCHEMAS, WITH_OUT
from fastconv.swapping import patterns
from support import drawn_calls
from support.bad_calls import TABLE
from support.cases import CASES, DTYPES
from support.names import MISSING, cannot_be_imported, get, modules

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(fastconv.__file__).parent
OPERATORS = list(SCHEMAS)
BACKWARDS = [name for name in OPERATORS if name.endswith("_backward")]
OUTS = [name for name in OPERATORS if name.endswith(".out")]

# module names: conv2d_relu -> Conv2dReLU
MODULES = {module.lower(): module for module in nn.__all__}


def has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastconv::{operator}", key)


def test_schemas_and_public_functions_agree() -> None:
    assert sorted(set(OPERATORS) - set(BACKWARDS) - set(OUTS)) == sorted(ops.__all__)
    assert [name for name in ops.__all__ if "out" in getattr(ops, name).__annotations__] == sorted(WITH_OUT)


def test_schemas_are_those_of_the_library() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastconv::")]
    assert {name.removeprefix("fastconv::") for name in names if "::_" not in name} == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        operator, _, overload = name.partition(".")
        registered = getattr(getattr(torch.ops.fastconv, operator), overload or "default")._schema
        assert registered == torch._C.parse_schema(f"fastconv::{name}{schema}")


@pytest.mark.parametrize("key", ["CPU", "Meta", "Autograd", "FuncTorchBatched", "ADInplaceOrView"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels(operator: str, key: str) -> None:
    """What is differentiable has a rule for vmap, what writes into an argument counts that argument's versions."""
    missing = "FuncTorchBatched" if operator in OUTS else "ADInplaceOrView"
    assert has_kernel(operator, key) == (key != missing)


def sources(folder: str, pattern: str) -> str:
    return "".join(path.read_text() for path in sorted((ROOT / "csrc" / folder).rglob(pattern)))


@pytest.mark.parametrize("key", ["cpu", "cuda"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_glue(operator: str, key: str) -> None:
    """Of the sources, as the library may have been built without a CUDA toolkit: what implements the operator for any
    backend is instantiated for this one."""
    shared = re.split(r"^struct (?=\w+Operators\b)", sources("common", "*_operators.h"), flags=re.MULTILINE)
    (family,) = (text for text in shared[1:] if f'm.impl("{operator}"' in text)
    name = re.match(r"\w+", family)[0]
    assert re.search(rf"\b{name}<[^;]*>::implement\(m\);", sources(key, "*.cpp"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_kernels(operator: str) -> None:
    pytest.importorskip("triton")
    from fastconv import triton_kernels

    assert operator in triton_kernels.OPERATORS
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastconv_triton::{operator}", "CUDA")


@pytest.mark.parametrize("operator", OPERATORS)
def test_aten_kernels(operator: str) -> None:
    assert operator in aten_kernels.OPERATORS
    assert operator in cudnn.OPERATORS
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastconv_cudnn::{operator}", "CUDA")


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
@pytest.mark.parametrize("op", [*ops.__all__, *OUTS])
def test_autocast(op: str, key: str) -> None:
    assert has_kernel(op, key)


@pytest.mark.parametrize("op", ops.__all__)
def test_every_layer(op: str) -> None:
    assert (PACKAGE / "ops" / f"{op}.py").is_file()
    assert (PACKAGE / "nn" / f"{op}.py").is_file()
    assert (PACKAGE / "triton_kernels" / f"{op}.py").is_file()
    assert op.replace("_", "") in MODULES
    assert any(layer.verified for layer in layers_of(op))
    assert sum(case.op == op for case in CASES) >= 4
    assert any(bad.op == op for bad in TABLE)
    assert op in drawn_calls.OPS
    assert f"\ndef {op}(" in (ROOT / "benchmarks" / "eager.py").read_text()
    for text in ("README.md", "CHANGELOG.md", "csrc/README.md"):
        assert f"`{op}`" in (ROOT / text).read_text(), text
    readme = (ROOT / "README.md").read_text()
    assert f"`{MODULES[op.replace('_', '')]}`" in readme


def files(folder: str) -> list[str]:
    """The public modules in a folder of the package."""
    return sorted(path.stem for path in (PACKAGE / folder).glob("[!_]*.py"))


def test_every_network_is_registered_where_it_is_defined() -> None:
    with torch.device("meta"):
        defining = {type(models.build(name)).__module__.rpartition(".")[2] for name in models.names()}
    assert sorted(defining | {"registry"}) == files("models")


def test_every_pattern_is_looked_for() -> None:
    assert sorted(pattern.__module__.rpartition(".")[2] for pattern in patterns.PATTERNS) == files("swapping/patterns")


def test_every_family_of_cuda_kernels_has_its_rooms() -> None:
    """What its kernels take, how one is chosen, and for each architecture which of them are built."""
    cases = ROOT / "csrc/cuda/conformance"
    architectures = {path.parent for path in (ROOT / "csrc/cuda").rglob("*.cu") if cases not in path.parents}
    assert architectures
    for folder in architectures:
        assert re.fullmatch(r"sm\d+[af]?", folder.name), folder
        assert (folder / "instances.cu").is_file(), folder
        assert {"params.h", "plan.cpp", "plan.h"} <= {path.name for path in folder.parent.iterdir()}, folder
        # Instructions have a room of their own, with twins for the emulator, and cases that try them on a GPU.
        assert (cases / folder.name / "cases.cu").is_file(), folder
        assert (ROOT / "csrc/cuda/ptx" / f"{folder.name}.cuh").is_file(), folder
        assert (ROOT / "emulator/include/cuda/ptx" / f"{folder.name}.cuh").is_file(), folder


TEXTS = {str(path.relative_to(ROOT)): path for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md")]}
# The package may be installed elsewhere than the texts are.
FOLDERS = {ROOT, PACKAGE.parent}
GENERATED = ("emulator/goldens", "build/", "table.md")  # by a GPU, a build, a sweep


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_files_that_texts_name_exist(text: Path) -> None:
    """From the root, or from where the text is; `<op>` stands for any name."""
    missing = []
    for name in re.findall(r"`([\w./<>-]+/[\w./<>-]*|[\w.<>-]+\.(?:py|cpp|cuh?|h|md))`", text.read_text()):
        pattern = re.sub(r"<\w+>", "*", name).rstrip("/")
        if not name.startswith(GENERATED) and not any(any(folder.glob(pattern)) for folder in FOLDERS | {text.parent}):
            missing.append(name)
    assert missing == []


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


def test_modules_are_found_by_their_names() -> None:
    """`import fastconv.a.b as c` follows attributes, hence fails where a function has the name of a module.

    Only an op's or a network's own file may go by the name of its function, which is all that others need of it.
    """
    for name in modules():
        importlib.import_module(name)
        package, _, last = name.rpartition(".")
        if last != "__main__" and package not in ("fastconv.ops", "fastconv.triton_kernels", "fastconv.models"):
            assert inspect.ismodule(functools.reduce(getattr, name.split(".")[1:], fastconv)), name


def test_names_in_texts_can_be_looked_up() -> None:
    texts = [*PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*/README.md")]
    for path in texts:
        for name in re.findall(r"\bfastconv(?:\.[A-Za-z_]\w*)+", path.read_text()):
            assert cannot_be_imported(name) or get(name) is not MISSING, f"{path}: {name}"

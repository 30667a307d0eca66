"""The Triton operators as torch sees them: registration, opcheck, compile, export, autocast, vmap, derivatives."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from support import dispatching
from support.autograd import check_gradgradcheck
from support.cases import CASES, FIRST, Case, run, tensors
from support.dispatching import FIRST_WITH_OUT, Call
from support.kernel_backends import on_triton

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with on_triton() as found:
        yield found


def test_importing_fastconv_leaves_triton_alone() -> None:
    code = "import sys, fastconv; print('triton' in sys.modules, 'fastconv.triton_kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_without_triton() -> None:
    """The package imports and says what is missing and how to get it."""
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch, fastconv
print(fastconv.operators.backends.available()["triton"])
try:
    fastconv.ops.add_relu(torch.ones(1), torch.ones(1), backend="triton")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count('triton is not installed: pip install "fastconv[triton]"') == 2


def test_cuda_key_of_the_public_operators() -> None:
    """Without CUDA kernels in the library, or without the library, Triton's are those of ``torch.ops.fastconv``."""
    code = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, fastconv
from fastconv.operators import cuda_by_triton, schemas
cuda_by_triton.register("fastconv_test", define=True)
for name in schemas.SCHEMAS:
    for key in ("CUDA", "Meta", "Autograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastconv_test::{name}", key), (name, key)
x = torch.empty(2, 3, device="meta")
assert torch.ops.fastconv_test.add_relu(x, x, "relu").shape == x.shape
assert torch._C._dispatch_has_kernel_for_dispatch_key("fastconv::add_relu", "CUDA")
print("fastconv.triton_kernels" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", [*FIRST.values(), *(c for c in CASES if c.name == "empty_batch")], ids=str)
def test_opcheck(case: Case) -> None:
    """Of fewer cases than tests/ops/test_dispatch.py has, as its fake kernels are the same and its real ones slow."""
    dispatching.check_opcheck(case, "fastconv_triton")


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST_WITH_OUT, ids=str)
def test_out_as_torch_has_it(case: Case) -> None:
    dispatching.check_opcheck_out(case, "fastconv_triton")
    dispatching.check_compile_out(case, True, "triton")
    dispatching.check_out_counts_versions(case, "triton")
    dispatching.check_autocast_out(case, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_compile_fullgraph(case: Case) -> None:
    dispatching.check_compile_fullgraph(case, dynamic=True)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_export_is_one_node(case: Case) -> None:
    module = Call(case)
    program = torch.export.export(module, (module.input,))
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [name for name in called if "getitem" not in name] == [f"fastconv_triton.{case.op}.default"]
    torch.testing.assert_close(program.module()(module.input), module(module.input))


@pytest.mark.parametrize("cast_to", HALVES, ids=str)
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_autocast_dtypes_are_eagers(case: Case, cast_to: torch.dtype) -> None:
    dispatching.check_autocast_dtypes_are_eagers(case, torch.float32, cast_to, "triton")


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_autocast_under_compile(case: Case) -> None:
    dispatching.check_autocast_under_compile(case)


@pytest.mark.parametrize("which", ["input", "everything"])
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_vmap(case: Case, which: str) -> None:
    dispatching.check_vmap(case, which)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_second_derivatives(case: Case) -> None:
    """float64 by differences, float32 against the reference."""
    check_gradgradcheck(case)

    def second(backend: str) -> tuple[Tensor, ...]:
        arguments = case.arguments(seed=1, requires_grad=True)
        leaves = tensors(arguments)
        total = sum(output.square().sum() for output in run(case.op, arguments, backend=backend))
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(second("triton"), second("reference"), rtol=1e-4, atol=1e-4)

"""Instructions are tried before kernels; those that differ cost the kernels that use them. The emulator is the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastconv
from fastconv.operators import kernels, measured, table_files
from fastconv.operators.fingerprint import fingerprint
from fastconv.operators.tables import Candidate, Entry, Table
from fastconv.qualification import conformance, conformance_cases
from fastconv.qualification import qualify as qualifying
from fastconv.qualification.collecting import Collected, calls_of
from fastconv.qualification.examination import Options
from fastconv.qualification.processes import Worker
from fastconv.qualification.reporting import Qualification
from fastconv.qualification.worker import worker
from support.emulated_worker import BACKEND, PLANTED
from support.kernel_backends import device_of, emulated, kernel_table

CPU = torch.device("cpu")
MODULES = ["support.emulated_worker"]
ADD, ADD_1, ADD_16, ADD_STRIDED = "add_relu_fprop", *(f"add_relu_fprop_{end}" for end in ("vec1", "vec16", "strided"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's tables: none yet."""
    if not emulated().checks_plain_accesses:
        pytest.skip("without clang the emulator does not see plain stores, and cases that need them fail")
    monkeypatch.setenv("FASTCONV_TABLES", str(tmp_path))
    measured.forget()
    yield tmp_path
    measured.forget()
    kernels.disable([])


def plant(monkeypatch: pytest.MonkeyPatch, *what: str) -> None:
    monkeypatch.setenv(PLANTED, ";".join(what))


def a_worker() -> Worker:
    return worker(torch.device("cpu"), MODULES)


def a_sum() -> Collected:
    x = torch.randn(1, 8, 4, 4)
    return calls_of(fastconv.ops.add_relu, [x, torch.randn(1, 8, 4, 4)], training=False)


def examine(*among: str, again: bool = False) -> Qualification:
    options = Options(among or (BACKEND,), seconds=0.01)
    return qualifying.examine(a_sum(), CPU, options, show=False, modules=MODULES, patience=60, again=again)


def table(found: Qualification) -> Table:
    loaded = table_files.load(found.path, fingerprint(CPU))
    assert loaded is not None
    return loaded


def using(*instructions: str) -> set[str]:
    return {kernel["name"] for kernel in kernel_table(BACKEND) if set(kernel["uses"]) & set(instructions)}


def test_nothing_differs() -> None:
    with a_worker() as worker:
        assert list(conformance.check(worker, ["cpu"], 30)) == []
        assert list(conformance.check(worker, None, 30, known=[BACKEND])) == []
        (found,) = conformance.check(worker, None, 30)
    assert found.backend == BACKEND
    assert found.differs == found.disabled == {}
    assert found.kernels == {kernel["name"]: tuple(kernel["uses"]) for kernel in kernel_table(BACKEND)}


@pytest.mark.slow
def test_what_differs_disables_the_kernels_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name; a case that ends its process, hangs or meets an error of the device counts as one that differs, and
    costs the others nothing. Of a case's instructions those are not blamed that pass cases of their own."""
    wrong = ("wrong mma_m16n8k16<Half>", "wrong wgmma<Half> from row 1")
    plant(monkeypatch, *wrong, "crashes ldmatrix_x2", "hangs shuffles", "fails powf")
    with a_worker() as worker:
        (found,) = conformance.check(worker, [BACKEND], 4)
    assert found.differs == {
        "mma_m16n8k16_f16": "mma_m16n8k16<Half>: its 128 words are not the expected ones",
        "ldmatrix": "ldmatrix_x2: its process ended by SIGSEGV",
        "shuffle": "shuffles: its process gave no answer for 4 s",
        "powf": "powf: its process exited with status 1: CUDA error: an illegal memory access",
        "wgmma_rows": "wgmma<Half> from row 1: its 256 words are not the expected ones",
    }
    disabled = found.disabled
    assert disabled.keys() == using(*found.differs)
    assert disabled["conv2d_fprop_bf16_64x64_sm80"].startswith("ldmatrix differs on this GPU: ldmatrix_x2: its process")
    assert {"conv2d_fprop_fp32_64x64_sm80", "depthwise_conv2d_fprop_nhwc", ADD_16}.isdisjoint(disabled)


@pytest.mark.slow
def test_a_table_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """That nothing differed: it is not asked again, unless all is."""
    found = examine()
    assert table(found).conformance == (BACKEND,)
    assert table(found).disabled == {}
    (entry,) = found.entries
    assert {one.variant.get(ADD) for one in entry.candidates} >= {ADD_1}
    plant(monkeypatch, "wrong load, store 16 bytes")
    examine(BACKEND, "cpu")
    assert table(found).disabled == {}
    examine(again=True)
    assert table(found).disabled.keys() == using("load_store")


def test_disabled_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when candidates are tried, nor by the library's own choice, here and wherever the table is read."""
    plant(monkeypatch, "wrong load, store 4 bytes")
    found = examine()
    said = table(found).disabled
    assert found.disabled == said
    assert f"\ndisabled:\n  {min(said)}: load_store differs on this GPU: " in str(found)
    assert said.keys() == using("load_store")
    assert said[ADD_16] == "load_store differs on this GPU: load, store 4 bytes: its 32 words are not the expected ones"
    (entry,) = found.entries
    (ours,) = (one for one in entry.candidates if one.backend == BACKEND)
    assert (ours.outcome, ours.variant) == ("refused", {})
    assert ours.reason.startswith("RuntimeError: fastconv: add_relu_fprop has no CUDA kernel for this call: 2 of them")
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(RuntimeError, match="2 of them are disabled, an instruction differs on this GPU"):
        fastconv.ops.add_relu(x, x, backend=BACKEND)
    kernels.disable([])
    measured.forget()
    with kernels.choices() as made, pytest.raises(RuntimeError, match="2 of them are disabled"):
        fastconv.ops.add_relu(x, x, backend=BACKEND)
    reasons = {one.kernel: one.reason for one in made[0].candidates}
    assert reasons[ADD_1] == reasons[ADD_16] == "disabled: its instruction differs on this GPU"
    other = torch.randn(1, 4, 4, 8).permute(0, 3, 1, 2)
    with kernels.choices() as made:
        torch.testing.assert_close(fastconv.ops.add_relu(x, other, backend=BACKEND), torch.relu(x + other))
    assert made[0].chosen == ADD_STRIDED


def test_what_was_measured_of_a_disabled_kernel_does_not_count() -> None:
    """As where an instruction was tried after the kernel."""
    variants: tuple[dict[str, Any], ...] = ({}, {ADD: ADD_1}, {ADD: ADD_16}, {"some blocks": {"BLOCK": 64}})
    entry = Entry("add_relu", "any", (1,), tuple(Candidate(BACKEND, one, outcome="ok") for one in variants))
    assert [one.variant for one in measured.usable(entry, CPU)] == list(variants)
    measured.use(CPU, Table(fingerprint(CPU), disabled={ADD_1: "load_store differs on this GPU"}))
    assert [one.variant for one in measured.usable(entry, CPU)] == [one for one in variants if one != {ADD: ADD_1}]


def test_inputs_have_all_that_is_special() -> None:
    """Zeros, infinities, NaN, subnormals, numbers halfway between others, of every size and sign."""
    device_of(BACKEND)
    floats = torch.tensor(conformance_cases.words("floats", 256)).to(torch.uint32).view(torch.float32)
    assert floats.isnan().any()
    assert (floats.isinf().sum(), (floats == 0).sum()) == (2, 2)
    finite = floats[floats.isfinite() & (floats != 0)].abs()
    assert finite.min() < 1e-38
    assert finite.max() > 1e38
    assert (floats.signbit().float().mean() - 0.5).abs() < 0.1
    for dtype in ("half", "bfloat16", "tf32"):
        kinds = [conformance_cases.words(f"mma {dtype} {values}", 0) for values in ("integers", "fractions")]
        assert [len(words) for words in kinds] == [320, 320]

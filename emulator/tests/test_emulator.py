"""The emulator of the CUDA kernels: what it must catch, and that it is silent where nothing is wrong."""

import ctypes
import re

import numpy as np
import pytest

pytest.importorskip("ninja", reason="the emulator is built by ninja")
import planted
from planted import SEEDS, pointer

import emulator

# Bug, the kind of report that names it, whether it takes clang to see it
GEMM_BUGS = [
    ("kWaitOneGroupShort", "copy not waited for", False),
    ("kNoBarrierAfterWait", "race|copy not waited for", False),
    ("kRowPastTheEnd", "out of bounds", False),
    ("kNoZeroFill", "uninitialised", False),
    ("kOtherSwizzle", "wrong", False),
    ("kFragmentsSwapped", "wrong", False),
    ("kTailNotMasked", "wrong|out of bounds", False),
    ("kNoBarrierBeforeStaging", "race", True),
    ("kNoBarrierAfterStaging", "race", True),
    ("kBiasPastTheEnd", "out of bounds", True),
    ("kStorePastTheEnd", "out of bounds", True),
    ("kRefillsTheStageInUse", "race", False),
    ("kMisalignedCopy", "misaligned", False),
    ("kMisalignedLdmatrix", "misaligned", False),
    ("kCopiesLeftBehind", "copy never waited for", False),
    ("kBlocksOverlap", "race between blocks", True),
    ("kWritesItsInput", "write to an input", True),
    ("kRowNotWritten", "wrong", False),
    ("kSharedMemoryTooSmall", "out of bounds", False),
    ("kTooManyThreads", "the kernel table says at most 128", False),
    ("kStoresIntoTheGap", "between the rows of c", True),
    ("kMisalignedVector", "misaligned", False),
    ("kLdmatrixInHalfAWarp", "divergence", False),
    ("kStagingRowsOverlap", "race", True),
    ("kOvertakesACopy", "copy overtaken", True),
    ("kWaitWithoutCommit", "copy not waited for", False),
]
EXCHANGE_BUGS = [
    ("kNoSyncwarp", "race", True),
    ("kBarrierInHalfTheBlock", "divergence", False),
    ("kBarriersOnTwoLines", "divergence", False),
    ("kEarlyReturn", "divergence", False),
    ("kBarrierAgainstSyncwarp", "deadlock|divergence", False),
    ("kShuffleFromAnIdleLane", "misuse", False),
    ("kShuffleNotInItsMask", "divergence|misuse", False),
    ("kSumNeverCleared", "uninitialised", True),
    ("kTwoThreadsOneElement", "race", True),
    ("kNoBarrierBetweenWarps", "race|uninitialised", True),
    ("kReadsAnotherBlock", "race between blocks", True),
    ("kSharedPastTheEnd", "out of bounds", True),
    ("kSharedBeforeTheBegin", "out of bounds", True),
]
# In the order of bugs.cu's enum
NAMES = ["kNone"] + [name for name, *_ in GEMM_BUGS + EXCHANGE_BUGS]
# Rows of the output are wider than the output: what lies between them is not the kernel's.
PITCH = 8


@pytest.fixture(scope="module", params=planted.BUILDS)
def bugs(request):
    return planted.load("bugs", request.param, ["run_gemm", "run_exchange"])


def run_gemm(library, bug: str, m: int, n: int, k: int) -> tuple[str, bool]:
    """What the emulator said, and whether the numbers are right."""
    random = np.random.default_rng(m * n * k)
    a, b, bias = (random.integers(-4, 5, size).astype(np.float16) for size in ((m, k), (n, k), (n,)))
    c = np.full((m, n + PITCH), np.nan, np.float16)
    sizes = map(ctypes.c_int, (m, n, k, n + PITCH))
    said = library.functions.run_gemm(NAMES.index(bug), *map(pointer, (a, b, bias, c)), *sizes).decode()
    expected = a.astype(np.float32) @ b.astype(np.float32).T + bias
    return said, bool((c[:, :n] == expected).all() and np.isnan(c[:, n:]).all())


def run_exchange(library, bug: str) -> tuple[str, bool]:
    values = np.random.default_rng(0).integers(-4, 5, 256).astype(np.float32)
    out = np.full(256, np.nan, np.float32)
    said = library.functions.run_exchange(NAMES.index(bug), pointer(values), pointer(out)).decode()
    return said, bool((out.reshape(4, 64) == values.reshape(4, 64).sum(1, keepdims=True)).all())


# Whole tiles, ragged tiles, more than one block either way, fewer steps than stages.
SHAPES = [(64, 64, 128), (100, 90, 136), (128, 72, 40), (5, 3, 8)]


def test_the_bugs_are_in_the_order_of_the_enum():
    assert planted.enumerators("bugs") == NAMES
    assert len(NAMES) > 21


@pytest.mark.parametrize("shape", SHAPES)
def test_correct_gemm(bugs, shape):
    for seed in SEEDS:
        bugs.seed(seed)
        assert run_gemm(bugs, "kNone", *shape) == ("", True)


def test_correct_exchange(bugs):
    for seed in range(20):
        bugs.seed(seed)
        assert run_exchange(bugs, "kNone") == ("", True)


def check_is_caught(bugs, run, kinds: str, needs_clang: bool) -> set[str]:
    if needs_clang and not bugs.checks_plain_accesses:
        pytest.skip("only clang's instrumentation shows this one")
    return planted.check_is_caught(bugs, run, kinds)


@pytest.mark.parametrize(("bug", "kinds", "needs_clang"), GEMM_BUGS)
def test_bug_in_the_gemm(bugs, bug, kinds, needs_clang):
    said = check_is_caught(bugs, lambda: run_gemm(bugs, bug, 100, 90, 136), kinds, needs_clang)
    assert all("gemm" in text for text in said if text)


@pytest.mark.parametrize(("bug", "kinds", "needs_clang"), EXCHANGE_BUGS)
def test_bug_in_the_exchange(bugs, bug, kinds, needs_clang):
    check_is_caught(bugs, lambda: run_exchange(bugs, bug), kinds, needs_clang)


def test_a_report_names_the_line(bugs):
    """Of a call, by its argument; of a plain access, by the debug information."""
    lines = (emulator.build.HERE / "bugs.cu").read_text().splitlines()

    def line(said: str) -> str:
        return lines[int(re.search(r"^  emulator/bugs\.cu:(\d+): ", said, re.MULTILINE)[1]) - 1]

    assert "cp_async<16>" in line(run_gemm(bugs, "kRowPastTheEnd", 100, 90, 136)[0])
    if bugs.checks_plain_accesses:
        assert "to_float(p.bias" in line(run_gemm(bugs, "kBiasPastTheEnd", 100, 90, 136)[0])
        assert "= shared[64] + shared[65]" in line(run_exchange(bugs, "kNoBarrierBetweenWarps")[0])


def test_bank_conflicts_are_counted(bugs):
    def conflicts(bug: str) -> float:
        bugs.reset_statistics()
        run_gemm(bugs, bug, 64, 64, 128)
        counts = bugs.statistics()
        assert counts["launches"] == {"gemm": 1}
        return counts["ldmatrix_conflicts"] / counts["ldmatrix"]

    assert conflicts("kNone") == 0
    # Rows r and r + 2 share their banks where only two bits of the row select the chunk.
    assert conflicts("kOtherSwizzle") > 1


def test_the_seed_decides_the_order(bugs):
    def switches(seed: int) -> int:
        bugs.seed(seed)
        bugs.reset_statistics()
        run_gemm(bugs, "kNone", 64, 64, 128)
        return bugs.statistics()["switches"]

    assert switches(1) == switches(1)
    assert len({switches(seed) for seed in SEEDS}) > 1

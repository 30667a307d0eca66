"""The emulator of the kernels of sm_90a: what it must catch, and that it is silent where nothing is wrong."""

import ctypes
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("ninja", reason="the emulator is built by ninja")
import planted
from planted import HOPPER, SEEDS, aligned, pointer

# Bug, the kinds of reports that name it; in the order of bugs90.cu's enum. Those of a program that has several orders
# show as one of several.
ROW_BUGS = [
    ("kFullParity", "copy not waited for|race|deadlock"),
    ("kEmptyParity", "deadlock"),
    ("kExpectsTooFew", "misuse"),
    ("kExpectsTooMany", "deadlock"),
    ("kReleasesEarly", "race"),
    ("kNoWaitBeforeRelease", "race"),
    ("kNeverWaitsForEmpty", "misuse"),
    ("kNoInitFence", "missing proxy fence"),
    ("kNoBarrierAfterInit", "race|misuse"),
    ("kBarrierNotInitialised", "misuse"),
    ("kInitialisesAgain", "misuse"),
    ("kTooManyArrivals", "race|misuse|deadlock"),
    ("kTwoThreadsLoad", "copy overtaken|misuse"),
    ("kMisalignedBox", "misaligned"),
    ("kBoxNeverWaitedFor", "copy never waited for"),
    ("kReadsABoxUnderWay", "copy not waited for"),
    ("kOneLaneWaits", "race|copy not waited for"),
    ("kReadsBeforeWaiting", "race|copy not waited for"),
    ("kDepthStep", "wrong"),
    ("kNoWgmmaFence", "missing wgmma.fence"),
    ("kNoCommit", "product never waited for"),
    ("kSumsReadEarly", "race|wrong"),
    ("kSumsTouched", "accumulator touched"),
    ("kProductInHalfAWarpgroup", "divergence"),
    ("kDescriptorsDiffer", "divergence"),
    ("kNoFenceBeforeStore", "missing proxy fence"),
    ("kNoBarrierBeforeStore", "race"),
    ("kBothAtOneBarrier", "race|deadlock"),
    ("kBarrierCountsDiffer", "divergence"),
    ("kStagingOverwritten", "race"),
    ("kStagingNotSwizzled", "wrong"),
    ("kLoadsOverAStore", "race"),
    ("kStoreNeverWaitedFor", "store never waited for"),
    ("kRegistersOfNobody", "deadlock"),
    ("kRegistersInOneWarp", "divergence|deadlock"),
]
COLUMN_BUGS = [("kLeadingOffset", "wrong")]
IMAGE_BUGS = [("kOffsetsExchanged", "wrong"), ("kStartOutside", "out of bounds")]
WRITTEN_BUGS = [("kNoFenceBeforeProduct", "missing proxy fence"), ("kFenceAfterArrival", "missing proxy fence")]
NAMES = ["kNone"] + [name for name, _ in ROW_BUGS + COLUMN_BUGS + IMAGE_BUGS + WRITTEN_BUGS]


@pytest.fixture(scope="module", params=planted.BUILDS)
def bugs(request):
    library = planted.load("bugs90", request.param, ["run_gemm"])
    library.device(HOPPER)
    return library


def launch(library, bug: str, source: int, operands, expected: np.ndarray, pitch: int, shape) -> tuple[str, bool]:
    """What the emulator said, and whether the numbers are right. Rows are wider than the output, by what is not its."""
    a, b, bias = map(aligned, operands)
    pixels, filters = expected.shape
    c = aligned(np.full((pixels, pitch), np.nan))
    numbers = (ctypes.c_int * 9)(*shape)
    said = library.functions.run_gemm(NAMES.index(bug), source, *map(pointer, (a, b, bias, c)), numbers).decode()
    return said, bool((c[:, :filters] == expected).all() and np.isnan(c[:, filters:]).all())


def pitch_of(columns: int) -> int:
    return -(-columns // 8) * 8 + 8


class Gemm(NamedTuple):
    """c = a b^T + bias, its operands lying as `source` says."""

    source: int
    m: int
    n: int
    k: int

    def run(self, library, bug: str = "kNone", pitch: int | None = None) -> tuple[str, bool]:
        random = np.random.default_rng(self.m * self.n * self.k)
        a, b, bias = (random.integers(-4, 5, size) for size in ((self.m, self.k), (self.n, self.k), self.n))
        operands = (a.T, b.T, bias) if self.source == COLUMNS else (a, b, bias)
        pitch = pitch or pitch_of(self.n)
        shape = (self.m, self.n, self.k, pitch)
        return launch(library, bug, self.source, operands, a @ b.T + bias, pitch, shape)


class Convolution(NamedTuple):
    """3x3 filters on images [n, h, w, c] with a border of 1."""

    n: int
    h: int
    w: int
    c: int
    filters: int
    stride: int

    def run(self, library, bug: str = "kNone") -> tuple[str, bool]:
        random = np.random.default_rng(self.n * self.h * self.w * self.c)
        image = random.integers(-4, 5, (self.n, self.h, self.w, self.c))
        weight, bias = random.integers(-2, 3, (self.filters, 3, 3, self.c)), random.integers(-4, 5, self.filters)
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [
            padded[:, i : i + self.h : self.stride, j : j + self.w : self.stride] @ weight[:, i, j].T
            for i in range(3)
            for j in range(3)
        ]
        expected = (sum(taps) + bias).reshape(-1, self.filters)
        pitch = pitch_of(self.filters)
        shape = (0, self.filters, 0, pitch, self.n, self.h, self.w, self.c, self.stride)
        return launch(library, bug, IMAGE, (image, weight, bias), expected, pitch, shape)


# bugs90.cu's Source
ROWS, COLUMNS, IMAGE, WRITTEN = range(4)
# Whole tiles; ragged ones; fewer steps than stages, and a tile that hardly exists; many tiles
CORRECT = [
    *(Gemm(source, *size) for source in (ROWS, COLUMNS, WRITTEN) for size in ((256, 128, 256), (200, 136, 200))),
    *(Gemm(source, 8, 8, 8) for source in (ROWS, COLUMNS, WRITTEN)),
    Gemm(ROWS, 5, 3, 72),
    Gemm(ROWS, 700, 300, 136),
    Convolution(2, 9, 11, 72, 72, 1),
    Convolution(2, 9, 11, 72, 72, 2),
    Convolution(1, 16, 16, 64, 128, 1),
    Convolution(3, 5, 7, 8, 8, 2),
]
# In these every bug shows: several tiles for a block, several rounds of the ring.
GEMM = (400, 136, 328)
CONVOLUTION = Convolution(2, 9, 11, 72, 72, 2)


def test_the_bugs_are_in_the_order_of_the_enum():
    assert planted.enumerators("bugs90") == NAMES


@pytest.mark.parametrize("problem", CORRECT, ids=str)
def test_correct(bugs, problem):
    for seed in SEEDS:
        bugs.seed(seed)
        assert problem.run(bugs) == ("", True)


@pytest.mark.parametrize(("bug", "kinds"), ROW_BUGS)
def test_bug_with_boxes_of_rows(bugs, bug, kinds):
    planted.check_is_caught(bugs, lambda: Gemm(ROWS, *GEMM).run(bugs, bug), kinds)


@pytest.mark.parametrize(("bug", "kinds"), COLUMN_BUGS)
def test_bug_with_boxes_of_columns(bugs, bug, kinds):
    planted.check_is_caught(bugs, lambda: Gemm(COLUMNS, *GEMM).run(bugs, bug), kinds)


@pytest.mark.parametrize(("bug", "kinds"), IMAGE_BUGS)
def test_bug_with_boxes_of_an_image(bugs, bug, kinds):
    planted.check_is_caught(bugs, lambda: CONVOLUTION.run(bugs, bug), kinds)


@pytest.mark.parametrize(("bug", "kinds"), WRITTEN_BUGS)
def test_bug_with_an_operand_that_threads_write(bugs, bug, kinds):
    planted.check_is_caught(bugs, lambda: Gemm(WRITTEN, 200, 136, 200).run(bugs, bug), kinds)


def test_a_deadlock_names_the_barrier(bugs):
    """And what it waits for: one row of a box more than the two boxes of a stage."""
    bugs.seed(1)
    said, _ = Gemm(ROWS, *GEMM).run(bugs, "kExpectsTooMany")
    assert "the mbarrier at shared byte " in said
    assert "parity 0, in phase 0 with 0 of 1 arrivals and 128 bytes to come" in said


def test_a_map_that_the_driver_refuses(bugs):
    said, _ = Gemm(ROWS, *GEMM).run(bugs, pitch=GEMM[1] + 4)
    assert said.startswith("fastconv emulator: a tensor map with a stride")


def test_counts(bugs):
    def counts(bug: str) -> dict[str, int]:
        bugs.reset_statistics()
        Gemm(ROWS, 128, 128, 128).run(bugs, bug)
        return bugs.statistics()

    right = counts("kNone")
    # Two boxes of operands for each of two steps, two of results for each warpgroup; of it four products for each step
    assert (right["tma"], right["wgmma"]) == (4 + 4, 2 * 2 * 4)
    # For 64 x 128 sums of each warpgroup, in fours of 8 x 8
    assert (right["stmatrix"], right["stmatrix_conflicts"]) == (2 * 32, 0)
    assert counts("kStagingNotSwizzled")["stmatrix_conflicts"] == 2 * 32 * 4 * 7
    assert set(right["instructions"]["gemm90"]) >= {"mbarrier", "tma_tiled", "tma_store", "wgmma_f16", "stmatrix"}

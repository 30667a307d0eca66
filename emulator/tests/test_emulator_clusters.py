"""The emulator of blocks in clusters: what it must catch, and that it is silent where nothing is wrong."""

import numpy as np
import pytest

pytest.importorskip("ninja", reason="the emulator is built by ninja")
import planted
from planted import HOPPER, SEEDS, aligned, pointer

# Bug, the kinds of reports that name it; in the order of bugs_cluster.cu's enum. Those of a program that has several
# orders show as one of several.
BUGS = [
    ("kEmptyCountsOwnReaders", "race|copy overtaken|misuse|deadlock"),
    ("kReleasesOwnStage", "deadlock"),
    ("kCountsAndReleasesOwn", "race|copy overtaken"),
    ("kReleasesOthersStage", "race|copy overtaken|misuse"),
    ("kRankOutside", "misuse"),
    ("kBlockBarrierAfterInit", "race|misuse"),
    ("kOneBlockSkipsTheBarrier", "race|misuse|deadlock"),
    ("kOneBlockWaitsAgain", "deadlock"),
    ("kNotInitialisedInOneBlock", "misuse"),
    ("kNoBarrierAtTheEnd", "the block has ended"),
    ("kOneBlockEndsAtOnce", "the block has ended|copy never waited for"),
    ("kBarrierInHalfAWarp", "divergence"),
    ("kExpectsOwnPart", "misuse|copy not waited for"),
    ("kExpectsTooMany", "deadlock"),
    ("kMaskWithoutOthers", "deadlock"),
    ("kMaskOutside", "misuse"),
    ("kMaskOfNobody", "misuse"),
    ("kAllBringOnePart", "race|copy overtaken"),
    ("kNeverWaitsForEmpty", "race|copy overtaken|misuse"),
    ("kMulticastsBeforeWaiting", "race|copy overtaken"),
    ("kReleasesEarly", "race"),
    ("kWaitsForOwnReaders", "race|copy overtaken"),
]

NAMES = ["kNone", "kDrainsTheRing", "kExpectsLate"] + [name for name, _ in BUGS]
# In this every bug shows: several tiles for a cluster, several rounds of the ring.
PROBLEM = (400, 136, 328)


@pytest.fixture(scope="module", params=planted.BUILDS)
def bugs(request):
    library = planted.load("bugs_cluster", request.param, ["run_gemm"])
    library.device(HOPPER)
    return library


def run(library, bug: str = "kNone", cluster: int = 2, grid: int = 4, problem=PROBLEM) -> tuple[str, bool]:
    """What the emulator said, and whether the numbers are right."""
    m, n, k = problem
    random = np.random.default_rng(m * n * k)
    a, b = (random.integers(-4, 5, (rows, k)) for rows in (m, n))
    operands = [aligned(a), aligned(b), aligned(np.full((m, n), np.nan))]
    said = library.functions.run_gemm(NAMES.index(bug), cluster, grid, *map(pointer, operands), m, n, k).decode()
    return said, bool((operands[2] == a @ b.T).all())


def test_the_bugs_are_in_the_order_of_the_enum():
    assert planted.enumerators("bugs_cluster") == NAMES


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("problem", [PROBLEM, (64, 64, 64), (1024, 72, 200)], ids=str)
def test_correct(bugs, cluster, problem):
    for seed in SEEDS:
        bugs.seed(seed)
        assert run(bugs, cluster=cluster, grid=max(cluster, 4), problem=problem) == ("", True)


@pytest.mark.parametrize("program", ["kDrainsTheRing", "kExpectsLate"])
def test_other_correct_program(bugs, program):
    for seed in SEEDS:
        bugs.seed(seed)
        assert run(bugs, program) == ("", True)


@pytest.mark.parametrize(("bug", "kinds"), BUGS)
def test_bug(bugs, bug, kinds):
    planted.check_is_caught(bugs, lambda: run(bugs, bug), kinds)


def test_a_report_names_the_block(bugs):
    bugs.seed(1)
    said, _ = run(bugs, "kMaskWithoutOthers", grid=2)
    for block in range(2):
        assert f"of block ({block}, 0, 0), parity 0, in phase 0 with 0 of 1 arrivals and 4096 bytes to come" in said


def test_a_deadlock_names_the_barrier_of_the_cluster(bugs):
    bugs.seed(1)
    said, _ = run(bugs, "kOneBlockWaitsAgain", grid=2)
    assert "of block (0, 0, 0) waits in barrier.cluster at emulator/bugs_cluster.cu:" in said


@pytest.mark.parametrize(("grid", "cluster"), [(3, 2), (6, 4)])
def test_a_grid_of_no_whole_clusters(bugs, grid, cluster):
    said, _ = run(bugs, cluster=cluster, grid=grid)
    assert f"launched with clusters of {cluster} blocks in a grid of {grid} along x" in said


def test_instructions(bugs):
    bugs.reset_statistics()
    assert run(bugs) == ("", True)
    statistics = bugs.statistics()
    assert set(statistics["instructions"]["gemm_cluster"]) >= {"cluster", "tma_multicast", "tma_tiled"}
    assert statistics["blocks"] == 4

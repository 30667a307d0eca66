"""Which variants of a backend there are for a call (see `fastconv.operators.variants`), and a search among them.

Of CUDA kernels there are few for a call: each is a candidate. Of block sizes there are thousands: a few that the table
names are candidates, and `climb` goes from the shipped ones to a neighbour, a size halved or doubled, as long as one is
faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ..operators import kernels

if TYPE_CHECKING:
    from ..triton_kernels.table import Asked, Config

Variant = TypeVar("Variant", bound=Mapping[str, Any])

# A neighbour has to be faster by more than what two timings of the same differ by.
GAIN = 0.98


def cuda_variants(run: Callable[[], Any], backend: str, most: int) -> list[dict[str, str]]:
    """Calls `run`, and returns each kernel that could have run in place of one that did, as {family: kernel}.

    Families come in the order in which they chose, of each the kernels with the best scores, at most `most`, best
    first.
    """
    with kernels.choices() as made:
        run()
    families: dict[str, dict[str, float]] = {}
    for choice in made:
        if choice.backend != backend:
            continue
        scores = families.setdefault(choice.op, {})
        for candidate in choice.candidates:
            if not candidate.reason and candidate.kernel != choice.chosen:
                scores[candidate.kernel] = max(candidate.score, scores.get(candidate.kernel, 0))
    return [
        {family: kernel}
        for family, scores in families.items()
        for kernel in sorted(scores, key=scores.__getitem__, reverse=True)[:most]
    ]


def triton_candidates(noted: Iterable[Asked]) -> Iterator[dict[str, Config]]:
    """The variants that `fastconv.triton_kernels.table` has for what a call asks of it, one entry changed in each."""
    from ..triton_kernels import launch, table

    for entry, found in {asked.entry: asked for asked in noted}.items():
        for config in table.CANDIDATES.get(entry, ()):
            if config != found.config and launch.guarded(config, found.taps) == config:
                yield {entry: config}


def triton_neighbours(noted: Iterable[Asked], variant: Mapping[str, Config]) -> Iterator[dict[str, Config]]:
    """The variants one step away: one size of one entry halved or doubled, one stage more or less.

    All may stand in the table, and the guard for large filters leaves them alone. Sizes of tiles come before warps and
    stages, and of each kind every entry has a turn before one has its second.

    Args:
        noted: what the call asks of `fastconv.triton_kernels.table` where no variant is applied.
        variant: entries that are not in it are as noted.
    """
    entries: dict[str, Asked] = {}
    for asked in noted:
        # the guard that binds least: where one entry serves filters of two sizes, a step counts if it does for one
        if asked.entry not in entries or asked.taps < entries[asked.entry].taps:
            entries[asked.entry] = asked
    for tiles in (True, False):
        for round in itertools.zip_longest(*(_steps(asked, variant, tiles) for asked in entries.values())):
            yield from (found for found in round if found is not None)


def _steps(asked: Asked, variant: Mapping[str, Config], tiles: bool) -> Iterator[dict[str, Config]]:
    """Those of one entry, in the sizes of its tile or in the others."""
    from ..triton_kernels import launch, table

    config = variant.get(asked.entry, asked.config)
    for key, value in config.items():
        if key == "GROUP" or tiles == key.startswith("num_"):
            continue
        if key == "BOXES":
            others = [1 - value]
        elif key == "num_stages":
            # without a matrix product there is nothing to pipeline
            others = [value + 1, value - 1] if "BLOCK_K" in config else []
        else:
            others = [2 * value, value // 2]
        for other in others:
            found = {**config, key: other}
            standing = table.problem(*table.split_entry(asked.entry), found) is None
            if standing and launch.guarded(found, asked.taps) == found:
                rest = {entry: kept for entry, kept in variant.items() if entry != asked.entry}
                yield rest if found == asked.config else {**rest, asked.entry: found}


def climb(
    start: Variant, steps: Callable[[Variant], Iterable[Variant]], most: int
) -> Generator[Variant, float | None, Variant]:
    """Yields the variants to try, and returns the fastest; `start` where none counts.

    Is sent the time of each; None for one that is wrong or does not run here. Goes on from whatever is faster by more
    than `GAIN`, and ends where no step is. Tries none twice.

    Args:
        steps: where to go from a variant, the most promising first, such as `triton_neighbours`.
        most: how many are tried, the first one included.
    """
    best, fastest = start, (yield start)
    tried = [start]
    ahead = iter(steps(best))
    while len(tried) < most and (candidate := next(ahead, None)) is not None:
        if candidate in tried:
            continue
        tried.append(candidate)
        seconds = yield candidate
        if seconds is not None and (fastest is None or seconds < GAIN * fastest):
            best, fastest = candidate, seconds
            ahead = iter(steps(best))
    return best

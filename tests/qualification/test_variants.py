"""Which variants a call has, how they are put in force, and the search among block sizes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import pytest
import torch

from fastconv import ops
from fastconv.operators import kernels, variants
from fastconv.qualification import variants as searching
from fastconv.qualification.variants import climb, cuda_variants, triton_candidates, triton_neighbours
from support.kernel_backends import CUDA, device_of, on, on_triton

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def driven(search: Generator[Any, float | None, Any], seconds_of: Callable[[Any], float | None]) -> Any:
    """Where a climb ends that is told these times."""
    variant = next(search)
    while True:
        try:
            variant = search.send(seconds_of(variant))
        except StopIteration as end:
            return end.value


def choices(function: Callable[[], Any]) -> list[kernels.Choice]:
    with kernels.choices() as made:
        function()
    return made


def image(backend: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device_of(backend)).half().to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------- of CUDA kernels


@pytest.fixture(params=CUDA)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Calls run on it, backwards on the test's own thread, as preferences are a thread's."""
    with on(request.param), torch.autograd.set_multithreading_enabled(False):
        yield request.param


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("conv2d_relu", [(1, 16, 6, 6), (32, 16, 3, 3)]),
        ("depthwise_conv2d", [(1, 16, 6, 6), (16, 1, 3, 3)]),
        ("depthwise_separable_conv2d", [(1, 16, 6, 6), (16, 1, 3, 3), (16, 16, 1, 1)]),
        ("add_relu", [(1, 16, 6, 6), (1, 16, 6, 6)]),
        ("local_response_norm", [(1, 16, 6, 6)]),
    ],
)
def test_cuda_variants_are_the_kernels_that_then_run(op: str, shapes: list[tuple[int, ...]], backend: str) -> None:
    """Forward and backward: of all kernels there are, those and only those, but for the ones that had better not."""
    leaves = [image(backend, *shape).requires_grad_() for shape in shapes]
    options: dict[str, Any] = {"size": 3} if op == "local_response_norm" else {}

    def forward_backward() -> None:
        output = getattr(ops, op)(*leaves, **options)
        torch.autograd.grad(output, leaves, torch.ones_like(output))

    free = choices(forward_backward)
    found = cuda_variants(forward_backward, backend, 16)
    families, ran = {choice.op for choice in free}, {(choice.op, choice.chosen) for choice in free}
    runnable = []
    for family, kernel in [(entry["op"], entry["name"]) for entry in kernels.table(backend)]:
        if family not in families or (family, kernel) in ran:
            continue
        with variants.applied(backend, {family: kernel}):
            made = choices(forward_backward)
        takers = [choice for choice in made if choice.chosen == kernel]
        if any(not c.reason for choice in takers for c in choice.candidates if c.kernel == kernel):
            runnable.append({family: kernel})
            others = [choice for choice in made if choice.op != family]
            assert others == [choice for choice in free if choice.op != family]
        elif not takers:
            assert made == free
    assert sorted(found, key=str) == sorted(runnable, key=str)
    assert len(found) >= 2


def test_cuda_variants_are_ordered(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By family, and by score within one; so many of each at most. Those of another backend are not there."""
    x, w = image(backend, 1, 16, 8, 8), image(backend, 32, 16, 1, 1)

    def call() -> None:
        ops.pointwise_conv2d(x, w)
        ops.add_relu(x, x)
        ops.pointwise_conv2d(x, w)

    first, add, _ = choices(call)
    scores = {c.kernel: c.score for c in first.candidates if not c.reason and c.kernel != first.chosen}
    ordered = [{"conv2d_fprop": kernel} for kernel in sorted(scores, key=lambda kernel: -scores[kernel])]
    assert (first.op, add.chosen) == ("conv2d_fprop", "add_relu_fprop_vec16")
    assert len(set(scores.values())) > 2
    adds = {"add_relu_fprop": "add_relu_fprop_vec1"}
    assert cuda_variants(call, backend, 8) == [*ordered[:8], adds]
    assert cuda_variants(call, backend, 1) == [ordered[0], adds]
    (other,) = {*CUDA} - {backend}
    assert cuda_variants(call, other, 8) == []
    assert cuda_variants(lambda: None, backend, 8) == []


# ------------------------------------------------------------------------------------------ applied


def test_applied_to_cuda_kernels(backend: str) -> None:
    x = image(backend, 1, 8, 4, 4)
    with variants.applied(backend, {"add_relu_fprop": "add_relu_fprop_vec1"}):
        (inside,) = choices(lambda: ops.add_relu(x, x))
    (outside,) = choices(lambda: ops.add_relu(x, x))
    assert (inside.chosen, outside.chosen) == ("add_relu_fprop_vec1", "add_relu_fprop_vec16")


@needs_triton
def test_applied_to_block_sizes() -> None:
    from fastconv.triton_kernels import launch, table

    with on_triton():
        x = torch.ones(1, 8, 4, 4)
        with launch.recorded() as made:
            with variants.applied("triton", {"add_relu any": {**table.SHIPPED["add_relu"]["any"], "BLOCK": 64}}):
                ops.add_relu(x, x)
            ops.add_relu(x, x)
    assert [one.meta["BLOCK"] for one in made] == [64, 1024]


def test_an_empty_variant_is_of_any_backend() -> None:
    """And loads nothing. One that is not empty is of a backend that has some."""
    for backend in ("reference", "cpu", "cuda", "triton", "onednn"):
        with variants.applied(backend, {}):
            pass
    with pytest.raises(ValueError, match="got backend 'cpu', needed one with CUDA kernels"):
        variants.applied("cpu", {"conv2d_fprop": "any"})
    code = """
import sys
from fastconv.operators import variants
variants.applied("triton", {})
print("triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# ------------------------------------------------------------------------------------- block sizes


@pytest.fixture(scope="module")
def noted() -> list[Any]:
    """What a convolution with ReLU asks for: 3x3 forward, then its backward."""
    from fastconv.triton_kernels import table

    x, w = torch.ones(1, 16, 4, 4, requires_grad=True), torch.ones(8, 16, 3, 3, requires_grad=True)
    with on_triton(), table.noted() as found:
        y = ops.conv2d_relu(x, w)
        torch.autograd.grad(y, (x, w), torch.ones_like(y))
    return found


@needs_triton
def test_neighbours_of_every_entry_may_stand_in_the_table() -> None:
    from fastconv.triton_kernels import launch, table

    for kernel, rows in table.SHIPPED.items():
        for name, shipped in rows.items():
            for taps in (1, 9):
                asked = table.Asked(f"{kernel} {name}", taps, launch.guarded(shipped, taps))
                found = [config for variant in triton_neighbours([asked], {}) for config in variant.values()]
                assert len(found) >= 2
                assert all(table.problem(kernel, name, config) is None for config in found)
                assert all(config["num_warps"] <= 4 for config in found if taps > 1)
                for config in found:
                    ((key, value),) = config.items() - asked.config.items()
                    before = asked.config[key]
                    assert value in (2 * before, before / 2) or (
                        key in ("num_stages", "BOXES") and abs(value - before) == 1
                    )


@needs_triton
def test_candidates_of_the_table() -> None:
    """All may stand in it, none is what is shipped; a call is offered those of its entries that its guard allows."""
    from fastconv.triton_kernels import launch, table

    for entry, configs in table.CANDIDATES.items():
        kernel, name = table.split_entry(entry)
        shipped = [rows.get(kernel, {}).get(name) for rows in (table.SHIPPED, table.LARGE)]
        assert all(table.problem(kernel, name, config) is None and config not in shipped for config in configs)
        for taps in (1, 9):
            asked = table.Asked(entry, taps, launch.guarded(shipped[0], taps))
            allowed = [config for config in configs if taps == 1 or config["num_warps"] <= 4]
            assert list(triton_candidates([asked, asked])) == [{entry: config} for config in allowed]
    assert list(triton_candidates([table.Asked("add_relu any", 1, table.SHIPPED["add_relu"]["any"])])) == []


@needs_triton
def test_neighbours_of_a_call(noted: list[Any]) -> None:
    """Of all that it asks for, tiles first, one of each entry in turn; from a variant, with the rest of it kept."""
    entries = list(dict.fromkeys(asked.entry for asked in noted))
    found = list(triton_neighbours(noted, {}))
    assert len(entries) >= 4
    assert [list(variant) for variant in found[: len(entries)]] == [[entry] for entry in entries]
    assert {entry for variant in found for entry in variant} == {*entries}
    shipped = {asked.entry: asked.config for asked in noted}
    changed = [key for v in found for entry in v for key in v[entry] if v[entry][key] != shipped[entry][key]]
    kinds = [key.startswith("num_") for key in changed]
    assert kinds == sorted(kinds)
    assert {True, False} == {*kinds}
    entry = entries[0]
    at = {entry: {**shipped[entry], "BLOCK_M": 2 * shipped[entry]["BLOCK_M"]}}
    onward = list(triton_neighbours(noted, at))
    assert {} in onward
    assert {entry: {**shipped[entry], "BLOCK_M": 4 * shipped[entry]["BLOCK_M"]}} in onward
    assert all(variant[entry] == at[entry] for variant in onward if len(variant) > 1)


@needs_triton
def test_an_entry_that_serves_two_filters_has_the_steps_of_both() -> None:
    """8 warps change the 1x1 launch, although not the other one."""
    from fastconv.triton_kernels import table

    entry, config = "conv2d_wgrad 16bit pointwise medium", table.SHIPPED["conv2d_wgrad"]["16bit pointwise medium"]
    pointwise, spatial = table.Asked(entry, 1, config), table.Asked(entry, 9, config)
    for asked in ([pointwise, spatial], [spatial, pointwise]):
        assert {entry: {**config, "num_warps": 8}} in triton_neighbours(asked, {})
    assert {entry: {**config, "num_warps": 8}} not in triton_neighbours([spatial], {})


@needs_triton
def test_climbs_to_the_fastest_block_sizes(noted: list[Any]) -> None:
    """In two entries, by calls that run with what is tried; back to the shipped sizes is the empty variant."""
    from fastconv.triton_kernels import launch, table

    x, w = torch.ones(1, 16, 4, 4), torch.ones(8, 16, 3, 3)
    (forward,) = [asked for asked in noted if asked.entry.startswith("conv2d_fprop")]
    reduction = next(asked for asked in noted if asked.entry.startswith("mask_and_sum"))
    tried: list[Any] = []

    def seconds_of(variant: Mapping[str, Any]) -> float:
        tried.append(variant)
        with variants.applied("triton", variant), launch.recorded() as made:
            ops.conv2d_relu(x, w)
            config = table.config(*table.split_entry(reduction.entry))
        one, *_ = made  # another one adds the parts of its depth
        return 1 + abs(one.meta["BLOCK_M"] - 16) + abs(one.meta["num_warps"] - 2) + abs(config["BLOCK_M"] - 1024)

    def steps(variant: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        return triton_neighbours([forward, reduction], variant)

    with on_triton():
        best = driven(climb({}, steps, 100), seconds_of)
    assert best == {
        forward.entry: {**forward.config, "BLOCK_M": 16, "num_warps": 2},
        reduction.entry: {**reduction.config, "BLOCK_M": 1024},
    }
    assert all(tried.count(variant) == 1 for variant in tried)
    assert {forward.entry: forward.config} not in tried


# ------------------------------------------------------------------------------------------ climbing


def line(variant: dict[str, int]) -> list[dict[str, int]]:
    return [{"at": variant["at"] + 1}, {"at": variant["at"] - 1}]


def climbed(times: Callable[[int], float | None], start: int = 0, most: int = 100) -> tuple[int, list[int]]:
    """Where a climb along the line ends, and what was tried."""
    tried = []

    def seconds_of(variant: dict[str, int]) -> float | None:
        tried.append(variant["at"])
        return times(variant["at"])

    return driven(climb({"at": start}, line, most), seconds_of)["at"], tried


def test_climbs_and_tries_none_twice() -> None:
    assert climbed(lambda at: 1 + abs(at - 3)) == (3, [0, 1, 2, 3, 4])
    assert climbed(lambda at: 1 + abs(at + 2)) == (-2, [0, 1, -1, -2, -3])


def test_a_climb_has_so_many_candidates() -> None:
    """Where each is faster than all before."""
    for most in (1, 2, 16):
        assert climbed(lambda at: 0.5**at, most=most) == (most - 1, list(range(most)))


def test_a_climb_goes_on_from_what_is_faster_by_more_than_noise() -> None:
    assert climbed(lambda at: (searching.GAIN + 0.001) ** at) == (0, [0, 1, -1])
    assert climbed(lambda at: (searching.GAIN - 0.001) ** at, most=5)[0] == 4


def test_a_climb_leaves_out_what_is_wrong() -> None:
    """However fast: it is no step. The first one may be wrong, or all."""
    assert climbed(lambda at: None if at == 2 else 0.5**at) == (1, [0, 1, 2])
    assert climbed(lambda at: None if at == 0 else 0.5**at, most=3) == (2, [0, 1, 2])
    assert climbed(lambda at: None) == (0, [0, 1, -1])

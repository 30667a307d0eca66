"""Options of the benchmarks, what is recorded about the machine, and the summary; see README.md."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

import fastconv
from fastconv.measure import environment
from fastconv.measure.calls import DTYPES
from fastconv.measure.layers import layers_of
from fastconv.measure.timing import clock
from fastconv.operators import backends
from harness import Settings

RESULTS = Path(__file__).parent / "results"
_SETTINGS = pytest.StashKey[Settings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup(
        "fastconv", "single layers of every op; whole networks are timed by python -m fastconv bench"
    )
    group.addoption("--device", default="cpu", help="cpu (default) or cuda")
    group.addoption("--dtype", default="fp32", choices=DTYPES, help="default: fp32")
    group.addoption("--batch", default=1, type=int, help="default: 1")
    group.addoption("--backend", default="auto", choices=backends.names(), help="default: auto")
    group.addoption("--quick", action="store_true", help="only the first layer of each op")
    group.addoption("--tiny", action="store_true", help="at most 12x12 pixels: to see it work")
    group.addoption(
        "--rows",
        type=Path,
        metavar="FILE",
        help="append each case as a line of JSON as soon as it ran; those that passed before are left out",
    )
    group.addoption("--save-results", action="store_true", help="as JSON in benchmarks/results")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in its own
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    device = torch.device(option.device)
    config.stash[_SETTINGS] = Settings(
        device=device,
        dtype=option.dtype,
        batch=option.batch,
        backend=option.backend,
        largest_side=12 if option.tiny else math.inf,
        seconds=float(option.benchmark_max_time),
        least_rounds=option.benchmark_min_rounds,
    )
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        # The bounds of fastconv/measure/tolerance.py are those of true float32.
        torch.backends.cudnn.allow_tf32 = False
    if option.save_results:
        hardware = environment.facts()["GPU" if device.type == "cuda" else "CPU"].split(", ")[0]
        name = (
            f"{re.sub(r'[^A-Za-z0-9]+', '-', hardware).strip('-')}_{option.dtype}"
            f"_batch-{option.batch}_fastconv-{fastconv.__version__}_torch-{torch.__version__}"
        )
        option.benchmark_json = str(RESULTS / f"{name}.json")


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    return request.config.stash[_SETTINGS]


def pytest_itemcollected(item: pytest.Item) -> None:
    """`-k lrn` takes the op that nobody spells out."""
    if item.callspec.params["layer"].op == "local_response_norm":
        item.extra_keyword_matches.add("lrn")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device, rows = config.stash[_SETTINGS].device, config.option.rows
    timer = pytest.mark.benchmark(timer=clock(device))
    for item in items:
        item.add_marker(timer)
    found = map(json.loads, rows.read_text().splitlines()) if rows and rows.exists() else ()
    done = {row["case"] for row in found if row["outcome"] == "passed"}

    def is_chosen(item: pytest.Item) -> bool:
        layer, contender = (item.callspec.params[name] for name in ("layer", "contender"))
        direction = item.originalname.removeprefix("test_")
        if config.option.quick and layer != layers_of(layer.op)[0]:
            return False
        return contender.is_for(layer, direction, device) and _case(item) not in done

    chosen = {item: is_chosen(item) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not chosen[item]])
    items[:] = [item for item in items if chosen[item]]


def _case(item: pytest.Item) -> str:
    return f"{item.nodeid}, {item.config.stash[_SETTINGS]}, backend {item.config.option.backend}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call" and item.config.option.rows:
        benchmark = item.funcargs["benchmark"]
        row = {"case": _case(item), "outcome": report.outcome, **benchmark.extra_info}
        if benchmark.stats:
            stats = benchmark.stats.stats
            row |= {"median_s": stats.median, "iqr_s": stats.iqr, "min_s": stats.min, "rounds": stats.rounds}
        if call.excinfo:
            row["problem"] = str(call.excinfo.value)
        with open(item.config.option.rows, "a") as file:
            file.write(json.dumps(row) + "\n")
    return report


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return environment.facts()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leaves out every single round, and parameters that are in extra_info."""
    for result in output_json["benchmarks"]:
        del result["stats"]["data"], result["params"]


# ----------------------------------------------------------------------------------------- summary


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What the tables above say about fastconv, a line for each layer and direction."""
    measured = [benchmark for benchmark in config._benchmarksession.benchmarks if benchmark]
    rows = [_row(list(cases)) for _, cases in groupby(measured, key=lambda case: case.group)]
    if not rows:
        return
    terminalreporter.section("fastconv; in the columns eager, compile and cudnn: their median / its own")
    for head in (
        ("", "channels_last", "", "", "", "", "", "", "contiguous", ""),
        ("", "µs", "of floor", "host µs", "eager", "compile", "cudnn", "", "µs", "eager"),
    ):
        terminalreporter.write_line(_line(*head))
    for cells, is_loss in rows:
        terminalreporter.write_line(_line(*cells), red=is_loss)
    losses = sum(is_loss for _, is_loss in rows)
    terminalreporter.write_line(f"{losses} of {len(rows)} (red) are slower than eager")


def _row(cases: list[Any]) -> tuple[list[str], bool]:
    """The cells, and whether fastconv is slower than eager in the same layout."""
    found = {(case.extra_info["contender"], case.extra_info["layout"]): case for case in cases}

    def microseconds(layout: str) -> str:
        case = found.get(("fastconv", layout))
        return f"{case.stats.median * 1e6:.0f}" if case else ""

    def ratio(who: str, layout: str) -> float:
        theirs, ours = found.get((who, layout)), found.get(("fastconv", layout))
        return theirs.stats.median / ours.stats.median if theirs and ours else math.nan

    info = cases[0].extra_info
    ours = found.get(("fastconv", "channels_last"))
    ratios = [
        ratio("eager", "channels_last"),
        ratio("compile", "channels_last"),
        ratio("cudnn", "channels_last"),
        ratio("eager", "contiguous"),
    ]
    times = ["" if math.isnan(value) else f"{value:.2f}x" for value in ratios]
    cells = [
        f"{info['op']} {info['direction']} {info['layer']}",
        microseconds("channels_last"),
        f"{ours.extra_info['of_floor']:.0%}" if ours else "",
        f"{ours.extra_info['host_us']:.0f}" if ours else "",
        *times[:3],
        "",
        microseconds("contiguous"),
        times[3],
    ]
    return cells, ratios[0] < 1 or ratios[3] < 1


def _line(name: str, *cells: str) -> str:
    return f"{name:<68.68}" + "".join(f"{cell:>9}" for cell in cells)

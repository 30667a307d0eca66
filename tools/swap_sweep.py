"""Tries `fastconv.swap` on a zoo of models: `python tools/swap_sweep.py OUT`.

Each model is examined in a process of its own with a time limit: a crash or a hang is a finding like any other. OUT
gets results.jsonl, a line for each model, and table.md. The exit status is 1 where there are findings.
"""

from __future__ import annotations

import argparse
import faulthandler
import fnmatch
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zoo

_STAGE = "examining: "
_RESULT = "result: "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", help="folder for what is found; made if there is none")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="models whose name has it, or matches it (*, ?)")
    parser.add_argument("--quick", action="store_true", help="one size, one layout, one training step, no times")
    parser.add_argument("--resume", action="store_true", help="leave out what OUT has results of")
    parser.add_argument("--workers", type=int, default=1, choices=(1, 2), help="models at a time; default: 1")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each model; default: 300")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    args = parser.parse_args()

    names = [name for name in zoo.names() if not args.only or any(_matches(name, pattern) for pattern in args.only)]
    if args.list:
        print(*names, sep="\n")
        return 0
    if args.out is None or not names:
        parser.error("a folder is needed" if names else f"no model matches {' '.join(args.only)}")
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    records = _read(results) if args.resume else {}
    todo = [name for name in names if name not in records]
    with open(results, "w") as file:
        file.writelines(f"{json.dumps(record)}\n" for record in records.values())
        for i, record in enumerate(sweep(todo, args.workers, args.limit, args.quick), 1):
            records[record["name"]] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"[{i}/{len(todo)}] {_in_a_line(record)}", flush=True)
    shown = [records[name] for name in names if name in records]
    (args.out / "table.md").write_text("\n".join(table(shown)) + "\n")
    print("", *summary(shown), sep="\n")
    return int(any(record["findings"] for record in shown))


def _matches(name: str, pattern: str) -> bool:
    return pattern in name or fnmatch.fnmatchcase(name, pattern)


def _read(path: Path) -> dict[str, Any]:
    """The records by name; a last line that was cut off is as good as none."""
    records = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["name"]] = record
    return records


# -------------------------------------------------------------------------------------------------- processes


def _examine(name: str, quick: bool, log: str) -> None:
    """In the process of one model: what it prints, and at last the record, go to the file."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    from swap_checks import examine

    record = examine(name, quick=quick, announce=lambda stage: print(f"{_STAGE}{stage}", flush=True))
    print(f"{_RESULT}{json.dumps(record)}", flush=True)


class _Process:
    def __init__(self, context: Any, name: str, limit: float, quick: bool) -> None:
        self._name = name
        self._started = time.monotonic()
        self._limit = limit
        self._output = tempfile.NamedTemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = context.Process(target=_examine, args=(name, quick, self._output.name), daemon=True)
        self._process.start()

    def result(self) -> dict[str, Any] | None:
        """The record; None while it runs. Ends it when it is over its limit."""
        code = self._process.exitcode
        seconds = time.monotonic() - self._started
        if code is None and seconds > self._limit:
            self.kill()
            return self._failure("hang", f"still running after {self._limit:.0f} s", seconds)
        if code is None:
            return None
        lines = [line for line in self._lines() if line.startswith(_RESULT)]
        if code == 0 and lines:
            return {**json.loads(lines[-1].removeprefix(_RESULT)), "seconds": round(seconds, 1)}
        what = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return self._failure("crash", f"{what}{self._where()}", seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _failure(self, status: str, text: str, seconds: float) -> dict[str, Any]:
        stages = [line.removeprefix(_STAGE) for line in self._lines() if line.startswith(_STAGE)]
        stage = stages[-1] if stages else "start"
        found = {"name": self._name, "status": status, "findings": [[stage, f"{status}: {text}"]]}
        return {**found, "seconds": round(seconds, 1)}

    def _lines(self) -> list[str]:
        self._output.seek(0)
        return self._output.read().splitlines()

    def _where(self) -> str:
        """The innermost frames that faulthandler printed, else the last line."""
        lines = self._lines()
        frames = [re.search(r'File ".*?([^/"]+/[^/"]+)", line (\d+) in (\S+)', line) for line in lines]
        places = [f"{m[1]}:{m[2]} {m[3]}" for m in frames if m]
        if places:
            return f" in {' < '.join(places[:6])}"
        return f": {lines[-1][:200]}" if lines else ""


def sweep(names: list[str], workers: int, limit: float, quick: bool) -> Iterator[dict[str, Any]]:
    """The records, in the order in which the processes end."""
    # A thread each: the models are small, and waiting for a core that is busy would take most of the time. It is also
    # what makes forking safe, which spares every process the imports.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["swap_checks", "timm", "torchvision"])
    waiting = list(names)
    running: list[_Process] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_Process(context, waiting.pop(0), limit, quick))
            for process in list(running):
                record = process.result()
                if record is not None:
                    running.remove(process)
                    yield record
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()


# ----------------------------------------------------------------------------------------------------- tables


def _swapped(record: dict[str, Any]) -> str:
    return "{} of {}".format(*record["layers"]) if "layers" in record else ""


def _ratio(record: dict[str, Any]) -> str:
    return f"{record['eager_ms'] / record['swapped_ms']:.2f}x" if "swapped_ms" in record else ""


def _in_a_line(record: dict[str, Any]) -> str:
    facts = [fact for fact in (_swapped(record), _ratio(record), f"{record['seconds']} s") if fact]
    lines = [f"{record['name']}: {record['status']}, {', '.join(facts)}"]
    lines += [f"    {check}: {text}" for check, text in record["findings"]]
    if "why" in record:
        lines.append(f"    {record['why']}")
    return "\n".join(lines)


def table(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Markdown, a row for each model."""
    yield "| model | input | swapped | untraced | swap s | eager ms | swapped ms | ratio | outcome |"
    yield "|" + "---|" * 9
    for record in records:
        untraced = record.get("untraced", {})
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(untraced.items())[:2])
        more = f" and {len(untraced) - 2} more" if len(untraced) > 2 else ""
        figures = [str(record.get(key, "")) for key in ("swap_s", "eager_ms", "swapped_ms")]
        outcome = "; ".join(f"{check}: {text}" for check, text in record["findings"]) or record.get("why", "ok")
        cells = [record["name"], record.get("input", ""), _swapped(record), reasons + more, *figures]
        yield f"| {' | '.join(_cell(text) for text in [*cells, _ratio(record), outcome])} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def summary(records: list[dict[str, Any]]) -> Iterator[str]:
    """The findings, what was not traced and why, and what follows the convolutions."""
    outcomes = Counter(record["status"] for record in records)
    yield f"{len(records)} models: {', '.join(f'{count} {status}' for status, count in outcomes.most_common())}"
    by_kind = defaultdict(list)
    for record in records:
        for checks, text in record["findings"]:
            first, *others = checks.split(", ")
            more = f" and {len(others)} more" if others else ""
            by_kind[f"{first}{more}: {_kind(text)}"].append(record["name"])
    yield from _histogram("findings", {kind: len(set(names)) for kind, names in by_kind.items()}, by_kind)
    untraced: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    convolutions: Counter[str] = Counter()
    for record in records:
        untraced.update({_kind(reason) for reason in record.get("untraced", {}).values()})
        skipped.update(f"{check}: {_kind(why)}" for check, why in record.get("skipped", {}).items())
        convolutions.update(record.get("convolutions", {}))
    yield from _histogram("models with parts that are not traced, by reason", untraced)
    yield from _histogram("checks that the original itself does not pass", skipped)
    groups: Counter[str] = Counter()
    for what, count in convolutions.items():
        groups[_group(what)] += count
    yield from _histogram(f"convolutions, {groups.total()} in all", groups)
    yield from _histogram("in detail: what is computed at once, and what follows", convolutions)


def _kind(text: str) -> str:
    """Without what is particular to a model: numbers, and names of its parts."""
    return re.sub(r"\s+", " ", re.sub(r"[\w.]*\d[\w.]*", "N", re.sub(r"\[.*?\]", "", text)))[:110]


def _group(what: str) -> str:
    if what.startswith("as before"):
        return "left to eager"
    at_once, follows = what.split(", then: ")
    parts, follows = at_once.split(" + "), follows.split(" (")[0]
    if any(part.startswith("relu") for part in parts):
        return "conv + bn + activation at once" if "bn" in parts else "conv + activation at once"
    if "bn" in parts:
        return "conv + bn at once, then " + ("the end" if follows == "the end" else "another pass")
    return "conv alone, then a norm" if "Norm" in follows else "conv alone"


def _histogram(title: str, counts: dict[str, int], names: dict[str, list[str]] | None = None) -> Iterator[str]:
    yield f"\n{title}" if counts else f"\n{title}: none"
    for text, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        which = f"  ({', '.join(dict.fromkeys(names[text][:4]))}{', ...' if count > 4 else ''})" if names else ""
        yield f"{count:>6}  {text}{which}"


if __name__ == "__main__":
    sys.exit(main())

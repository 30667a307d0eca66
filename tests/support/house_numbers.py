"""The numbers of the house: files and lines of each op, import circles, private names, long files.

python tests/support/house_numbers.py [FOLDER]      of the checkout in this folder; by default of this one
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import house

# What several ops have in common lies in files that are named for the family.
FAMILIES = {
    "conv2d": ("conv2d_relu", "conv2d_add_relu", "pointwise_conv2d", "pointwise_conv2d_group"),
    "depthwise": ("depthwise_conv2d", "depthwise_separable_conv2d"),
    "activation": ("add_relu",),
    "elementwise": ("add_relu",),
    "test_cuda_elementwise": ("add_relu", "local_response_norm"),
}
LAYERS: dict[str, Callable[[tuple[str, ...]], bool]] = {
    "common": lambda parts: parts[0] == "csrc" and parts[1] not in ("cpu", "cuda"),
    "cpu": lambda parts: parts[:2] == ("csrc", "cpu"),
    "cuda": lambda parts: parts[:2] == ("csrc", "cuda"),
    "ops": lambda parts: parts[:2] == ("fastconv", "ops"),
    "nn": lambda parts: parts[:2] == ("fastconv", "nn"),
    "triton": lambda parts: parts[0] == "fastconv" and parts[1].startswith("triton"),
    "tests": lambda parts: parts[0] == "tests",
    "benchmarks": lambda parts: parts[0] == "benchmarks",
}


@dataclass
class Tally:
    files: int = 0
    lines: int = 0

    def add(self, lines: int) -> None:
        self.files, self.lines = self.files + 1, self.lines + lines

    def __str__(self) -> str:
        return f"{self.files}/{self.lines}" if self.files else "-"


@dataclass
class OpFiles:
    """The files whose name, or whose folder's, is that of the op or of its family; by layer."""

    layers: dict[str, Tally] = field(default_factory=lambda: {layer: Tally() for layer in LAYERS})
    total: Tally = field(default_factory=Tally)


def ops_of(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "fastconv" / "ops").glob("[a-z]*.py"))


def files_of_ops(root: Path) -> dict[str, OpFiles]:
    found = {op: OpFiles() for op in ops_of(root)}
    for path in house.sources(root):
        parts = path.relative_to(root).parts
        layer = next((layer for layer, holds in LAYERS.items() if holds(parts)), None)
        about = _subject("/".join(parts), [*found, *FAMILIES])
        if layer is None or about is None:
            continue
        for op in FAMILIES.get(about, (about,)):
            if op in found:
                lines = len(house.lines_of(path))
                found[op].layers[layer].add(lines)
                found[op].total.add(lines)
    return found


def _subject(path: str, subjects: Iterable[str]) -> str | None:
    """Of the longest name in the path."""
    return max((name for name in subjects if re.search(rf"(?<![a-z0-9]){name}", path)), key=len, default=None)


# --------------------------------------------------------------------------------------------------------- numbers


def report(root: Path) -> str:
    rows = [["op", *LAYERS, "all"]]
    for op, files in files_of_ops(root).items():
        rows.append([op, *map(str, files.layers.values()), str(files.total)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    graph = house.imports(root, deliberate=house.DELIBERATE)
    users: dict[str, set[str]] = defaultdict(set)
    uses = house.private_uses(root)
    for use, name in uses.items():
        users[name].add(str(use.path.relative_to(root)))
    parts = {
        "files/lines of each op, those of its family included": [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ],
        "import circles between modules of fastconv": [" -> ".join(circle) for circle in house.circles(graph)],
        "import circles between folders of fastconv": [" -> ".join(circle) for circle in house.room_circles(graph)],
        f"private names used across folders, at {len(uses)} places": [
            f"{name} in {', '.join(sorted(paths))}" for name, paths in sorted(users.items())
        ],
        f"files of more than {house.MOST_LINES} lines without a reason": [
            f"{path.relative_to(root)}: {count}" for path, count in house.long_files(root).items()
        ],
    }
    text = []
    for title, lines in parts.items():
        count = "" if "each op" in title else f": {len(lines)}"
        text += [f"{title}{count}", *(f"  {line}" for line in lines), ""]
    return "\n".join(text).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=house.ROOT, help="a checkout of fastconv")
    print(report(parser.parse_args().folder.resolve()))


if __name__ == "__main__":
    main()

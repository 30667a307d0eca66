"""What figures are reported with: the machine that they were taken on, and tables."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fastconv
from fastconv.operators import library


def environment() -> dict[str, str]:
    """What a figure depends on, apart from what is measured."""
    digest = hashlib.sha256()
    for path in sorted(Path(fastconv.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    facts = {
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": f"fastconv {fastconv.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "commit": _commit(),
        "sources": f"library {library.build_info().get('source_hash', 'none')}, Python {digest.hexdigest()[:12]}",
    }
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        facts["instructions"] += ", no bf16 convolutions"
    return facts


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    facts = dict(re.findall(r"^(.*?)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE))
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:  # a virtual machine may tell no more than "AMD EPYC"
        name += f" (family {facts['cpu family']} model {facts['model']})"
    return name


def _commit() -> str:
    """Of the checkout that the package is in, or "unknown"; FASTCONV_COMMIT says it where git cannot."""
    if named := os.environ.get("FASTCONV_COMMIT"):
        return named
    root = Path(fastconv.__file__).parent.parent
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return process.stdout.strip() or "unknown"


@dataclass
class Table:
    """Rows of cells, some of them losses."""

    title: str
    columns: list[str]
    rows: list[tuple[list[str], bool]] = field(default_factory=list)

    def add(self, cells: list[str], is_loss: bool) -> None:
        self.rows.append((cells, is_loss))

    def show(self, *, markdown: bool) -> None:
        """By rich, losses in red; without rich as Markdown, which reads well enough."""
        if markdown or not self._show_rich():
            print(f"{self.title}\n")
            for cells in (
                self.columns,
                ["---"] * len(self.columns),
                *(row for row, _ in self.rows),
            ):
                print(f"| {' | '.join(cells)} |")
            print()

    def _show_rich(self) -> bool:
        try:
            from rich.console import Console
            from rich.measure import Measurement
            from rich.table import Table
        except ImportError:
            return False
        console = Console()
        table = Table(title=self.title, title_justify="left")
        for column in self.columns:
            table.add_column(column, no_wrap=True)
        for cells, is_loss in self.rows:
            table.add_row(*cells, style="red" if is_loss else None)
        # Figures cut off at the edge of the window would be worse than lines that wrap.
        unbounded = console.options.update(width=1000)
        console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
        console.print(table)
        return True

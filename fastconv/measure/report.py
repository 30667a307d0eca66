"""Tables of figures, for the terminal and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field


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

"""How far long work is, what runs now, and about how long it will still take."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

_PLAIN_SECONDS = 5.0  # between lines where there is no bar


class Progress:
    """Shows on stderr how far the work of a ``with`` block is.

    On a terminal by a bar of rich, if that is installed. Elsewhere by lines, one in some seconds:
    ``[12/53] conv2d_relu 64x56x56 ... about 40 s left``.

    Args:
        title: what all the work is.
        total: the weights of its units, added up.
        show: if not, nothing is shown.
    """

    def __init__(self, title: str, total: float, show: bool = True) -> None:
        self._title = title
        self._total = total
        self._show = show
        self._bar = _rich_bar(title, total, self._left) if show else None
        self._done = 0.0
        self._started = self._advanced = time.monotonic()
        self._next_line = -math.inf

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        else:
            self.note(self._title)
        self._started = self._advanced = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, description: str) -> None:
        """What runs from now on."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], step=description)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _PLAIN_SECONDS
            self.note(f"[{self._done:g}/{self._total:g}] {description} ... {self._left()}".rstrip())

    def advance(self, weight: float = 1) -> None:
        """So much more has been done."""
        self._done += weight
        self._advanced = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)

    def note(self, line: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self._show:
            print(line, file=sys.stderr, flush=True)

    def _left(self) -> str:
        """At the pace so far; rich's own estimate forgets units that took longer than half a minute."""
        if not 0 < self._done < self._total:
            return ""
        pace = (self._advanced - self._started) / self._done
        seconds = pace * (self._total - self._done) - (time.monotonic() - self._advanced)
        return f"about {in_words(max(1.0, seconds))} left"


def in_words(seconds: float) -> str:
    """As long as one waits: ``40 s``, ``12 min``, ``1.5 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


def _rich_bar(title: str, total: float, left: Callable[[], str]) -> Any:
    """A Progress of rich with one task, which has a field `step`; None without rich, or where a bar cannot move."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
        from rich.text import Text
    except ImportError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        return None

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(left())

    texts = ("{task.description}", "{task.completed:g}/{task.total:g}", "{task.fields[step]}")
    named, count, running = (TextColumn(text, markup=False) for text in texts)
    bar = Bar(named, BarColumn(), count, TimeElapsedColumn(), Left(), running, console=console)
    bar.add_task(title, total=total, step="")
    return bar

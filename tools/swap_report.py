"""What the checks of a model found, and runs of a model in which they find it."""

from __future__ import annotations

import contextlib
import io
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Report:
    """What is known about a model so far.

    Attributes:
        findings: what differs: a line, with the checks that came upon it.
        skipped: by check, why it could not be made: the original does not do it either.
        facts: figures and what was swapped.
    """

    def __init__(self, name: str, announce: Callable[[str], None]) -> None:
        self.name = name
        self.findings: dict[str, list[str]] = {}
        self.skipped: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self._announce = announce

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[Callable[[str], None]]:
        """Yields what takes a finding; an error within the block is one, too, but for `Eager`."""
        self._announce(name)
        try:
            yield lambda text: self._found(name, text)
        except Eager as error:
            self.skipped[name] = str(error)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
            self._found(name, f"{line_of(error)}, at {place}")

    def _found(self, check: str, text: str) -> None:
        text = re.sub(r"<eval_with_key>\.\d+:\d+", "a traced forward", text)
        checks = self.findings.setdefault(text, [])
        if check not in checks:
            checks.append(check)

    def record(self) -> dict[str, Any]:
        status = "findings" if self.findings else "ok"
        findings = [[", ".join(checks), text] for text, checks in self.findings.items()]
        return {"name": self.name, "status": status, "findings": findings, "skipped": self.skipped, **self.facts}


class Eager(Exception):
    """The original cannot do it."""


def run_model(model: nn.Module, args: Any, settings: dict[str, Any], *, grad: bool = False) -> Any:
    torch.manual_seed(1)
    random.seed(1)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return model(*args, **settings)


def run_eager(model: nn.Module, args: Any, settings: dict[str, Any], *, grad: bool = False) -> Any:
    try:
        return run_model(model, args, settings, grad=grad)
    except Exception as error:
        raise Eager(line_of(error)) from error


def line_of(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"

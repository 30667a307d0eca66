"""What is told of long work: on a terminal, elsewhere, and nowhere."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import TextIO

import pytest

from fastconv.qualification import progress
from fastconv.qualification.progress import Progress, in_words


class Clock:
    """Goes on only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Terminal:
    """In place of stderr inside a `with` block; then `shown` is what it got, without colours and movements."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        self.shown = ""
        self.file: TextIO

    def __enter__(self) -> Terminal:
        self._ours, theirs = os.openpty()
        self.file = os.fdopen(theirs, "w")
        self._redirected = contextlib.redirect_stderr(self.file)
        self._redirected.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        assert sys.stderr is self.file
        self._redirected.__exit__(None, None, None)
        self.file.write("\0")
        self.file.flush()
        text = b""
        while not text.endswith(b"\0"):
            text += os.read(self._ours, 2**16)
        self.file.close()
        os.close(self._ours)
        self.shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text[:-1].decode()).replace("\r\n", "\n")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


def work(clock: Clock, *, show: bool = True) -> None:
    """Ten units of a weight of 2 and one of 0.5, of four seconds each."""
    with Progress("[qualify] {it}", 20.5, show) as units:
        for number in range(10):
            units.step(f"conv2d_relu [{number}, 56]")
            clock.now += 4
            units.advance(2)
            if number == 4:
                units.note("[conv2d_relu] was refused: " + 30 * "reason ")
        units.step("the last")
        clock.now += 4
        units.advance(0.5)


LINES = f"""\
[qualify] {{it}}
[0/20.5] conv2d_relu [0, 56] ...
[4/20.5] conv2d_relu [2, 56] ... about 33 s left
[8/20.5] conv2d_relu [4, 56] ... about 25 s left
[conv2d_relu] was refused: {30 * "reason "}
[12/20.5] conv2d_relu [6, 56] ... about 17 s left
[16/20.5] conv2d_relu [8, 56] ... about 9 s left
[20/20.5] the last ... about 1 s left
"""


@pytest.mark.parametrize("force", ["", "1"])
def test_lines(clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, force: str) -> None:
    """In a log, whatever colours it has."""
    monkeypatch.setenv("FORCE_COLOR", force)
    work(clock)
    assert capsys.readouterr() == ("", LINES)


def test_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, show=False)
    assert capsys.readouterr() == ("", "")


def test_nothing_on_a_terminal(clock: Clock, terminal: Terminal) -> None:
    with terminal:
        work(clock, show=False)
    assert terminal.shown == ""


@pytest.mark.parametrize("lacks", ["rich.progress", "TERM"])
def test_lines_on_a_terminal(clock: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    """Without rich, or without a cursor to move."""
    if lacks == "TERM":
        monkeypatch.setenv("TERM", "dumb")
    else:
        monkeypatch.setitem(sys.modules, lacks, None)
    with terminal:
        work(clock)
    assert terminal.shown == LINES


@pytest.mark.parametrize("done", [2, 2.5])
def test_a_bar(clock: Clock, terminal: Terminal, done: float) -> None:
    pytest.importorskip("rich")
    note = "[conv2d_relu] was refused: " + 30 * "reason "
    with terminal, Progress("[qualify] {it}", 2.5) as units:
        units.step("conv2d_relu [64, 56]")
        clock.now += 6
        units.advance(done)
        units.note(note)
        clock.now += 0.25
    before, _, last = terminal.shown.removesuffix("\n").rpartition("\n")
    assert note in before.splitlines()  # on one line, however narrow the terminal
    left = " about 1 s left" if done < 2.5 else ""
    pattern = rf"\[qualify\] \{{it\}} ━.* {done:g}/2\.5 0:00:0\d{left} +conv2d_relu \[64, 56\] *"
    assert re.fullmatch(pattern, last.rpartition("\r")[2]), terminal.shown


def test_a_bar_and_an_exception(terminal: Terminal) -> None:
    """What is printed meanwhile stands above the bar, and afterwards stderr is as before."""
    pytest.importorskip("rich")
    with terminal, contextlib.suppress(KeyboardInterrupt), Progress("qualify", 3):
        print("a warning", file=sys.stderr)
        raise KeyboardInterrupt
    assert re.search(r"a warning *\n.*qualify ━", terminal.shown)


def test_the_estimate_goes_down_by_itself(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("qualify", 3) as units:
        clock.now += 50
        units.advance()
        clock.now += 30
        units.step("long")
        clock.now += 1000
        units.step("longer")
    assert capsys.readouterr().err == "qualify\n[1/3] long ... about 70 s left\n[1/3] longer ... about 1 s left\n"


@pytest.mark.parametrize(
    ("seconds", "words"), [(1, "1 s"), (99.4, "99 s"), (99.6, "2 min"), (5900, "98 min"), (5990, "1.7 h")]
)
def test_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words

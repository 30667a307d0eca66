"""A worker may do what it likes: its parent hears of it in words, goes on, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastconv.qualification import processes
from fastconv.qualification.processes import Died, Worker
from support.worker import COMMAND

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc for what is left behind")


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(COMMAND, start_seconds=30) as worker:
        yield worker


def ask(worker: Worker, do: str, seconds: float = 10, **request: Any) -> list[dict[str, Any]]:
    return list(worker.ask({"do": do, **request}, seconds))


def pid(worker: Worker) -> int:
    (answer,) = ask(worker, "echo", text="")
    return answer["pid"]


def lives(pid: int) -> bool:
    """Not so a zombie: what has no parent any more may have to wait for who reaps it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    # Its first thread may have ended before the others.
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X") or len(os.listdir(f"/proc/{pid}/task")) > 1


def exists(pid: int) -> bool:
    """A zombie, too."""
    return Path(f"/proc/{pid}").exists()


def soon(condition: Callable[[], bool], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# ------------------------------------------------------------------------------------------------ conversation


def test_answers_one_after_the_other(worker: Worker) -> None:
    assert worker.ready == {}
    assert ask(worker, "count", to=3) == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert ask(worker, "count", to=0) == []
    first = pid(worker)
    assert worker.ready == {"pid": first}
    assert pid(worker) == first != os.getpid()


def test_answers_come_as_they_are_made(worker: Worker) -> None:
    answers = worker.ask({"do": "hang"}, 10)
    assert lives(next(answers)["pids"][0])


@pytest.mark.parametrize("text", ["äöü 漢字 \N{PILE OF POO}\n\r\0\x1b[1m", "\udcff", ""])
def test_any_text(worker: Worker, text: str) -> None:
    assert ask(worker, "echo", text=text)[0]["text"] == text


def test_five_megabytes_each_way(worker: Worker) -> None:
    text = 5 * 2**20 * "x"
    assert ask(worker, "say", text=text)[0]["text"] == text
    assert ask(worker, "say", text="ä", times=5 * 2**18)[0]["text"] == 5 * 2**18 * "ä"


def test_a_handler_that_raises(worker: Worker) -> None:
    before = pid(worker)
    failed = {"failed": "ArithmeticError: too much", "done": True}
    assert ask(worker, "fail", text="\ntoo much\nand more") == [{"number": 1}, failed]
    assert ask(worker, "fail", text="")[1]["failed"] == "ArithmeticError"
    assert "not JSON serializable" in ask(worker, "unspeakable")[0]["failed"]
    assert ask(worker, "no_such_thing")[0]["failed"] == "KeyError: 'no_such_thing'"
    # Nothing more is to come, whether one asks for it or not.
    assert next(worker.ask({"do": "no_such_thing"}, 10))["done"]
    assert pid(worker) == before


def test_a_request_that_json_cannot_say(worker: Worker) -> None:
    before = pid(worker)
    with pytest.raises(TypeError, match="not JSON serializable"):
        ask(worker, "echo", text={1, 2})
    assert pid(worker) == before


def test_environment() -> None:
    with Worker(COMMAND, environ={"FASTCONV_TEST": "some"}) as worker:
        assert ask(worker, "environ", name="FASTCONV_TEST") == [{"value": "some"}]
        assert ask(worker, "environ", name="PATH") == [{"value": os.environ["PATH"]}]
        # What it starts in its turn is not to take itself for the worker.
        assert ask(worker, "environ", name="FASTCONV_WORKER_CHANNEL") == [{"value": None}]


def test_what_it_prints_is_no_answer(worker: Worker) -> None:
    assert ask(worker, "print_things") == [{"number": 1}]
    assert ask(worker, "count", to=1) == [{"number": 0}]


def test_what_it_starts_does_not_get_the_channel(worker: Worker) -> None:
    assert ask(worker, "start_shell") == [{"has the channel": False}]


def test_two_workers() -> None:
    """One does not keep the other's channel open."""
    with Worker(COMMAND) as one, Worker(COMMAND) as other:
        first, second = pid(one), pid(other)
        assert first != second
        one.close()
        assert not exists(first)
        assert pid(other) == second


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        with pytest.raises(NotImplementedError, match="need Linux or macOS"):
            Worker(COMMAND)


def test_serve_without_a_parent() -> None:
    with pytest.raises(RuntimeError, match="start it by a Worker of fastconv"):
        processes.serve(lambda request: iter([]))


# ------------------------------------------------------------------------------------------------ how it may end


@pytest.mark.parametrize(
    ("do", "request_", "words"),
    [
        ("leave", {"status": 3}, "exited with status 3: left with  [1m3"),
        ("leave", {"status": 0}, "exited with status 0: left with  [1m0"),
        ("leave", {"status": 3, "python": True}, "exited with status 3: left with  [1m3"),
        ("crash", {"number": signal.SIGSEGV}, "ended by SIGSEGV"),
        ("crash", {"number": signal.SIGRTMIN + 1}, f"ended by signal {signal.SIGRTMIN + 1}"),
        ("write_raw", {"text": "\n"}, "answered what is no JSON object"),
        ("write_raw", {"text": "[1]\n"}, "answered what is no JSON object"),
    ],
)
def test_ends(worker: Worker, do: str, request_: dict[str, Any], words: str) -> None:
    before = pid(worker)
    answers = worker.ask({"do": do, **request_}, 10)
    assert next(answers) == {"number": 1}
    with pytest.raises(Died) as died:
        next(answers)
    assert str(died.value) == words
    assert not exists(before)
    assert pid(worker) != before


@pytest.mark.parametrize("fork", [False, True])
def test_hangs(worker: Worker, fork: bool) -> None:
    """So does a process that it started."""
    answers = worker.ask({"do": "hang", "children": 1, "fork": fork}, 1)
    pids = next(answers)["pids"]
    assert all(map(lives, pids))
    started = time.monotonic()
    with pytest.raises(Died, match=r"^gave no answer for 1 s$"):
        next(answers)
    assert 1 <= time.monotonic() - started < 5
    assert soon(lambda: not any(map(lives, pids)))
    assert not exists(pids[0])
    assert pid(worker) not in pids


def test_closes_the_channel(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MOST_ENDING", 0.3)
    with pytest.raises(Died, match=r"^gave up its channel$"):
        ask(worker, "give_up")
    assert ask(worker, "count", to=1) == [{"number": 0}]


def test_ends_and_leaves_a_child(worker: Worker) -> None:
    """Which holds the channel open."""
    answers = worker.ask({"do": "fork_and_leave"}, 20)
    pids = next(answers)["pids"]
    with pytest.raises(Died, match=r"^exited with status 3$"):
        next(answers)
    assert soon(lambda: not any(map(lives, pids)))


def test_each_answer_has_the_limit(worker: Worker) -> None:
    """Not all of them together, nor what the parent does between them."""
    pid(worker)
    for _ in worker.ask({"do": "count", "to": 3}, 1):
        time.sleep(0.4)


def test_never_ready() -> None:
    with Worker(COMMAND, environ={"FASTCONV_TEST_NEVER_READY": "1"}, start_seconds=0.3) as worker:
        for _ in range(2):
            with pytest.raises(Died, match=r"^was not ready after 0\.3 s$"):
                ask(worker, "count", to=1)


def test_fails_to_get_ready() -> None:
    with (
        Worker(COMMAND, environ={"FASTCONV_TEST_FAILS": "1"}) as worker,
        pytest.raises(Died, match=r"^exited with status 1: ImportError: no such library$"),
    ):
        ask(worker, "count", to=1)


def test_no_such_command() -> None:
    before = os.listdir("/proc/self/fd")
    with Worker(["/no/such/command"]) as worker, pytest.raises(FileNotFoundError):
        ask(worker, "count", to=1)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_floods_stderr(worker: Worker) -> None:
    answers = worker.ask({"do": "flood", "megabytes": 50, "then": 30 * "long\tword "}, 10)
    assert next(answers) == {"number": 1}
    with pytest.raises(Died) as died:
        next(answers)
    assert str(died.value) == f"exited with status 3: {(30 * 'long word ')[:200]}..."


def test_noise_is_no_answer(worker: Worker) -> None:
    started = time.monotonic()
    with pytest.raises(Died, match=r"^gave no answer for 0\.5 s: x{200}\.\.\.$"):
        ask(worker, "flood_for_ever", seconds=0.5)
    assert time.monotonic() - started < 5


def test_too_long_an_answer(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MOST_BYTES", 2**20)
    assert ask(worker, "say", text="x", times=2**19) != []
    with pytest.raises(Died, match=r"^answered more than 1 MiB at once"):
        ask(worker, "say", text="x", times=2**24)


def test_ends_between_requests(worker: Worker) -> None:
    """It is not the next request's fault."""
    (answer,) = ask(worker, "leave_later", after=0.05)
    assert soon(lambda: not lives(answer["pid"]))
    assert pid(worker) != answer["pid"]


# ------------------------------------------------------------------------------------------------ how it is ended


def test_close(worker: Worker, tmp_path: Path) -> None:
    """It may leave by itself."""
    before = pid(worker)
    ask(worker, "write_at_exit", path=str(tmp_path / "file"))
    started = time.monotonic()
    worker.close()
    worker.close()
    assert time.monotonic() - started < 1.8, "it was killed after its grace"
    assert not exists(before)
    assert (tmp_path / "file").read_text() == "left"
    assert pid(worker) != before


def test_answers_nobody_waits_for(worker: Worker) -> None:
    """They must not be taken for those to the next request."""
    before = pid(worker)
    dropped = worker.ask({"do": "count", "to": 9}, 10)
    assert next(dropped) == {"number": 0}
    dropped.close()
    assert not exists(before)
    kept = worker.ask({"do": "hang"}, 10)
    (hanging,) = next(kept)["pids"]
    started = time.monotonic()
    assert ask(worker, "count", to=2) == [{"number": 0}, {"number": 1}]
    assert time.monotonic() - started < 1.8, "it was given time to leave"
    assert not exists(hanging)
    after = pid(worker)
    with pytest.raises(Died, match="was ended before it had answered"):
        next(kept)
    assert pid(worker) == after


def test_dropped() -> None:
    worker = Worker(COMMAND)
    before = pid(worker)
    del worker
    gc.collect()
    assert not exists(before)


@pytest.fixture
def parent() -> Iterator[Callable[[str], tuple[subprocess.Popen[str], list[int]]]]:
    """Starts a process with a worker; returns it, and the worker with what that started."""
    started = []

    def start(name: str) -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen([*COMMAND, name], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process, [int(word) for word in process.stdout.readline().split()]

    yield start
    for process in started:
        with process:
            process.kill()


def test_the_parent_is_killed(parent: Callable[[str], tuple[subprocess.Popen[str], list[int]]]) -> None:
    """While the worker is busy, and has a child."""
    process, pids = parent("parent")
    assert len(pids) == 2
    assert all(map(lives, pids))
    process.kill()
    assert soon(lambda: not any(map(lives, pids)))


def test_the_parent_ends(parent: Callable[[str], tuple[subprocess.Popen[str], list[int]]]) -> None:
    """Without a word to its worker, which is idle."""
    process, (pid,) = parent("brief")
    assert process.wait(10) == 0
    assert soon(lambda: not lives(pid), 1)


def test_the_parent_is_interrupted(parent: Callable[[str], tuple[subprocess.Popen[str], list[int]]]) -> None:
    process, pids = parent("parent")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "interrupted\n"
    assert process.poll() is None
    assert not exists(pids[0])
    assert soon(lambda: not any(map(lives, pids)))


def test_a_terminal_interrupts_the_parent_alone(worker: Worker) -> None:
    assert os.getsid(pid(worker)) != os.getsid(0)


def test_a_fork_of_the_parent_does_not_end_it(worker: Worker) -> None:
    before = pid(worker)
    child = os.fork()
    if not child:
        try:
            worker.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert lives(before)
    worker.close()


def test_nothing_is_left() -> None:
    gc.collect()
    before, pids = len(os.listdir("/proc/self/fd")), []
    for round_ in range(20):
        worker = Worker(COMMAND)
        pids.append(pid(worker))
        if round_ % 2:
            with pytest.raises(Died):
                ask(worker, "crash", number=signal.SIGKILL)
        if round_ % 3:
            pids.append(pid(worker))
        if round_ % 5:
            next(worker.ask({"do": "hang"}, 10))
        worker.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [pid for pid in pids if exists(pid)]

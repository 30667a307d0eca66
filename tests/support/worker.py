"""A worker that does what it is told, and a parent of one; neither imports torch, as the package would.

python worker.py: answers ``{"do": name, ...}`` by the function of that name, given the rest.
python worker.py parent: asks a worker of its own to compute for long, and prints the worker's number when it does.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE = Path(__file__).resolve()
COMMAND = [sys.executable, "-S", str(_FILE)]
_PROCESSES = _FILE.parents[2] / "fastconv" / "qualification" / "processes.py"
_STUBBORN = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1, b'.'); time.sleep(60)"

Answers = Iterator[dict[str, Any]]


def count(to: int) -> Answers:
    for number in range(to):
        yield {"number": number}


def echo(text: str) -> Answers:
    yield {"text": text, "pid": os.getpid()}


def environ(name: str) -> Answers:
    yield {"value": os.environ.get(name)}


def say(text: str, times: int = 1) -> Answers:
    yield {"text": text * times}


def fail(text: str) -> Answers:
    yield {"number": 1}
    raise ArithmeticError(text)


def unspeakable() -> Answers:
    yield {"set": {1, 2}}


def leave(status: int, python: bool = False) -> Answers:
    yield {"number": 1}
    print(f"left with \x1b[1m{status}", file=sys.stderr, flush=True)
    if python:
        sys.exit(status)
    os._exit(status)


def leave_later(after: float) -> Answers:
    yield {"pid": os.getpid()}
    threading.Timer(after, os._exit, [3]).start()


def crash(number: int) -> Answers:
    yield {"number": 1}
    os.kill(os.getpid(), number)


def hang(children: int = 0, fork: bool = False) -> Answers:
    """With children, each deaf to SIGTERM; those that are forked hold the worker's channel open, too."""
    pids = []
    for _ in range(children):
        if fork:
            pids.append(os.fork())
            if not pids[-1]:
                time.sleep(60)
                os._exit(0)
        else:
            child = subprocess.Popen([sys.executable, "-S", "-c", _STUBBORN], stdout=subprocess.PIPE)
            assert child.stdout is not None
            assert child.stdout.read(1) == b"."
            pids.append(child.pid)
    yield {"pids": [os.getpid(), *pids]}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def fork_and_leave() -> Answers:
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    yield {"pids": [os.getpid(), child]}
    os._exit(3)


def print_things() -> Answers:
    print('{"done": true}')
    print("no newline", end="", flush=True)
    os.write(1, b'\xff\x00{"done": true}\n')
    yield {"number": 1}


def flood(megabytes: int, then: str) -> Answers:
    for _ in range(megabytes):
        os.write(2, 2**20 * b"x")
    os.write(2, f"\n{then}\n\n".encode())
    yield {"number": 1}
    os._exit(3)


def flood_for_ever() -> Answers:
    yield {"number": 1}
    while True:
        os.write(2, 2**16 * b"x")


def write_raw(text: str) -> Answers:
    """Past the protocol."""
    yield {"number": 1}
    os.write(_channel(), text.encode())


def give_up() -> Answers:
    yield {"number": 1}
    socket.socket(fileno=os.dup(_channel())).shutdown(socket.SHUT_WR)
    time.sleep(60)


def _channel() -> int:
    """Whatever socket is open."""
    with os.scandir("/proc/self/fd") as entries:
        (number,) = (int(entry.name) for entry in entries if os.readlink(entry.path).startswith("socket:"))
    return number


def start_shell() -> Answers:
    """By C's own means, which pass on all that may be inherited."""
    status = os.system(f"test -e /proc/self/fd/{_channel()}")
    yield {"has the channel": status == 0}


def write_at_exit(path: str) -> Answers:
    atexit.register(Path(path).write_text, "left")
    yield {}


def parent(*, lasting: bool) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = runpy.run_path(str(_PROCESSES))["Worker"](COMMAND)
    request = {"do": "hang", "children": 1} if lasting else {"do": "echo", "text": ""}
    try:
        for answer in worker.ask(request, 30):
            print(*answer.get("pids", [answer.get("pid")]), flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        time.sleep(60)


if __name__ == "__main__":
    if sys.argv[1:]:
        parent(lasting=sys.argv[1] == "parent")
    else:
        if "FASTCONV_TEST_NEVER_READY" in os.environ:
            time.sleep(60)

        def ready() -> dict[str, Any]:
            if "FASTCONV_TEST_FAILS" in os.environ:
                raise ImportError("no such library")
            return {"pid": os.getpid()}

        runpy.run_path(str(_PROCESSES))["serve"](
            lambda request: globals()[request["do"]](**{name: request[name] for name in request if name != "do"}), ready
        )

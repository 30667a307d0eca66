"""What may crash, hang, exit or spoil its process runs in a worker, and costs what was asked of it, nothing else.

`Worker` is the parent's end, `serve` the worker's. They speak JSON lines through a socket of their own, so that nothing
that a library prints gets in between: the worker's stdout goes nowhere, and of its stderr the end is kept.

A worker leads a process group, which is ended with it; when its parent is gone, it ends within seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

_CHANNEL = "FASTCONV_WORKER_CHANNEL"  # the worker's end of the socket, in its environment
_GRACE = 2.0  # seconds for a process to leave by itself
_GLANCE = 0.2  # seconds between looks whether it lives: its children may keep the socket open
_CHUNK = 2**16  # bytes: what a pipe holds
MOST_BYTES = 2**26  # of a line
MOST_ENDING = 30.0  # seconds for one that crashed or was killed: a GPU's driver may hold it; then it is left to itself
_TAIL = 2**12  # bytes of stderr that are kept
_WORDS = 200  # characters of stderr that are told


class Died(Exception):
    """A worker ended, or was ended, before it had answered; says why in words for a user."""


# ------------------------------------------------------------------------------------------------ the parent's end


class Worker:
    """A process that answers, started when it is first asked, and again when it is asked after it has ended.

    It does not outlive a ``with`` block, `close`, this object or this process. Linux and macOS.

    Args:
        command: what it runs, which calls `serve`.
        environ: added to the environment.
        start_seconds: how long it may take until it is ready.

    Raises:
        NotImplementedError: on Windows.
    """

    def __init__(
        self, command: Sequence[str], *, environ: Mapping[str, str] | None = None, start_seconds: float = 180
    ) -> None:
        if os.name == "nt":
            raise NotImplementedError(
                "kernels are tried in worker processes, which need Linux or macOS; this is Windows: use WSL"
            )
        self.ready: dict[str, Any] = {}  # what the last process said when it was
        self._command = list(command)
        self._environ = dict(environ or {})
        self._start_seconds = start_seconds
        self._process: _Process | None = None

    def ask(self, request: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        """The answers to a request as they come; the last is ``{"failed": why, "done": True}`` if it failed.

        The request is sent when the first answer is waited for. Whoever stops before the last one, by an exception or
        by asking something else, ends the process.

        Args:
            request: what JSON can say.
            seconds: how long each answer may take, and the end after the last.

        Raises:
            Died: the process ended, was silent for too long (it is killed) or did not keep to the protocol (killed).
        """
        line = _line(request)
        process = self._process
        if process is None or process.busy or process.has_ended():
            self.close()
            process = self._process = _Process(self._command, self._environ)
        try:
            if process.busy:  # it is new
                self.ready = process.receive(self._start_seconds, "was not ready after")["ready"]
            process.busy = True
            process.send(line)
            while "done" not in (answer := process.receive(seconds, "gave no answer for")):
                yield answer
            process.busy = False
        except BaseException:
            process.kill()
            raise
        if "failed" in answer:
            yield answer

    def close(self) -> None:
        """Ends the process: one that is idle may leave by itself, for two seconds."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Process:
    """One life of a worker.

    Attributes:
        busy: not ready yet, or with a request that was not answered to the end.
        kill: ends it and all that it started, at the latest when this object or the interpreter ends.
    """

    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        self.busy = True
        self._channel, theirs = socket.socketpair()
        try:
            self._popen = subprocess.Popen(
                command,
                bufsize=0,
                env={**os.environ, **environ, _CHANNEL: str(theirs.fileno())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is for this process, which then ends the worker.
                start_new_session=True,
            )
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self.kill = weakref.finalize(self, _end, self._popen, self._channel, os.getpid())
        assert self._popen.stderr is not None
        self._errors = self._popen.stderr
        for end in (self._errors.fileno(), self._channel.fileno()):
            os.set_blocking(end, False)
        self._tail = b""
        self._unsent = memoryview(b"")
        self._partial = bytearray()
        self._lines: deque[bytes] = deque()
        self._selector = selectors.PollSelector()
        self._selector.register(self._errors, selectors.EVENT_READ)
        self._selector.register(self._channel, selectors.EVENT_READ)

    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def send(self, line: bytes) -> None:
        """Goes out while `receive` waits: either end may have to read before it can write."""
        self._unsent = memoryview(line)
        self._selector.modify(self._channel, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def receive(self, seconds: float, too_long: str) -> dict[str, Any]:
        """The next line.

        Raises:
            Died: there is none; the process has ended by then.
        """
        deadline = time.monotonic() + seconds
        while not self._lines:
            if not self.kill.alive:
                raise Died("was ended before it had answered")
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._died(f"{too_long} {seconds:g} s")
            if len(self._partial) > MOST_BYTES:
                raise self._died(f"answered more than {MOST_BYTES >> 20} MiB at once")
            if not self._exchange(min(left, _GLANCE)):
                raise self._died(self._end_in_words())
        try:
            answer = json.loads(self._lines.popleft())
        except ValueError:  # UnicodeDecodeError, too
            answer = None
        if not isinstance(answer, dict):
            raise self._died("answered what is no JSON object")
        return answer

    def end(self) -> None:
        """As `kill`, but first it may leave by itself, if it is idle."""
        try:
            if self.kill.alive and not self.busy:
                self._channel.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._popen.wait(_GRACE)
        finally:
            self.kill()

    def _exchange(self, seconds: float) -> bool:
        """Sends and receives what can be, after waiting for that; False if nothing will come any more."""
        events = self._selector.select(seconds)
        for key, mask in events:
            if key.fileobj is self._errors:
                if self._read_errors() == b"":
                    self._selector.unregister(self._errors)
                continue
            if mask & selectors.EVENT_WRITE:
                self._write()
            if mask & selectors.EVENT_READ and not self._read():
                return False
        return bool(events) or not self.has_ended()

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[self._channel.send(self._unsent) :]
        except ConnectionError:  # reading tells the end, after what was answered before
            self._unsent = memoryview(b"")
        if not self._unsent:
            self._selector.modify(self._channel, selectors.EVENT_READ)

    def _read(self) -> bool:
        try:
            chunk = self._channel.recv(_CHUNK)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        first, *others = chunk.split(b"\n")
        self._partial += first
        for line in others:
            self._lines.append(bytes(self._partial))
            self._partial = bytearray(line)
        return bool(chunk)

    def _read_errors(self) -> bytes | None:
        """None: nothing right now; nothing at all: it is closed."""
        chunk = self._errors.read(_CHUNK)
        self._tail = (self._tail + (chunk or b""))[-_TAIL:]
        return chunk

    def _end_in_words(self) -> str:
        try:
            status = self._popen.wait(MOST_ENDING)
        except subprocess.TimeoutExpired:
            return "gave up its channel"
        if status >= 0:
            return f"exited with status {status}"
        try:
            return f"ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"ended by signal {-status}"

    def _died(self, why: str) -> Died:
        _signal(self._popen)
        self._read_errors()  # what came since
        self.kill()
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines() if line.strip()]
        if not lines:
            return Died(why)
        last = "".join(letter if letter.isprintable() else " " for letter in lines[-1])
        return Died(f"{why}: {last if len(last) <= _WORDS else last[:_WORDS] + '...'}")


def _signal(popen: subprocess.Popen[bytes]) -> None:
    """Kills the process group, where anything of it is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of those that have ended
        os.killpg(popen.pid, signal.SIGKILL)


def _end(popen: subprocess.Popen[bytes], channel: socket.socket, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of it
        _signal(popen)
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(MOST_ENDING)
    channel.close()
    if popen.stderr is not None:
        popen.stderr.close()


# ------------------------------------------------------------------------------------------------ the worker's end


def serve(
    handle: Callable[[dict[str, Any]], Iterator[dict[str, Any]]], ready: Callable[[], dict[str, Any]] = dict
) -> None:
    """Answers a `Worker` until it closes or its process is gone.

    That is seen while a request is being answered, too, unless it holds Python's lock: the process is killed then, and
    all that it started.

    Args:
        handle: returns the answers to a request, which JSON can say and which have no "done" or "failed". An Exception
            is the last answer, and the process lives on.
        ready: what takes its time before the first request; returns what is then `ready` of the Worker.

    Raises:
        RuntimeError: no Worker started this process.
    """
    number = os.environ.pop(_CHANNEL, None)
    if number is None:
        raise RuntimeError(f"this process answers a parent, which sets {_CHANNEL}: start it by a Worker of {__name__}")
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    with socket.socket(fileno=int(number)) as channel:
        channel.set_inheritable(False)
        threading.Thread(target=_listen, args=(channel, requests), daemon=True).start()
        first = {"ready": ready()}
        with contextlib.suppress(ConnectionError):  # nobody reads any more; errors of `handle` do not come here
            channel.sendall(_line(first))
            while (request := requests.get()) is not None:
                for line in _answers(handle, request):
                    channel.sendall(line)


def _answers(handle: Callable[[dict[str, Any]], Iterator[dict[str, Any]]], request: dict[str, Any]) -> Iterator[bytes]:
    try:
        for answer in handle(request):
            yield _line(answer)
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        yield _line({"failed": f"{type(error).__name__}: {text}" if text else type(error).__name__, "done": True})
    else:
        yield _line({"done": True})


def _listen(channel: socket.socket, requests: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    with contextlib.suppress(ConnectionError), channel.makefile("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                requests.put(json.loads(line))
    requests.put(None)
    time.sleep(_GRACE)
    # Still here: it is computing for nobody.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"

"""Why a forward is not traced."""

from __future__ import annotations

import threading


class _Refused(threading.local):
    reason = ""


_refused = _Refused()


class Untraceable(Exception):
    """The message completes "not traced: "."""


class Refusal(BaseException):
    """As `Untraceable`, from inside of the user's code. The thread's first one counts, whoever catches it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        if not _refused.reason:
            _refused.reason = reason


def forget_refusals() -> None:
    """To be called before the user's code runs."""
    _refused.reason = ""


def first_refusal() -> str:
    """The reason of the thread's first `Refusal` since `forget_refusals`; empty if there was none."""
    return _refused.reason

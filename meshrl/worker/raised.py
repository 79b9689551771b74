"""What env code raised, as its client is told, wherever it ran."""

from __future__ import annotations

import traceback

from meshrl.errors import EnvError, NotRecorded


class RaisedInside(Exception):
    """Code of an env raised in a process of its own, where the exception itself stays.

    Attributes:
        kind: the name of its class.
        text: its message.
        trace: its traceback.
    """

    def __init__(self, kind: str, text: str, trace: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text
        self.trace = trace


class EndsSession(Exception):
    """An env is of no use any more: its process has ended, or was ended.

    No error of this package's itself, since those are answers to a request after which the session goes on.

    Attributes:
        error: what its client is told.
    """

    def __init__(self, error: EnvError | NotRecorded) -> None:
        super().__init__(error.message)
        self.error = error


def described(exc: BaseException) -> tuple[str, str, str]:
    """The name of an exception's class, its message and its traceback."""
    if isinstance(exc, RaisedInside):
        return exc.kind, exc.text, exc.trace
    return type(exc).__name__, str(exc), "".join(traceback.format_exception(exc))

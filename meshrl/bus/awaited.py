"""What a connection waits for: answers to requests, and the server's consent to subscriptions."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

from meshrl.errors import MeshError, SubjectNotPermitted

# the body of a reply; None when NATS says that nobody listens on the subject
OnReply = Callable[[bytes | None], None]
# the request cannot be answered: its subject is not permitted, or the connection has ended
OnFail = Callable[[MeshError], None]


class Awaited:
    """The requests of one connection that wait for answers, by number, and its subscriptions that are being made.

    Args:
        inbox: the subject of answers, without the number.
        tell: calls callbacks with a reason, and reports what they raise.
    """

    def __init__(self, inbox: str, tell: Callable[[list[OnFail], MeshError], None]) -> None:
        self.inbox = inbox
        self._cut = len(inbox) + 1
        self._tell = tell
        self._ids = itertools.count(1)
        self._requests: dict[int, tuple[OnReply, OnFail | None, str]] = {}
        self._subscribing: list[tuple[str, list[SubjectNotPermitted]]] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, rid: object) -> bool:
        return rid in self._requests

    def add(self, subject: str, on_reply: OnReply, on_fail: OnFail | None) -> int:
        """A request is about to be sent; gives its number."""
        rid = next(self._ids)
        self._requests[rid] = (on_reply, on_fail, subject)
        return rid

    def forget(self, rid: int) -> None:
        """Expect no more answers to it."""
        self._requests.pop(rid, None)

    def answered(self, subject: str, _reply: str, body: bytes) -> None:
        """A message arrived in the inbox."""
        request = self._requests.get(int(subject[self._cut :]))
        if request is not None:
            request[0](body or None)  # every reply of ours has a body; an empty one is the server's 503

    def fail(self, why: MeshError) -> None:
        """No answer comes to any of them."""
        requests, self._requests = self._requests, {}
        self._tell([on_fail for _, on_fail, _ in requests.values() if on_fail is not None], why)

    @contextlib.contextmanager
    def subscribing(self, subject: str) -> Iterator[list[SubjectNotPermitted]]:
        """While a subscription is made; gives what the server said against it."""
        refused: list[SubjectNotPermitted] = []
        under_way = (subject.lower(), refused)
        self._subscribing.append(under_way)
        try:
            yield refused
        finally:
            self._subscribing = [other for other in self._subscribing if other is not under_way]

    def denied(self, publish: bool, subject: str, exc: SubjectNotPermitted) -> bool:
        """The server refused ``subject`` (in small letters); gives whether somebody who waits was told."""
        if not publish:
            asking = [refused for asked, refused in self._subscribing if asked == subject]
            for refused in asking:
                refused.append(exc)
            return bool(asking)
        told = []
        for rid, (_, on_fail, asked) in list(self._requests.items()):
            if on_fail is not None and asked.lower() == subject:
                self.forget(rid)
                told.append(on_fail)
        self._tell(told, exc)
        return bool(told)

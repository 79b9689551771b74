"""What nats-py tells of a connection: lost, back, closed, refused, not permitted; and who is told of it in turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import nats.errors

from meshrl.bus.client import NoCertificate, NoTls
from meshrl.bus.login import Login
from meshrl.errors import BusClosed, LoginRefused, MeshError, MeshUnreachable, SubjectNotPermitted

log = logging.getLogger("meshrl.bus")

# A server that comes back may refuse a login until its accounts are loaded; one that does so this often in a row
# means it. At one attempt in half a second, that is known before anybody wonders.
REFUSALS = 3

# nats-py gives the server's words in small letters.
_VIOLATION = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"')


class Owner(Protocol):
    """What the connection does about it."""

    def denied(self, publish: bool, subject: str, exc: SubjectNotPermitted) -> bool:
        """The server refused ``subject`` (in small letters); gives whether somebody who waits was told."""

    def cut(self) -> None:
        """The connection is lost; nats-py tries to get it back."""

    def back(self) -> None:
        """It is back."""

    def give_up(self, why: MeshError) -> None:
        """It will not come back."""


class Events:
    """The callbacks of one client of nats-py, and the lists of those who want to know.

    Attributes:
        on_disconnect: called when the server is lost.
        on_reconnect: called when it is back.
        on_close: called once, with the reason, when the connection has ended.
        up_since: when it came back; minus infinity at first, None while it is away.
        refused: while the first connection is made: done when the login is refused.
        hindrance: while the first connection is made: what stood between it and a server that answered, at the last
            attempt.
    """

    def __init__(self, owner: Owner, login: Login, name: str, on_error: Callable[[Exception], None] | None) -> None:
        self.on_disconnect: list[Callable[[], None]] = []
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_close: list[Callable[[MeshError], None]] = []
        self.up_since: float | None = None
        self.refused: asyncio.Future[MeshError] | None = None
        self.hindrance: Exception | None = None
        self._owner = owner
        self._user = login.user
        self._url = login.url
        self._name = name
        self._on_error = on_error
        self._refusals = 0
        self._client: Any = None

    def options(self, client: Any) -> dict[str, Any]:
        """The arguments of nats-py's ``connect`` that make it tell us."""
        self._client = client
        return {
            "error_cb": self._error,
            "disconnected_cb": self._disconnected,
            "reconnected_cb": self._reconnected,
            "closed_cb": self._closed,
        }

    def tell(self, callbacks: list[Callable[..., None]], *args: Any) -> None:
        """Call each; an exception in one is reported, and harms neither the others nor nats-py's own tasks."""
        for told in list(callbacks):
            try:
                told(*args)
            except Exception as exc:  # noqa: BLE001  # it would end nats-py's attempts to reconnect for ever
                self.failed(exc)

    def failed(self, exc: Exception) -> None:
        """Something went wrong that no caller waits for; it is never swallowed."""
        if self._on_error is not None:
            try:
                self._on_error(exc)
            except Exception:
                log.exception("%s: on_error itself failed", self._name)
        else:
            log.warning("%s: %s: %s", self._name, type(exc).__name__, exc, exc_info=log.isEnabledFor(logging.DEBUG))

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """nats-py's exceptions become ours."""
        try:
            yield
        except (nats.errors.ConnectionClosedError, nats.errors.ConnectionDrainingError) as exc:
            raise BusClosed(f"the connection to {self._url} is closed") from exc
        except nats.errors.Error as exc:
            raise MeshUnreachable(f"{self._url}: {exc}", url=self._url) from exc

    # ---------------------------------------------------------------- nats-py's callbacks

    async def _error(self, exc: Exception) -> None:
        text = str(exc).lower()
        full = self.refused is not None and "maximum" in text  # of connections, at all or of an account
        if full or isinstance(exc, (ssl.SSLError, NoTls, NoCertificate)):
            self.hindrance = exc
            # At first its caller is told. Later, TLS also fails where a server just ends, which is no matter.
            matters = self.refused is None and type(exc) is not ssl.SSLError
            log.log(logging.WARNING if matters else logging.DEBUG, "%s: %s: %s", self._name, self._url, exc)
        elif "permissions violation" in text:
            self._violation(text)
        elif "authentication timeout" in text:
            # The server waited in vain for this client's login: a slow client or network, which another attempt mends.
            log.warning("%s: %s did not get the login in time; trying again", self._name, self._url)
        elif "authorization" in text or "authentication" in text:
            self._refusal()
        elif isinstance(exc, (OSError, nats.errors.UnexpectedEOF, nats.errors.StaleConnectionError)):
            if isinstance(exc, ConnectionRefusedError):  # nobody answers any more
                self.hindrance = None
            log.debug("%s: %s", self._name, exc)  # the reconnection that follows is told of by _disconnected
        elif self.up_since is not None:
            self.failed(exc)

    def _violation(self, text: str) -> None:
        found = _VIOLATION.search(text)
        if found is None:
            self.failed(SubjectNotPermitted(f"{self._url} does not permit this to {self._user}: {text}"))
            return
        publish, subject = found[1] == "publish", found[2]
        error = SubjectNotPermitted(
            f"{self._url} does not permit {self._user} to {'publish' if publish else 'subscribe'} to {subject}; the "
            "server's operator grants that",
            subject=subject,
            user=self._user,
        )
        if not self._owner.denied(publish, subject, error):
            self.failed(error)

    def _refusal(self) -> None:
        self._refusals += 1
        if self.refused is not None:  # the first connection: its caller is told
            if not self.refused.done():
                self.refused.set_result(self._login_refused())
            return
        log.warning("%s: %s refuses the login of %s", self._name, self._url, self._user)
        if self._refusals >= REFUSALS:
            self._owner.give_up(self._login_refused())

    def _login_refused(self) -> LoginRefused:
        return LoginRefused(
            f"{self._url} refuses the login of {self._user}; check user and password in the URL or credentials=",
            url=self._url,
            user=self._user,
        )

    async def _disconnected(self) -> None:
        if self.up_since is not None:
            self.up_since = None
            log.info("%s: lost %s; reconnecting", self._name, self._url)
            self._owner.cut()
            self.tell(self.on_disconnect)

    async def _reconnected(self) -> None:
        self.up_since = time.monotonic()
        self._refusals = 0
        log.info("%s: back at %s", self._name, self._url)
        self._owner.back()
        self.tell(self.on_reconnect)

    async def _closed(self) -> None:
        # On the plain path, nats-py itself closes for good when a login is withdrawn.
        if isinstance(self._client.last_error, nats.errors.AuthorizationError):
            self._owner.give_up(self._login_refused())
        else:
            self._owner.give_up(BusClosed(f"the connection to {self._url} was closed by the server"))

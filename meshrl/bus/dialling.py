"""The first connection of a client of nats-py: made within a deadline, or refused; later it comes back for ever.

How it comes back, where a connection is lost (:class:`Comeback`):

    attempt                           waits before it
    the first                         up to ``FIRST_WAIT_S``
    at the next server of the pool    not
    at the first of the pool again    ``RECONNECT_WAIT_S``

The pool is the addresses that were given, and those of the cluster that the server told of. Both waits are drawn.
"""

from __future__ import annotations

import asyncio
import math
import random
import ssl
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from meshrl.bus.client import NoCertificate, NoTls
from meshrl.bus.events import Events
from meshrl.bus.login import Login
from meshrl.errors import MeshUnreachable

# A client comes back within half a second of its server; the spread keeps a thousand from doing so at once.
RECONNECT_WAIT_S = (0.1, 0.5)
# Where a node of a cluster is lost, all its clients lose it in one moment and the others are there at once: by itself
# nats-py dials them in that moment. Those who wait for a worker meanwhile do so for 0.6 s (doubt.GRACE_S).
FIRST_WAIT_S = (0.0, 0.3)
# What is there answers the dial of one that comes back in a fraction of it; NATS's own clients have the same limit. A
# server that takes connections and says nothing must not hold up the attempt at the next.
REDIAL_S = 2.0
# A server that froze, or a connection that is half open, is noticed in two missed pings: after 5 to 7.5 s. That has to
# be before a worker is given up for its silence (doubt.FROZEN_S, 10 s), which may be no fault of the worker's.
PING_INTERVAL_S = 2.5
MAX_PINGS = 2
# A server gives a login two seconds, and callers have a deadline of their own. A loop that dials thousands at once must
# not use them up by being busy with the others: so many are under way, and the rest have not begun.
AT_ONCE = 64

_DIALLING: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


def few_at_once() -> asyncio.Semaphore:
    """To be entered for the length of a dial: one of ``AT_ONCE`` of the running loop."""
    loop = asyncio.get_running_loop()
    gate = _DIALLING.get(loop)
    if gate is None:
        gate = _DIALLING[loop] = asyncio.Semaphore(AT_ONCE)
    return gate


class Comeback:
    """Which server is tried next after a loss, and after how long a wait; nats-py asks before each attempt.

    Args:
        draw: gives a number between two.
    """

    def __init__(self, draw: Callable[[float, float], float] = random.uniform) -> None:
        self._draw = draw
        self._attempts = 0

    def __call__(self, pool: Sequence[Any], _info: object = None) -> tuple[Any, float]:
        """The server of the pool, which is in an order of chance, and the wait in seconds."""
        at = self._attempts % len(pool)
        bounds = FIRST_WAIT_S if self._attempts == 0 else RECONNECT_WAIT_S if at == 0 else (0.0, 0.0)
        self._attempts += 1
        return pool[at], self._draw(*bounds)

    def lost(self) -> None:
        """The connection was lost: the next attempt is the first."""
        self._attempts = 0


async def first_connection(client: Any, login: Login, events: Events, name: str, timeout: float) -> None:
    """Connect ``client``. After an error or when cancelled, the caller closes it.

    Args:
        client: of nats-py.
        login: where to, and as whom.
        events: is told from here on.
        name: what the server's monitoring shows.
        timeout: in seconds; nats-py by itself tries for ever.

    Raises:
        LoginRefused: a server answers and refuses the login.
        MeshUnreachable: no server answers, or none with the TLS that was asked for, or it has too many connections.
    """
    loop = asyncio.get_running_loop()
    comeback = Comeback()
    # What a WebSocket raises in an attempt that nats-py leaves to us would end all attempts.
    ours = all(urlsplit(server).scheme in {"nats", "tls"} for server in login.servers)
    refused = events.refused = loop.create_future()
    dial = loop.create_task(
        client.connect(
            login.servers,
            name=name,
            inbox_prefix=f"_INBOX.{login.user}",
            connect_timeout=timeout,
            max_reconnect_attempts=-1,
            reconnect_time_wait=random.uniform(*RECONNECT_WAIT_S),  # noqa: S311  # jitter
            reconnect_to_server_handler=comeback if ours else None,
            ping_interval=PING_INTERVAL_S,
            max_outstanding_pings=MAX_PINGS,
            **events.options(client),
            **login.options,
        )
    )
    try:
        await asyncio.wait({dial, refused}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        events.refused = None
        if not dial.done():
            dial.cancel()
            await asyncio.gather(dial, return_exceptions=True)
    if refused.done():
        if not dial.cancelled():
            dial.exception()
        raise refused.result()
    cause = None if dial.cancelled() else dial.exception()
    if (dial.cancelled() or cause is not None) and events.hindrance is not None:
        raise _hindered(events.hindrance, login) from events.hindrance
    if dial.cancelled() or cause is not None:
        raise MeshUnreachable(
            f"no NATS server answers at {login.url}; start one (meshrl up, docker compose up) or give its address "
            "(url=, MESHRL_URL)",
            url=login.url,
        ) from cause
    events.hindrance = None
    events.on_disconnect.append(comeback.lost)
    client.options["connect_timeout"] = min(timeout, REDIAL_S)
    # Nobody this connection knows of is known from before it: word that nobody listens is to be believed at once.
    events.up_since = -math.inf


def _hindered(why: Exception, login: Login) -> MeshUnreachable:
    """What to do where a server answers, and a connection with it does not come about."""
    if not isinstance(why, (ssl.SSLError, NoTls, NoCertificate)):
        remedy = f"it says {why}; close connections that are not needed, or ask its operator to raise that limit"
    elif isinstance(why, NoTls):
        remedy = (
            "it does not offer TLS, and nothing is said to it in the clear; turn TLS on there, or write nats:// and "
            "name no certificates"
        )
    elif isinstance(why, ssl.SSLCertVerificationError):
        remedy = (
            f"its certificate is not trusted ({why.verify_message}); give the certificate of its CA (tls_ca=, "
            "MESHRL_TLS_CA with tls://, or in the login's file), and the host's name as its certificate has it"
        )
    elif isinstance(why, NoCertificate):
        remedy = (
            "it asks for a certificate of its clients; give tls_cert and tls_key (MESHRL_TLS_CERT and MESHRL_TLS_KEY, "
            "with tls://)"
        )
    else:
        remedy = f"TLS with it fails ({why}); see that both have TLS 1.2 or later, and its log for what it says of this"
    return MeshUnreachable(f"a NATS server answers at {login.url}, but {remedy}", url=login.url, reason=str(why))

"""Ways to a :class:`~meshrl.bus.connection.Connection`: for the length of a block, or until its owner closes it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from meshrl.bus.connection import Connection
from meshrl.bus.heap import keep_large_blocks
from meshrl.bus.login import Credentials, login

CONNECT_TIMEOUT_S = 5.0


@contextlib.asynccontextmanager
async def connect(
    url: str,
    *,
    name: str = "meshrl",
    credentials: str | Path | Credentials | None = None,
    timeout: float = CONNECT_TIMEOUT_S,
    on_error: Callable[[Exception], None] | None = None,
) -> AsyncIterator[Connection]:
    """Connect to NATS for the length of an ``async with``.

    Args:
        url: ``nats://host:port``, several separated by commas; ``tls://``, ``ws://`` and ``wss://`` too.
        name: what the server's monitoring shows.
        credentials: a file (credentials or NKEY seed) or a :class:`~meshrl.bus.login.Credentials`.
        timeout: seconds to wait for a server at first; later the connection comes back for ever.
        on_error: is told of errors that no caller waits for; they are logged otherwise.

    Raises:
        MeshUnreachable: no server answers.
        LoginRefused: a server answers and refuses the login.
    """
    connection = await dial(url, name=name, credentials=credentials, timeout=timeout, on_error=on_error)
    try:
        yield connection
    finally:
        await connection.close()


async def dial(
    url: str,
    *,
    name: str = "meshrl",
    credentials: str | Path | Credentials | None = None,
    timeout: float = CONNECT_TIMEOUT_S,
    on_error: Callable[[Exception], None] | None = None,
    confirm: bool = True,
    in_turn: bool = True,
    polls: bool = False,
) -> Connection:
    """The same as :func:`connect`, closed by the caller.

    A caller that subscribes at once may leave it to that to wait for the server's consent (``confirm=False``), which
    saves a round trip. One for which others wait that are dialling themselves waits for none of them
    (``in_turn=False``). One for whose answers a learner waits looks for them awake (``polls=True``; see
    :mod:`~meshrl.bus.polling`).
    """
    keep_large_blocks()
    connection = Connection(login(url, credentials), name, on_error, polls=polls)
    await connection.open(timeout, confirm=confirm, in_turn=in_turn)
    return connection

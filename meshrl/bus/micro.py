"""Each worker as a NATS micro service, so that ``nats micro ls`` and other tools see the mesh."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from nats.micro import add_service
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, ServiceConfig

from meshrl.bus.answering import may_be_answered
from meshrl.bus.connection import Connection
from meshrl.wire.messages import Description

# The version of the protocol as micro services want it, not of the package.
SERVICE_VERSION = "1.0.0"
MAX_NAMES_CHARS = 512

Descriptions = Callable[[], list[Description]]


class _OnInboxes:
    """nats-py's client as its micro services see it: a request that wants its answer elsewhere does not reach them."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    async def subscribe(self, subject: str, *, cb: Callable[[Any], Awaitable[None]], **more: Any) -> Any:
        async def asked(message: Any) -> None:
            if may_be_answered(message.reply):
                await cb(message)

        return await self._raw.subscribe(subject, cb=asked, **more)


class MicroService:
    """A worker's micro service, from :func:`advertise_service` to :meth:`stop`."""

    def __init__(self, connection: Connection, raw: Any, metadata: dict[str, str], descriptions: Descriptions) -> None:
        self._connection = connection
        self._raw = raw
        self._metadata = metadata  # nats-py reads it for each answer
        self._descriptions = descriptions

    def refresh(self) -> None:
        """Tell the names that are served now."""
        self._metadata["names"] = names_of(self._descriptions())

    async def stop(self) -> None:
        """End it; nothing happens when the connection is gone, over which it would drain its subscriptions."""
        if self._connection.connected and not self._connection.closed:
            await self._raw.stop()


def names_of(descriptions: list[Description]) -> str:
    """The names that are served, for people; the first of them when they are many."""
    return ",".join(d.name for d in descriptions)[:MAX_NAMES_CHARS]


def answer(descriptions: list[Description], limit_bytes: int) -> bytes:
    """The descriptions as JSON of at most ``limit_bytes``; as many as fit, then how many were ``left_out``."""
    texts = [json.dumps(d.model_dump(exclude_defaults=True), default=repr).encode() for d in descriptions]
    room = limit_bytes - len(b"[]") - len(b',{"left_out": 1000000000}')
    fit = 0
    for text in texts:
        room -= len(text) + len(b",")
        if room < 0:
            break
        fit += 1
    left_out = len(texts) - fit
    return b"[" + b",".join([*texts[:fit], *([b'{"left_out": %d}' % left_out] if left_out else [])]) + b"]"


async def advertise_service(connection: Connection, kind: str, worker: str, descriptions: Descriptions) -> MicroService:
    """Register ``worker`` as the micro service ``meshrl-env`` or ``meshrl-agent``.

    Its one endpoint, ``meshrl.describe.<worker>``, answers with the descriptions as JSON, for people.

    Args:
        connection: over which it answers.
        kind: ``env`` or ``agent``.
        worker: its id.
        descriptions: gives those of everything served at that moment.
    """

    async def describe(request: Request) -> None:
        await request.respond(answer(descriptions(), connection.max_payload))

    metadata = {"worker": worker, "names": names_of(descriptions())}
    raw: Any = await add_service(
        _OnInboxes(connection.raw),
        ServiceConfig(
            name=f"meshrl-{kind}",
            version=SERVICE_VERSION,
            description=f"meshrl {kind} worker {worker}",
            metadata=metadata,
        ),
    )
    await raw.add_endpoint(EndpointConfig(name="describe", subject=f"meshrl.describe.{worker}", handler=describe))
    return MicroService(connection, raw, metadata, descriptions)

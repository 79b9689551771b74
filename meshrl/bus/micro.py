"""Each worker as a NATS micro service, so that ``nats micro ls`` and other tools see the mesh."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from nats.micro import add_service
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, ServiceConfig

from meshrl.bus.connection import Connection
from meshrl.wire.messages import Description

# The version of the protocol as micro services want it, not of the package.
SERVICE_VERSION = "1.0.0"


async def advertise_service(
    connection: Connection, kind: str, worker: str, descriptions: list[Description]
) -> Callable[[], Awaitable[None]]:
    """Register ``worker`` as the micro service ``meshrl-env`` or ``meshrl-agent``.

    Its one endpoint, ``meshrl.describe.<worker>``, answers with the descriptions as JSON, for people.

    Returns:
        what ends it.
    """

    async def describe(request: Request) -> None:
        text = json.dumps([d.model_dump(exclude_defaults=True) for d in descriptions], default=repr)
        await request.respond(text.encode())

    names = ",".join(d.name for d in descriptions)
    service: Any = await add_service(
        connection.raw,
        ServiceConfig(
            name=f"meshrl-{kind}",
            version=SERVICE_VERSION,
            description=f"meshrl {kind} worker {worker}",
            metadata={"worker": worker, "names": names[:512]},
        ),
    )
    await service.add_endpoint(EndpointConfig(name="describe", subject=f"meshrl.describe.{worker}", handler=describe))

    async def stop() -> None:
        # svc.stop() drains its subscriptions over the connection, which may be gone already.
        if connection.connected and not connection.closed:
            await service.stop()

    return stop

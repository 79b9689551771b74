"""A worker process: ``worker.py URL NAMESPACE HOST NAME...``, where HOST is what clients may ask for by ``where``."""

from __future__ import annotations

import sys
from typing import Any

from envs import Busy, Lognormal, Nothing, Sleeping, Waiting
from peers.served import CARTPOLE, Image

from meshrl import EnvWorker
from meshrl.worker.running import run, spare_what_stays

SOURCES: dict[str, Any] = {
    "cartpole": CARTPOLE,
    "fast": CARTPOLE,
    "image": Image,
    "nothing": Nothing,
    "sleeping": Sleeping,
    "lognormal": Lognormal,
    "busy": Busy,
    "waiting": Waiting,
}
SLOTS = 20_000


async def serve(url: str, namespace: str, host: str, names: list[str]) -> None:
    worker = EnvWorker(
        {name: SOURCES[name] for name in names},
        url,
        namespace=namespace,
        slots=SLOTS,
        record="off",  # as at every peer; recording.py measures what it adds
        capabilities={"host": host},
        vectors={"fast": "gymnasium"} if "fast" in names else "meshrl",
    )
    async with worker:
        spare_what_stays()  # as `meshrl serve` does
        await worker.serve_forever()


if __name__ == "__main__":
    run(serve(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))

"""RLMesh's servers. One takes one client, so that many clients are as many servers, here in one process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import driver
from gymnasium.vector import SyncVectorEnv
from peers.served import Image, cartpole
from rlmesh import EnvServer

VECTOR = 64


def main() -> None:
    what, *addresses = sys.argv[1:]
    makers: dict[str, Callable[[], Any]] = {
        "cartpole": cartpole,
        "image": Image,
        "vector": lambda: SyncVectorEnv([cartpole] * VECTOR),
    }
    servers = [EnvServer(makers[what](), address) for address in addresses]
    for server in servers:
        server.start()
    driver.announce(" ".join(server.address for server in servers))
    threading.Event().wait()


if __name__ == "__main__":
    main()

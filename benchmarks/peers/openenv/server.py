"""OpenEnv's server: one process, WebSocket sessions, an env each."""

from __future__ import annotations

import resource
import socket
import sys

import driver
import uvicorn
from models import ENVIRONMENTS, Move
from openenv.core.env_server import Observation, create_app

MAX_SESSIONS = 5000
BACKLOG = 4096


def main() -> None:
    style, env = sys.argv[1:]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    app = create_app(ENVIRONMENTS[style][env], Move, Observation, env_name=env, max_concurrent_envs=MAX_SESSIONS)
    # "pip install openenv" brings neither uvloop nor httptools, which uvicorn would take if they were there.
    loop, http = ("uvloop", "httptools") if style == "best" else ("asyncio", "h11")
    # Its default compresses every message: a tenth of a small step's time, three quarters of a picture's.
    deflate = style == "usual"
    config = uvicorn.Config(
        app, loop=loop, http=http, ws_per_message_deflate=deflate, log_level="warning", backlog=BACKLOG
    )
    listening = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    driver.announce(listening.getsockname()[1])
    uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    main()

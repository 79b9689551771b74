"""The program behind each worker of ``meshrl up``: Gymnasium's registry on demand, and maybe the agent ``random``.

``python -m meshrl.cli.hand`` with ``MESHRL_URL`` set (a password does not belong on a command line). It is started
under a guard and ends with its parent. When it is advertised, it makes the file given as ``--ready``.
"""

import argparse
import asyncio
import contextlib
import os
from pathlib import Path

import gymnasium

from meshrl.bus.locate import URL_VARIABLE
from meshrl.cli.running import run, until_stopped
from meshrl.wire.messages import Description
from meshrl.worker.agent_worker import AgentWorker
from meshrl.worker.env_worker import EnvWorker
from meshrl.worker.policies import random_policy
from meshrl.worker.service import Service


class RegistryWorker(EnvWorker):
    """An env worker on demand that imports nothing because a client says so.

    ``module:Name-v1`` makes a worker import the module. On a server that only this user can reach that is what
    the user does to himself; on one that others use, it is not theirs to decide.
    """

    def provide(self, name: str) -> Description | None:
        """As by any worker on demand, for ids that are in Gymnasium's registry already."""
        return super().provide(name) if ":" not in name or name in gymnasium.registry else None


async def serve(
    url: str, *, namespace: str, credentials: Path | None, slots: int, agents: bool, private: bool, ready: Path
) -> None:
    """Serve until cancelled.

    Args:
        url: of the NATS server.
        namespace: of the mesh.
        credentials: the login.
        slots: of the env worker.
        agents: serve the agent ``random`` too.
        private: the server is this user's alone, so clients may pass, call and import anything public.
        ready: the file made once everything is advertised.
    """
    anything = ("*",) if private else ()
    made = EnvWorker if private else RegistryWorker
    workers: list[Service] = [
        made(
            url=url,
            namespace=namespace,
            credentials=credentials,
            slots=slots,
            on_demand=True,
            allow_kwargs=anything,
            allow=anything,
        )
    ]
    if agents:
        workers.append(AgentWorker({"random": random_policy}, url=url, namespace=namespace, credentials=credentials))
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        await asyncio.to_thread(ready.touch)
        # Whichever ends first ends the process: half a hand would go unnoticed, a whole one is replaced.
        ends = [asyncio.ensure_future(worker.serve_forever()) for worker in workers]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        for end in done:
            end.result()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="meshrl.cli.hand")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--credentials", type=Path)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--agents", action="store_true")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--ready", type=Path, required=True)
    options = vars(parser.parse_args())
    run(until_stopped(serve(os.environ[URL_VARIABLE], **options)))


if __name__ == "__main__":
    main()

"""The program behind an embedded mesh and behind ``meshrl up``: Gymnasium's registry on demand, and maybe ``random``.

``python -m meshrl.worker.host`` with ``MESHRL_URL`` set (a password does not belong on a command line). It is started
under a guard and ends with its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from meshrl.bus.locate import URL_VARIABLE
from meshrl.errors import WorkerCondemned
from meshrl.worker.agent_worker import AgentWorker
from meshrl.worker.env_worker import RESET_DEADLINE_S, STEP_DEADLINE_S, EnvWorker
from meshrl.worker.isolation import ISOLATIONS, Isolation
from meshrl.worker.policies import random_policy
from meshrl.worker.running import CONDEMNED_CODE, end_condemned, run, spare_what_stays, until_stopped
from meshrl.worker.service import Service


async def serve(
    url: str,
    *,
    namespace: str,
    credentials: Path | None,
    slots: int,
    agents: bool,
    private: bool,
    replaced: bool,
    isolation: Isolation,
    step_deadline: float,
    reset_deadline: float,
    state_key: Path | None,
    ready: Path | None,
) -> None:
    """Serve until cancelled.

    Args:
        url: of the NATS server.
        namespace: of the mesh.
        credentials: the login.
        slots: of the env worker.
        agents: serve the agent ``random`` too.
        private: the server is this user's alone, so clients may pass, call and import anything public.
        replaced: whether somebody starts it again when it ends, so that it may end where it holds code that hangs.
        isolation: of the env worker.
        step_deadline: in seconds, of the env worker.
        reset_deadline: in seconds, of the env worker.
        state_key: of the env worker, a file.
        ready: a file to make once everything is advertised.
    """
    anything = ("*",) if private else ()
    workers: list[Service] = [
        EnvWorker(
            url=url,
            namespace=namespace,
            credentials=credentials,
            slots=slots,
            on_demand=True,
            import_modules=private,
            allow_kwargs=anything,
            allow=anything,
            isolation=isolation,
            step_deadline_s=step_deadline,
            reset_deadline_s=reset_deadline,
            state_key=state_key,
            last_resort=end_condemned if replaced else None,
        )
    ]
    if agents:
        workers.append(AgentWorker({"random": random_policy}, url=url, namespace=namespace, credentials=credentials))
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        spare_what_stays()
        if ready is not None:
            await asyncio.to_thread(ready.touch)
        for worker in workers:
            worker.on_leaving = partial(leave_together, workers)
        # Whichever ends first ends the process: half a host would go unnoticed, a whole one is replaced.
        ends = [asyncio.ensure_future(worker.serve_forever()) for worker in workers]
        try:
            done, others = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if others and all(worker.draining_s is not None for worker in workers):
                await asyncio.wait(others)  # each ends by itself, at the same time at the latest
        finally:
            for end in ends:
                end.cancel()
        for end in done:
            end.result()


def leave_together(workers: Sequence[Service], seconds: float) -> None:
    """One of them leaves: so do those that are served by the same process."""
    for worker in workers:
        if worker.draining_s is None:
            worker.leave(seconds)


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="meshrl.worker.host")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--credentials", type=Path)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--agents", action="store_true")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--replaced", action="store_true")
    parser.add_argument("--isolation", choices=ISOLATIONS, default="thread")
    parser.add_argument("--step-deadline", type=float, default=STEP_DEADLINE_S)
    parser.add_argument("--reset-deadline", type=float, default=RESET_DEADLINE_S)
    parser.add_argument("--state-key", type=Path)
    parser.add_argument("--ready", type=Path)
    options = vars(parser.parse_args())
    try:
        run(until_stopped(serve(os.environ[URL_VARIABLE], **options)))
    except WorkerCondemned as exc:
        print(f"error: {exc.message}", file=sys.stderr, flush=True)  # noqa: T201  # its log's last line, which is told
        sys.exit(CONDEMNED_CODE)


if __name__ == "__main__":
    main()

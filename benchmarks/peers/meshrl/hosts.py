"""The processes of this system: a nats-server, workers, a responder and this client's event loop."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import driver
import uvloop

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.guard import Guarded

HERE = Path(__file__).resolve().parent
MAIN = ("cartpole", "fast", "image", "nothing")
FIRST, SECOND = {"host": "first"}, {"host": "second"}
# By namespace: each worker's name and what it serves. Apart, so that a mesh hears only of those that it works with.
WORKERS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "default": [("first", MAIN), ("second", MAIN)],
    "slow": [(f"slow{number}", ("sleeping", "lognormal")) for number in range(4)],
    "shared": [("first", ("busy",))],
    "sessions": [("first", ("waiting",))],
}
LISTENING_S = 30.0
RESPONDER = "responder"

T = TypeVar("T")


class Loop:
    """An event loop on uvloop in a thread of its own.

    It runs between works too: workers advertise every second, and a client that never listened would be cut off.
    """

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Runs it on the event loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(main, self._loop).result()


class Hosts:
    """Starts what a work needs when it first needs it; all of it ends with this process, however that ends."""

    def __init__(self) -> None:
        self._server = EmbeddedServer.start()
        self.url = self._server.url
        self._guarded: list[Guarded] = []
        self._served: set[str] = set()
        self._meshes: dict[str, Mesh] = {}
        self._opened: dict[str, Any] = {}
        self._peers: dict[str, driver.PeerProcess] = {}

    def spawn(self, script: str, *arguments: str) -> None:
        """Starts one of the programs beside this file."""
        argv = [sys.executable, str(HERE / script), *arguments]
        self._guarded.append(Guarded.spawn(argv, log=Path.cwd() / "stderr"))

    async def workers(self, namespace: str) -> None:
        """Starts the workers of a namespace and waits until a client can see them."""
        if namespace in self._served:
            return
        self._served.add(namespace)  # tried once: who could not be started in the first round is not waited for again
        for host, names in WORKERS[namespace]:
            self.spawn("worker.py", self.url, namespace, host, *names)
        mesh = await self.mesh(namespace)
        awaited = sum(len(names) for _, names in WORKERS[namespace])
        try:
            async with asyncio.timeout(LISTENING_S):
                async for _ in mesh.watch():
                    if len(await mesh.envs()) == awaited:
                        return
        except TimeoutError:
            raise RuntimeError(
                f"of what the workers of {namespace!r} serve, {len(await mesh.envs())} of {awaited} came up within "
                f"{LISTENING_S:.0f} s"
            ) from None

    async def mesh(self, namespace: str = "default") -> Mesh:
        """The mesh of a namespace, kept open; its workers run."""
        if namespace not in self._meshes:
            self._meshes[namespace] = await Mesh(self.url, namespace=namespace).__aenter__()
        await self.workers(namespace)
        return self._meshes[namespace]

    async def kept(self, key: str, opening: Any) -> Any:
        """What ``opening`` (a coroutine function) gives, opened once."""
        if key not in self._opened:
            self._opened[key] = await opening()
        return self._opened[key]

    def let_go(self) -> None:
        """Something went wrong: what was kept may be of no use any more, and is opened anew."""
        self._opened = {key: kept for key, kept in self._opened.items() if key == RESPONDER}

    def role(self, name: str, *arguments: str) -> driver.PeerProcess:
        """A process that runs client.py in another role, under the driver's protocol as well."""
        if name not in self._peers:
            peer = driver.Peer(name, name, "meshrl", arguments)
            self._peers[name] = driver.PeerProcess(peer, Path(sys.executable))
        return self._peers[name]


async def asked(process: driver.PeerProcess, work: str, **parameters: Any) -> driver.Answer:
    """:meth:`driver.PeerProcess.ask` from a coroutine; what went wrong there is raised here."""
    answer = await asyncio.to_thread(process.ask, work, **parameters)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def many_files() -> None:
    """Thousands of connections need as many descriptors."""
    if os.name == "posix":
        import resource  # noqa: PLC0415  not on Windows

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""Three real nats-servers on loopback ports, clustered, with JetStream, that can be killed and brought back."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.mesh.conftest import until
from tests.mesh.own_server import OwnServer

SIZE = 3


class Cluster:
    """Its nodes by name."""

    def __init__(self, nodes: dict[str, OwnServer]) -> None:
        self.nodes = nodes

    @property
    def url(self) -> str:
        """All of them."""
        return ",".join(node.url() for node in self.nodes.values())

    def leader(self) -> str:
        """The name of the node that leads JetStream's metadata, as the others say; empty while there is none."""
        said = set()
        for node in self.nodes.values():
            if node.running:
                said.add(node.monitored("jsz").get("meta_cluster", {}).get("leader", ""))
        return said.pop() if len(said) == 1 else ""

    def routed(self) -> bool:
        """Whether all nodes that run know one another."""
        running = [node for node in self.nodes.values() if node.running]
        known = [{route["remote_name"] for route in node.monitored("routez")["routes"]} for node in running]
        return all(len(others) == len(running) - 1 for others in known)


def _free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


@asynccontextmanager
async def three_nodes(home: Path) -> AsyncIterator[Cluster]:
    """Run it, with its files in ``home``; whole when this begins."""
    names = [f"n{number}" for number in range(SIZE)]
    ports = _free_ports(SIZE)
    async with AsyncExitStack() as stack:
        nodes: dict[str, OwnServer] = {}
        for name, port in zip(names, ports, strict=True):
            (home / name).mkdir()
            config = {
                "server_name": name,
                "http": "127.0.0.1:-1",
                "jetstream": {"store_dir": str(home / name)},
                "cluster": {
                    "name": "three",
                    "listen": f"127.0.0.1:{port}",
                    "routes": [f"nats://127.0.0.1:{other}" for other in ports if other != port],
                },
            }
            nodes[name] = OwnServer(home / name, config)
            await nodes[name].start()
            stack.push_async_callback(nodes[name].stop)
        cluster = Cluster(nodes)
        await until(lambda: cluster.routed() and cluster.leader() in names, "the cluster has a leader")
        yield cluster

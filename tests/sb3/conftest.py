"""What the tests with Stable-Baselines3 share. Without it none of them is collected; CI runs them where it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.gymnasium_ids import TAXI
from tests.mesh.worker_process import WorkerProcess

collect_ignore_glob = [] if find_spec("stable_baselines3") else ["test_*.py"]
# What Gymnasium's wrappers need beside torch is in CI in any case, as tests/conftest.py has it for what is skipped.
if not os.environ.get("MESHRL_NO_SKIPS") and not (find_spec("moviepy") and find_spec("array_api_compat")):
    collect_ignore_glob.append("test_wrappers.py")

GYMNASIUMS = ("CartPole-v1", "Pendulum-v1", "FrozenLake-v1", TAXI)
OURS = ("OfDicts", "OfTuples", "OfActions", "Masked", "Goals", "GatedReset", "monitored")
SERVED = (
    {name: name for name in GYMNASIUMS}
    | {name: f"tests.sb3.envs:{name}" for name in OURS}
    | {name: f"tests.mesh.envs:{name}" for name in ("Breaks", "Nested", "Coroutine")}
    | {name: f"tests.mesh.made_envs:{name}" for name in ("Gated", "Framed", "Counter")}
)


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as running:
        yield running


@pytest.fixture(scope="session")
def mesh(server: EmbeddedServer) -> Iterator[dict[str, Any]]:
    """A mesh of two workers whose operator allows everything."""
    given: dict[str, Any] = {"allow": ["*"], "allow_kwargs": ["*"], "wait": False}
    first, second = (WorkerProcess(server.url, SERVED, **given) for _ in range(2))
    with first, second:
        first.wait_advertised()
        second.wait_advertised()
        yield {"url": server.url}


@pytest.fixture(scope="session")
def guarded(server: EmbeddedServer) -> Iterator[dict[str, Any]]:
    """A mesh of one worker of two slots, whose operator allows nothing; leases outlive every test."""
    served = {name: SERVED[name] for name in ("CartPole-v1", "Counter", "Nested", "Coroutine")}
    with WorkerProcess(server.url, served, slots=2, lease_s=3600.0, namespace="guarded"):
        yield {"url": server.url, "namespace": "guarded"}


@pytest.fixture(scope="session")
def hosted(server: EmbeddedServer) -> Iterator[dict[str, Any]]:
    """A mesh of one worker that hosts CartPole by Gymnasium's vector implementation."""
    served = {"CartPole-v1": "CartPole-v1"}
    with WorkerProcess(server.url, served, namespace="hosted", vectors="gymnasium"):
        yield {"url": server.url, "namespace": "hosted"}

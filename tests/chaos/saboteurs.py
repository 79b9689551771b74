"""Saboteurs: sessions whose envs hang, exit, crash and raise, on the workers that have learners' envs as well.

Whoever leased such an env gets the error that says so; nobody else hears of it.
"""

from __future__ import annotations

import asyncio

from meshrl import Mesh
from meshrl.errors import DeadlineExceeded, EnvError, EnvProcessDied, MeshError
from tests.chaos.fleet import DANGEROUS, ISOLATED
from tests.chaos.schedule import Kind
from tests.mesh.dangerous_envs import Dangerous

WAIT_S = 60.0
HANGS_S = 90.0

# What it does, and what its user gets: exactly this class.
ACTS: dict[Kind, tuple[int, type[MeshError]]] = {
    Kind.HANG: (Dangerous.HANG, DeadlineExceeded),
    Kind.EXIT: (Dangerous.EXIT, EnvProcessDied),
    Kind.SEGFAULT: (Dangerous.SEGFAULT, EnvProcessDied),
    Kind.RAISE: (Dangerous.RAISE, EnvError),
}


async def sabotage(m: Mesh, kind: Kind) -> None:
    """One of them: it steps twice in peace, and then does it.

    Raises:
        AssertionError: it was told something else than what it did.
        MeshError: the same.
        TimeoutError: it was told nothing.
    """
    action, error = ACTS[kind]
    async with asyncio.timeout(HANGS_S):
        env = await m.env(DANGEROUS, where=ISOLATED, wait=WAIT_S)
        try:
            await env.reset(seed=1)
            for count in (1, 2):
                assert (await env.step(Dangerous.SAFE))[0] == count
            try:
                told: object = await env.step(action)
            except MeshError as exc:
                told = exc
            assert type(told) is error, f"{kind.value}: {told!r}"
        finally:
            await env.close()

"""Mutated answers and advertisements: a client raises typed errors, or takes them for what they say; nothing else.

What workers say is mutated on its way out: grants, replies, words on probes and renewals, descriptions, advertisements.
``MESHRL_FUZZ_ANSWERS`` says how many calls are made, ``MESHRL_FUZZ_SEED`` by which draws.
"""

from __future__ import annotations

import asyncio
import os
import traceback
from collections import Counter
from typing import Any

import numpy as np
import pytest

from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.bus.connection import Connection
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.events import Events
from meshrl.errors import MeshError
from tests.fuzz import templates
from tests.fuzz.fuzzed_workers import Counting, still
from tests.fuzz.mutating import Mutator
from tests.mesh.envs import Nested

CALLS = int(os.environ.get("MESHRL_FUZZ_ANSWERS", "1000"))
SEED = int(os.environ.get("MESHRL_FUZZ_SEED", "1"))
FORMS = ["env", "nested", "vector", "nested vector", "pool", "agent", "act"]
NUM_ENVS = 3
# An answer that is none, where its request is looked into, comes after a while.
CALL_S = 30.0


class Liars:
    """What they say is mutated while ``lying``.

    Attributes:
        share: of messages that are mutated.
        reported: exceptions that no caller waited for.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self.reported: list[Exception] = []
        self._mutator = Mutator(SEED)

    def said(self, subject: str, body: bytes) -> bytes:
        of_workers = subject.startswith("_INBOX.") or (".registry." in subject and not subject.endswith(".ask"))
        if of_workers and self._mutator.chance.random() < self.share:
            return self._mutator.mutant(body, templates.anything())
        return body


@pytest.fixture
def liars(monkeypatch: pytest.MonkeyPatch) -> Liars:
    liars, publish = Liars(), Connection.publish

    def published(self: Connection, subject: str, body: bytes, reply: str = "", **kwargs: Any) -> None:
        publish(self, subject, liars.said(subject, body), reply, **kwargs)

    def told(self: Events, exc: Exception) -> None:
        liars.reported.append(exc)

    monkeypatch.setattr(Connection, "publish", published)
    monkeypatch.setattr(Events, "failed", told)
    return liars


class Caller:
    """A client that calls whatever there is, and counts what comes of it."""

    def __init__(self, m: Mesh) -> None:
        self.outcomes: Counter[str] = Counter()
        self._m = m
        self._reset: set[str] = set()  # of those that are held
        self._held: dict[str, Any] = {}
        self._chance = np.random.default_rng(SEED)

    async def call(self) -> None:
        """One call; what raised is opened anew the next time."""
        form = str(self._chance.choice(FORMS))
        try:
            async with asyncio.timeout(CALL_S):
                if form in self._held:
                    await self._used(form, self._held[form])
                else:
                    self._held[form] = await self._opened(form)
            self.outcomes["taken"] += 1
        except TimeoutError as exc:
            held = self._held.get(form)
            exc.add_note(f"{form}: {held!r} has waited for {CALL_S:g} s; {_at(held)}")
            raise
        except Exception as exc:
            # Infos that do not go together are Gymnasium's own errors, as they are locally.
            if not isinstance(exc, MeshError) and traceback.extract_tb(exc.__traceback__)[-1].name != "_add_info":
                raise
            self.outcomes[exc.code if isinstance(exc, MeshError) else "as locally"] += 1
            if form in self._held:
                await self._closed(form, self._held.pop(form))

    async def _closed(self, form: str, held: Any) -> None:
        self._reset.discard(form)
        if hasattr(held, "close"):
            await held.close()

    async def close(self) -> None:
        for form, held in self._held.items():
            await self._closed(form, held)

    async def _opened(self, form: str) -> Any:
        """It holds nothing when it raises: there is nothing to close."""
        if form in {"agent", "act"}:
            name, stateful = ("counting", True) if form == "agent" else ("still", False)
            return await self._m.agent(name, stateful=stateful)
        name = "nested" if form.startswith("nested") else "cartpole"
        if form in {"env", "nested"}:
            return await self._m.env(name, wait=5.0)
        opening = self._m.pool if form == "pool" else self._m.vector
        return await opening(name, NUM_ENVS, wait=5.0)

    async def _used(self, form: str, held: Any) -> Any:
        if form in {"agent", "act"}:
            await held.act(np.zeros(4, np.float32))
        elif form not in self._reset:
            self._reset.add(form)
            await held.reset(seed=1)
        elif form == "pool":
            batch = await held.recv(min=NUM_ENVS)
            await held.send(np.zeros(NUM_ENVS, np.int64), batch.env_ids)
        else:
            what = self._chance.integers(4)
            space = held.action_space
            if what < 2:
                await held.step(space.sample())
            elif what == 2:
                await held.reset()
            else:
                await held.get_attr("metadata")
        return held


def _at(held: Any) -> str:
    """What it waits for, for whoever wonders why it hangs."""
    sessions = [getattr(held, "_session", None), *getattr(held, "_sessions", ())]
    under_way = getattr(held, "_under_way", None)
    return f"sessions {sessions}, under way {vars(under_way) if under_way is not None else None}"


@pytest.mark.timeout(120 + CALLS / 10)
async def test_a_client_that_is_told_mutants_raises_typed_errors_and_nothing_else(
    server: EmbeddedServer, liars: Liars
) -> None:
    envs = EnvWorker({"cartpole": "CartPole-v1", "nested": Nested}, server.url, slots=256, lease_s=2.0)
    agents = AgentWorker({"still": still, "counting": Counting}, server.url, slots=256, lease_s=2.0)
    async with envs, agents:
        async with Mesh(server.url, timeout=2.0) as m:
            caller = Caller(m)
            await caller.call()
            liars.share = 0.3
            for _ in range(CALLS):
                await caller.call()
            liars.share = 0.0
            await caller.close()
        reported = Counter(type(exc).__name__ for exc in liars.reported)
        print(f"{CALLS} calls: {dict(caller.outcomes)}; reported: {dict(reported)}")  # noqa: T201  # shown by `make fuzz`
        assert caller.outcomes["taken"] > CALLS / 4
        assert caller.outcomes["malformed_message"] > 0
        assert [exc for exc in liars.reported if not isinstance(exc, MeshError)] == []
        async with Mesh(server.url) as m, await m.env("cartpole") as env:
            assert (await env.reset(seed=1))[0].shape == (4,)

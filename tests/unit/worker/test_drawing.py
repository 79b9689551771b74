"""Envs that draw run one at a time in a process, in whatever op and session; others as before (R10)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meshrl.protocol.pace import FAST_STEPS
from meshrl.wire.codec import pack
from meshrl.wire.messages import Description, Open, Vectors
from meshrl.worker.drawing import DRAWING
from meshrl.worker.hosted import HostedEnv
from meshrl.worker.hosted_pool import HostedPool
from meshrl.worker.hosted_vector import HostedVector
from tests.unit.worker.conftest import Bare

COUNT = 4


class Studio:
    """Where envs draw: each stays for a moment, so that any other that may come does."""

    def __init__(self, stay_s: float) -> None:
        self.most = 0
        self.threads: set[int] = set()
        self._stay_s = stay_s
        self._inside = 0
        self._come = threading.Condition()

    def draw(self) -> None:
        with self._come:
            self._inside += 1
            self.most = max(self.most, self._inside)
            self.threads.add(threading.get_ident())
            self._come.notify_all()
            self._come.wait_for(lambda: self.most > 1, self._stay_s)
            self._inside -= 1


class Draws(gymnasium.Env[Any, Any]):
    """Draws in everything it does."""

    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)

    def __init__(self, studio: Studio, render_mode: str | None = "rgb_array") -> None:
        self.studio = studio
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        self.studio.draw()
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.studio.draw()
        return 0, 0.0, False, False, {}

    def render(self) -> Any:
        self.studio.draw()
        return 1

    def paint(self) -> Any:
        return self.render()

    @property
    def canvas(self) -> Any:
        return self.render()

    def close(self) -> None:
        self.studio.draw()


class Drawers(Bare):
    """A worker of them, in any form."""

    def __init__(self, studio: Studio, render_mode: str | None = "rgb_array") -> None:
        super().__init__(lambda: Draws(studio, render_mode), slots=COUNT)
        self.admission.served = {"env": Description(kind="env", name="env", worker="w1", vectors=Vectors())}

    def _construct(
        self, open_: Open, description: Description, check_wanted: Callable[[], None]
    ) -> tuple[Any, Description]:
        envs = [self.make() for _ in range(open_.num_envs)]
        held: Any
        if open_.form == "pool":
            held = HostedPool(envs, open_, threads=self.threads)
        elif open_.form == "vector":
            held = HostedVector(envs, open_, allow=("*",), threads=self.threads)
        else:
            held = HostedEnv(
                envs[0], name="env", session=open_.session, worker="w1", allow=("*",), threads=self.threads
            )
        return held, description

    def of(self, form: str, op: str, seq: int) -> str:
        """One request to all sub-environments."""
        fields: dict[str, Any] = {}
        if op == "step":
            fields = {"action": 0} if form == "single" else {"actions": np.zeros(COUNT, np.int64)}
        elif op in {"call", "get_attr"}:
            fields = {"name": "paint" if op == "call" else "canvas"}
        if form != "pool":
            return self.ask(op, seq, **fields)
        reply = f"pool {op} {seq} {len(self.replies.sent)}"
        lanes = np.arange(COUNT)
        body = pack({"epoch": 1, "lanes": lanes, "seqs": np.full(COUNT, seq), **fields})
        self.execution.on_session(f"session.w1.anon.s1.{op}", reply, body)
        return reply

    async def done(self, form: str, reply: str) -> None:
        """Every lane of it is answered, without an error."""
        left = 1 if form != "pool" else COUNT
        at = 0
        while left > 0:
            at += 1
            body = await self.replies.to(reply, at)
            assert "error" not in body
            left -= len(body["lanes"]) if form == "pool" else 1


@pytest.mark.parametrize("form", ["single", "vector", "pool"])
async def test_whatever_envs_do_that_draw_they_do_one_at_a_time(form: str) -> None:
    studio = Studio(0.02)
    workers = [Drawers(studio) for _ in range(2)]
    for worker in workers:
        await worker.opened(form=form, num_envs=1 if form == "single" else COUNT)
    ops = ["reset", "step"] if form == "pool" else ["reset", "step", "render", "call", "get_attr"]
    for seq, op in enumerate(ops, 1):
        replies = [worker.of(form, op, seq) for worker in workers]
        for worker, reply in zip(workers, replies, strict=True):
            await worker.done(form, reply)
    for worker in workers:
        worker.close()
    for worker in workers:
        await worker.emptied()
    assert studio.most == 1


@pytest.mark.parametrize("form", ["vector", "pool"])
async def test_envs_that_do_not_draw_go_on_running_at_once(form: str) -> None:
    studio = Studio(30.0)
    worker = Drawers(studio, None)
    await worker.opened(form=form, num_envs=COUNT)
    await worker.done(form, worker.of(form, "reset", 1))
    assert studio.most > 1


@pytest.mark.parametrize("form", ["single", "vector", "pool"])
async def test_an_env_that_draws_never_waits_for_others_on_the_event_loop(form: str) -> None:
    studio = Studio(0.0)
    worker = Drawers(studio)
    session = await worker.opened(form=form, num_envs=1 if form == "single" else COUNT)
    held = session.held.held or session.held.pool
    for _ in range(FAST_STEPS):
        held.pace.took(0.0)
    await worker.done(form, worker.of(form, "reset", 1))
    held_here = threading.Event()
    let_go = threading.Event()

    def hold() -> None:
        with DRAWING:
            held_here.set()
            let_go.wait(60.0)

    other = threading.Thread(target=hold)
    other.start()
    held_here.wait(60.0)
    reply = worker.of(form, "step", 2)  # would never come back
    let_go.set()
    other.join()
    await worker.done(form, reply)
    assert threading.get_ident() not in studio.threads

"""Taps: episodes under way are seen as they go, whatever else is done with them, and nobody waits for a viewer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meshrl import EnvWorker, Mesh, RemoteEnv
from meshrl.bus.connection import Connection
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client import tap
from meshrl.client.context import context_of
from meshrl.client.tap import Tapped, tapped
from meshrl.errors import MessageTooLarge, TransportError, ViewerCut
from meshrl.recording import tapping, writing
from meshrl.recording.messages import Messages
from tests.mesh.conftest import until
from tests.mesh.losing import Workers
from tests.mesh.recordings import Told, drive
from tests.mesh.test_recordings import alike


class Viewer:
    """Takes whatever a tap shows."""

    def __init__(self) -> None:
        self.seen: list[Tapped] = []
        self.over = False

    async def watch(self, mesh: Mesh, **which: str) -> None:
        async with aclosing(mesh.tap(**which)) as shown:
            async for one in shown:
                self.seen.append(one)
        self.over = True

    def of(self, episode_id: str) -> list[Tapped]:
        return [one for one in self.seen if one.episode_id == episode_id]


@asynccontextmanager
async def watching(mesh: Mesh, **which: str) -> AsyncIterator[Viewer]:
    viewer = Viewer()
    task = asyncio.create_task(viewer.watch(mesh, **which))
    try:
        yield viewer
    finally:
        task.cancel()
        await asyncio.wait([task])


async def seen(viewer: Viewer, env: RemoteEnv, before: int = 0) -> int:
    """Play until that is shown; gives the number of the env's next episode, of which it had so many."""
    number = before
    while not viewer.seen:
        await env.reset()
        number += 1
        over = False
        while not over:
            _, _, terminated, truncated, _ = await env.step(0)
            over = terminated or truncated or bool(viewer.seen)
            await asyncio.sleep(0.002)
    return number


async def stored(m: Mesh, episode_id: str) -> None:
    """Wait until an episode is listed."""

    async def is_listed() -> bool:
        return any([one.episode_id == episode_id async for one in m.episodes("of")])

    await until(is_listed, "it is listed")


def same(shown: list[Tapped], told: Told, first: int = 0) -> None:
    assert [one.transition.step for one in shown] == list(range(first, len(told.actions)))
    right(shown, told)


def right(shown: list[Tapped], told: Told) -> None:
    """Whatever of an episode was seen was told so."""
    for one in shown:
        transition, t = one.transition, one.transition.step
        assert alike(transition.observation, told.obs[t])
        assert alike(transition.next_observation, told.obs[t + 1])
        assert alike(transition.action, told.actions[t])
        assert alike(transition.info, told.infos[t + 1])
        assert transition.reward == told.rewards[t]
        assert (transition.terminated, transition.truncated) == (told.terminations[t], told.truncations[t])


@pytest.mark.parametrize("level", ["actions", "full"])
async def test_whole_episodes_are_seen_with_observations_and_infos(url: str, level: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url, record=level), Mesh(url) as m, Mesh(url) as other:  # type: ignore[arg-type]
        async with await m.env("of") as env, watching(other, env="of") as viewer:
            number = await seen(viewer, env)
            told = await drive(env, 3, 2)
            last = f"{env.session_id}.0.{number + 2}"
            await until(lambda: len(viewer.of(last)) == len(told[2].actions), "the last episode is seen")
            for n, one in enumerate(told, number):
                shown = viewer.of(f"{env.session_id}.0.{n}")
                same(shown, one)
                assert {(view.session, view.env, view.env_id) for view in shown} == {(env.session_id, "of", 0)}
        await stored(other, last)
        assert (await other.episode(last)).remade == (level == "actions"), "what is stored has its own level"


@pytest.mark.parametrize("level", ["actions", "full"])
async def test_all_episodes_are_seen_however_few_of_them_are_kept(url: str, level: Any) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("of", record=level, record_every=3) as env, watching(m, env="of") as viewer:
            number = await seen(viewer, env)
            told = await drive(env, 7, 2)
            numbers = range(number, number + 7)
            ids = [f"{env.session_id}.0.{n}" for n in numbers]
            await until(lambda: len(viewer.of(ids[-1])) == len(told[-1].actions), "the last episode is seen")
            for id_, one in zip(ids, told, strict=True):
                same(viewer.of(id_), one)
        kept = [id_ for id_, n in zip(ids, numbers, strict=True) if n % 3 == 0]
        await stored(m, kept[-1])
        listed = {one.episode_id async for one in m.episodes("of")}
        assert listed & set(ids) == set(kept)
        assert (await m.verify(kept[-1])).status == "exact"


async def test_behind_what_could_not_be_stored_nothing_wrong_is_seen(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, calls = Messages.store, 0

    async def failing(messages: Messages, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            await asyncio.sleep(0.2)  # what is noted meanwhile is dropped with it
            raise TransportError("no room")
        await store(messages, *args)

    monkeypatch.setattr(Messages, "store", failing)
    async with EnvWorker({"of": "CartPole-v1"}, url) as worker, Mesh(url) as m:
        async with await m.env("of") as env, watching(m, env="of") as viewer:
            number = await seen(viewer, env)
            told = []
            for n in range(20):
                told.append(await drive(env, 1, n))
                await asyncio.sleep(0.06)

            async def goes_on() -> bool:
                await drive(env, 1, None)
                return int(viewer.seen[-1].episode_id.rpartition(".")[2]) >= number + len(told)

            await until(goes_on, "what comes behind all of these is seen")
            assert worker.recorded.lost > 0
            whole = [viewer.of(f"{env.session_id}.0.{n}") for n in range(number, number + len(told))]
            for shown, (one,) in zip(whole, told, strict=True):
                steps = [seen.transition.step for seen in shown]
                assert steps == sorted(set(steps))
                right(shown, one)
            assert 0 < sum(map(len, whole)) < sum(len(one.actions) for (one,) in told)


@pytest.mark.parametrize("every", [1, 3])
async def test_of_a_session_that_is_resumed_elsewhere_nothing_is_seen_twice(server: EmbeddedServer, every: int) -> None:
    with ExitStack() as stack:
        workers = Workers(server.url, stack)
        workers.start(2)
        async with (
            Mesh(server.url) as m,
            await m.env("CartPole-v1", record="actions", record_every=every) as env,
            await m.env("CartPole-v1", record="actions") as other,
            watching(m, session=env.session_id) as viewer,
        ):
            assert env.worker != other.worker
            await other.reset()  # so that its worker hears of the viewer before there is something to see
            number = await seen(viewer, env)
            told = await drive(env, 3, 2, max_steps=20)
            last = f"{env.session_id}.0.{number + 2}"
            await stored_up_to(m, env, number // every * every)
            await until(lambda: bool(viewer.of(last)), "the last of them is seen")
            await workers.kill(env.worker)
            before = len(viewer.seen)

            async def goes_on() -> bool:
                told.extend(await drive(env, 1, None, max_steps=20))
                return len(viewer.seen) > before

            await until(goes_on, "the other worker hears that somebody watches")
            told += await drive(env, 5, None, max_steps=20)
            end = f"{env.session_id}.0.{number + len(told) - 1}"
            await until(lambda: len(viewer.of(end)) == len(told[-1].actions), "and so is what comes after the loss")
        for n, one in enumerate(told, number):
            of = viewer.of(f"{env.session_id}.0.{n}")
            steps = [seen.transition.step for seen in of]
            assert steps == sorted(set(steps)), f"of episode {n}"
            right(of, one)


async def stored_up_to(m: Mesh, env: RemoteEnv, number: int) -> None:
    """Wait until the recording of a session goes beyond an episode of it, so that a resume takes it over."""

    async def is_listed() -> bool:
        wanted = f"{env.session_id}.0.{number}"
        return any([one.episode_id == wanted async for one in m.episodes("CartPole-v1")])

    await until(is_listed, "it is listed")


async def test_what_is_seen_after_a_loss_has_the_ids_that_it_is_listed_by(server: EmbeddedServer) -> None:
    with ExitStack() as stack:
        workers = Workers(server.url, stack)
        workers.start(2)
        async with (
            Mesh(server.url) as m,
            await m.env("CartPole-v1", record="actions", on_loss="truncate") as env,
            await m.env("CartPole-v1", record="actions") as other,
            watching(m, session=env.session_id) as viewer,
        ):
            await other.reset()  # as above
            number = await seen(viewer, env)
            await drive(env, 3, 2)
            await stored_up_to(m, env, number + 2)
            before = len(viewer.seen)
            await workers.kill(env.worker)
            assert (await env.step(0))[3], "its episode is cut short"

            async def goes_on() -> bool:
                await drive(env, 1, 3)
                return len(viewer.seen) > before + 50

            await until(goes_on, "what comes after the loss is seen")
            ids = {one.episode_id.rpartition(".0.")[0] for one in viewer.seen[before:]}
            assert ids == {f"{env.session_id}-2"}


class Noise(gymnasium.Env[Any, Any]):
    """Pictures that compress to nothing less: some are as much as a message may have."""

    observation_space = spaces.Box(0, 255, (84, 84, 4), np.uint8)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self._pictures = [rng.integers(0, 256, (84, 84, 4), np.uint8) for _ in range(64)]
        self._n = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._n = 0
        return self._pictures[0], {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._n += 1
        return self._pictures[self._n % 64], 1.0, self._n >= 300, False, {}


@pytest.mark.parametrize("level", ["actions", "full"])
async def test_what_is_too_much_for_a_message_is_seen_in_several(url: str, level: Any) -> None:
    async with EnvWorker({"of": Noise}, url), Mesh(url) as m:
        async with await m.env("of", record=level) as env, watching(m, env="of") as viewer:
            number = await seen(viewer, env)
            await drive(env, 1, 1)
            await until(lambda: len(viewer.of(f"{env.session_id}.0.{number}")) == 300, "all steps are seen")


class Counted(gymnasium.Env[Any, Any]):
    """Says in each info which step it was."""

    observation_space = spaces.Box(0, 1000, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._n = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._n += 1
        return np.full(3, self._n, np.float32), 1.0, self._n >= 20, False, {"n": self._n}


async def test_what_was_done_before_anybody_watched_is_not_shown_without_its_infos(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks of it wait, since the server is slow."""
    store = Messages.store

    async def slow(messages: Messages, *args: Any) -> None:
        await asyncio.sleep(0.3)
        await store(messages, *args)

    monkeypatch.setattr(Messages, "store", slow)
    monkeypatch.setattr(writing, "CHUNK_BYTES", 2000)
    async with EnvWorker({"of": Counted}, url), Mesh(url) as m:
        async with await m.env("of", record="actions") as env:
            await drive(env, 40, 1)
            async with watching(m, env="of") as viewer:
                await seen(viewer, env)
        assert all(one.transition.info == {"n": one.transition.step + 1} for one in viewer.seen)


async def test_lanes_of_vectors_and_pools_are_told_apart(url: str) -> None:
    async with EnvWorker(dict.fromkeys(("many", "pool"), "CartPole-v1"), url, record="actions"), Mesh(url) as m:
        async with await m.vector("many", 3, shards=1) as envs, watching(m, env="many") as viewer:
            obs, _ = await envs.reset(seed=1)
            told, over, n = [], np.zeros(3, bool), 0
            while len(viewer.seen) < 200:
                before, n = obs, n + 1
                obs, _, terminations, truncations, _ = await envs.step(np.full(3, n % 2))
                told += [[*before[i].tolist(), *obs[i].tolist()] for i in np.flatnonzero(~over)]
                over = terminations | truncations
                await asyncio.sleep(0.001)
            by_env: dict[int, int] = {}
            for one in viewer.seen:
                step = one.transition
                row = [*step.observation.tolist(), *step.next_observation.tolist()]
                assert row in told
                by_env[one.env_id] = by_env.get(one.env_id, 0) + 1
            assert by_env.keys() == {0, 1, 2}
        async with await m.pool("pool", 3, shards=1) as pool, watching(m, env="pool") as viewer:
            await pool.reset(seed=1)
            last: dict[int, np.ndarray] = {}
            pairs: dict[int, list[list[float]]] = {0: [], 1: [], 2: []}
            while len(viewer.seen) < 200:
                batch = await pool.recv(min=1, timeout=10.0)
                for at, i in enumerate(batch.env_ids.tolist()):
                    if not batch.first[at]:
                        pairs[i].append(last[i].tolist())
                    last[i] = batch.observations[at]
                await pool.send(np.zeros(len(batch.env_ids), np.int64), batch.env_ids)
                await asyncio.sleep(0)
            for one in viewer.seen:
                if not one.transition.terminated:
                    assert one.transition.observation.tolist() in pairs[one.env_id]


async def test_large_observations_are_kept_from_when_somebody_watches(url: str) -> None:
    """Those are hashed at once otherwise, and what was noted before is of another kind than what comes then."""
    async with EnvWorker({"of": Pictures}, url, record="actions"), Mesh(url) as m:
        async with await m.env("of") as env:
            await drive(env, 2, 1)
            async with watching(m, session=env.session_id) as viewer:
                number = await seen(viewer, env, 2)
                session = env.session_id
                (told,) = await drive(env, 1, 3)
                await until(lambda: len(viewer.of(f"{session}.0.{number}")) == 40, "all of it is seen")
                same(viewer.of(f"{session}.0.{number}"), told)
            await drive(env, 2, 4)
        await stored(m, f"{session}.0.{number + 2}")
        for n in range(number + 3):
            assert (await m.verify(f"{session}.0.{n}")).status == "exact"


async def test_a_session_that_begins_while_somebody_watches_is_seen_from_its_first_step(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url, record="actions"), Mesh(url) as m:
        async with await m.env("of") as first, watching(m, env="of") as viewer:
            await seen(viewer, first)
            async with await m.env("of") as env:
                (told,) = await drive(env, 1, 2)
                id_ = f"{env.session_id}.0.0"
                await until(lambda: len(viewer.of(id_)) == len(told.actions), "all of it is seen")
                same(viewer.of(id_), told)


async def test_a_slow_session_is_seen_step_by_step_and_not_in_bursts(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m, Mesh(url) as other:
        async with await m.env("of") as env, watching(other, env="of") as viewer:
            await seen(viewer, env)
            await asyncio.sleep(1.0)  # nothing more is noted, so that only a step wakes whom shows it
            await env.reset()
            counts = set()
            for n in range(16):
                _, _, terminated, truncated, _ = await env.step(n % 2)
                if terminated or truncated:
                    await env.reset()
                await asyncio.sleep(0.1)
                counts.add(len(viewer.seen))
            assert len(counts) >= 6, "once a second would be two or three times"


async def test_who_does_not_keep_up_is_cut_off_and_stops_nobody(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url, record="full"), Mesh(url) as m:
        async with await m.env("of") as env, aclosing(tapped(context_of(m), "of", None, 20_000)) as shown:
            await env.reset(seed=1)
            first = asyncio.ensure_future(anext(shown))
            while not first.done():
                await drive(env, 1, 1)
                await asyncio.sleep(0.005)
            for n in range(30):  # and now it sleeps
                await drive(env, 4, n)
                await asyncio.sleep(0.05)
            with pytest.raises(ViewerCut) as raised:
                async for _ in shown:
                    pass
            assert raised.value.details["behind_bytes"] > 20_000
            await drive(env, 1, 1)


async def test_it_ends_with_the_mesh_and_nobody_is_shown_anything_then(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tap, "BELIEVED_S", 1.0)
    monkeypatch.setattr(tap, "SAID_S", 0.2)
    async with EnvWorker({"of": "CartPole-v1"}, url, record="actions") as worker, Mesh(url) as m:
        async with await m.env("of") as env:
            viewer = Viewer()
            async with Mesh(url) as other:
                task = asyncio.create_task(viewer.watch(other))
                await seen(viewer, env)
            await asyncio.wait_for(task, 10.0)
            assert viewer.over
            recorder = worker._records._recorder
            assert recorder is not None
            (writer,) = recorder._writers.values()
            await until(lambda: not writer.transcript.watched, "it is recorded as before")
            assert writer._tap is None


async def test_what_is_not_recorded_is_not_shown(url: str) -> None:
    async with EnvWorker(dict.fromkeys(("off", "on"), "CartPole-v1"), url), Mesh(url) as m:
        async with (
            await m.env("off", record="off") as unseen,
            await m.env("on", record="actions") as env,
            watching(m) as viewer,
        ):
            await unseen.reset(seed=1)
            await unseen.step(0)
            await seen(viewer, env)
            assert {one.env for one in viewer.seen} == {"on"}


class Pictures(gymnasium.Env[Any, Any]):
    """Forty pictures an episode, in always the same array."""

    observation_space = spaces.Box(0, 255, (40, 40, 3), np.uint8)
    action_space = spaces.Discrete(4)
    metadata = {"outlives_reset": "generator"}

    def __init__(self) -> None:
        self._picture = np.zeros((40, 40, 3), np.uint8)
        self._left = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._left = 40
        self._picture[:] = self.np_random.integers(0, 256, self._picture.shape)
        return self._picture, {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        self._picture[action] = self._left
        return self._picture, 1.0, not self._left, False, {"left": self._left}


async def test_what_cannot_be_shown_ends_no_recording(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A description that is larger than a message may be."""
    publish = Connection.publish

    def refusing(connection: Connection, subject: str, body: bytes, *args: Any, **kwargs: Any) -> None:
        if subject.endswith(".about"):
            raise MessageTooLarge("of 2 MB")
        publish(connection, subject, body, *args, **kwargs)

    monkeypatch.setattr(Connection, "publish", refusing)
    async with EnvWorker({"of": "CartPole-v1"}, url) as worker, Mesh(url) as m:
        async with await m.env("of") as env, watching(m):
            for n in range(20):
                await drive(env, 1, n)
                await asyncio.sleep(0.05)
            session = env.session_id
        await stored(m, f"{session}.0.19")
        assert worker.recorded.lost == 0


async def test_what_fails_to_be_shown_is_recorded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise ValueError("no picture of it")

    monkeypatch.setattr(tapping.Tap, "show", failing)
    async with EnvWorker({"of": "CartPole-v1"}, url) as worker, Mesh(url) as m:
        async with await m.env("of") as env, watching(m):
            for n in range(20):
                await drive(env, 1, n)
                await asyncio.sleep(0.05)
            last = f"{env.session_id}.0.19"
        await stored(m, last)
        assert worker.recorded.lost == 0
        assert (await m.verify(last)).status == "exact"


async def test_a_session_is_watched_by_its_own_id_whatever_its_recording_is_called(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url) as worker, Mesh(url) as m:
        async with await m.env("of") as env, watching(m, session=env.session_id) as viewer:
            await env.reset()
            await until(lambda: worker._records._recorder is not None, "it is recorded")
            recorder = worker._records._recorder
            assert recorder is not None
            await until(lambda: bool(recorder._writers), "it is written")
            (writer,) = recorder._writers.values()
            messages = writer._messages
            messages.recorded = messages.recorded.model_copy(update={"session": f"{env.session_id}-2"})
            await seen(viewer, env)

            async def is_known() -> bool:
                await drive(env, 1, None)
                return viewer.seen[-1].session == f"{env.session_id}-2"

            await until(is_known, "its episodes have the ids that they will be asked for by")

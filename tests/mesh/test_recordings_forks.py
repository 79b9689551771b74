"""Forks of recorded episodes: from any step on, the recorded actions lead to the recorded rest."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import pytest

from meshrl import EnvWorker, Mesh, RemoteEnv
from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.learners import ToldEpisode, batch_of, of_all, play_one, play_pool, play_vector
from tests.mesh.losing import Workers
from tests.mesh.recordings import copied, listed, listed_in_the_end
from tests.mesh.test_recordings_restart import OPTIONS, SERVED
from tests.mesh.test_vector_parity import different


async def go_on(env: RemoteEnv, told: ToldEpisode, infos: list[Any], at: int, until: int | None = None) -> None:
    """Take the actions that were taken after some steps; all that is told must be what was told then."""
    spaces = told.spaces[0]
    before, *_, info = env.last()
    pair = (before, told.obs[at]) if told.infos else (batch_of(spaces, [before]), batch_of(spaces, [told.obs[at]]))
    assert not different([info, pair[0]], [infos[at], pair[1]], f"after {at} steps")
    for n in range(at, len(told.rewards) if until is None else until):
        obs, *facts, info = await env.step(told.actions[n])
        assert facts == [told.rewards[n], told.terminations[n], told.truncations[n]]
        # A vector tells its own types of observations, of the same values.
        pair = (obs, told.obs[n + 1]) if told.infos else (batch_of(spaces, [obs]), batch_of(spaces, [told.obs[n + 1]]))
        assert not different([info, pair[0]], [infos[n + 1], pair[1]], f"step {n + 1}")


async def test_recorded_actions_lead_to_the_recorded_rest(url: str) -> None:
    levels = cycle(("actions", "full"))
    async with EnvWorker(SERVED, url, record="actions"), Mesh(url) as m:
        for name in SERVED:
            forms: list[Any] = [play_one, play_vector, play_pool]
            played = [form(m, name, next(levels), 90, options=OPTIONS[name]) for form in forms]
            tolds = [one.episodes for one in await asyncio.gather(*played)]
            count = sum(map(len, tolds))
            await listed(m, name, count)
            # With a seed, and without: of the single env, and of one that is not the first of the others.
            chosen = [*list(tolds[0].items())[:3], *(list(one.items())[n] for one in tolds[1:] for n in (1, -2))]
            for id_, told in chosen:
                infos = list((await m.episode(id_)).infos)
                size = len(told.rewards)
                for at in (0, 1, size // 2, size, None):
                    async with await m.fork(id_, at) as env:
                        await go_on(env, told, infos, size if at is None else at)
                        following = f"{id_[: id_.rindex('.')]}.{int(id_.rpartition('.')[2]) + 1}"
                        if at == size and following in tolds[0] and tolds[0][following].options is None:
                            obs, info = await env.reset()
                            after = tolds[0][following]
                            assert not different([obs, info], [after.obs[0], after.infos[0]])
                    count += 1
            # Forks are sessions like any other, and recorded as their worker does.
            found = {one.episode_id for one in await listed_in_the_end(m, name, count)}
            again = await of_all(m.verify, found - {id_ for one in tolds for id_ in one})
            assert len(again) >= 5 * len(chosen)
            assert {verdict.status for verdict in again.values()} == {"exact"}


async def test_many_forks_of_one_episode_go_their_own_ways_at_once(server: EmbeddedServer) -> None:
    with ExitStack() as stack:
        workers = Workers(server.url, stack)
        workers.start(2)
        async with Mesh(server.url) as m:
            episodes = (await play_one(m, "CartPole-v1", "actions", 150)).episodes
            await listed(m, "CartPole-v1", len(episodes))
            id_, told = max(list(episodes.items())[1:], key=lambda item: len(item[1].rewards))
            size = len(told.rewards)
            infos = list((await m.episode(id_)).infos)
            forks = await asyncio.gather(*(m.fork(id_, n * size // 16) for n in range(16)))
            others = await asyncio.gather(*(m.fork(id_, size // 4) for _ in range(16)))

            async def elsewhere(env: RemoteEnv, n: int) -> list[Any]:
                """Ways that differ in their fourth to seventh action."""
                return [copied(await env.step((n >> k) & 1 if k >= 0 else 1)) for k in range(-3, 4)]

            ends, _ = await asyncio.gather(
                asyncio.gather(*(elsewhere(env, n) for n, env in enumerate(others))),
                asyncio.gather(*(go_on(env, told, infos, n * size // 16) for n, env in enumerate(forks))),
            )
            assert len({one[-1][0].tobytes() for one in ends}) == 16
            async with await m.fork(id_, size // 4) as env:
                assert not different(await elsewhere(env, 5), ends[5])
            assert {env.worker for env in forks} == set(workers.running)
            await asyncio.gather(*(env.close() for env in (*forks, *others)))


@pytest.mark.parametrize("name", ["CartPole-v1", "Pictures"])
async def test_a_fork_outlives_its_worker_and_can_be_forked(server: EmbeddedServer, name: str) -> None:
    with ExitStack() as stack:
        workers = Workers(server.url, stack)
        workers.start(2)
        async with Mesh(server.url) as m:
            episodes = (await play_one(m, name, "actions", 80)).episodes
            await listed(m, name, len(episodes))
            for id_, told in list(episodes.items())[:2]:  # with a seed, and without
                infos, size = list((await m.episode(id_)).infos), len(told.rewards)
                async with await m.fork(id_, size // 3) as env:
                    await go_on(env, told, infos, size // 3, size // 2)
                    (copy,) = await env.fork(1)
                    async with copy:
                        await go_on(copy, told, infos, size // 2)
                    await workers.kill(env.worker)
                    workers.start()
                    await go_on(env, told, infos, size // 2)

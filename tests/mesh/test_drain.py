"""Workers that leave: their sessions go on at others, and nothing is lost, truncated or done twice (R11)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import gymnasium
import numpy as np
import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.context import context_of
from meshrl.client.env import RemoteEnv
from meshrl.client.moving import Moving
from meshrl.errors import LoginRefused, MeshError, SessionClosed, SessionLost, UsageError
from tests.mesh.conftest import until
from tests.mesh.losing import Workers, same
from tests.mesh.test_resume_pools import Alone, play
from tests.mesh.worker_process import WorkerProcess

DRAIN_S = 20.0


@pytest.fixture
def workers(server: EmbeddedServer) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(server.url, stack, drain_s=DRAIN_S)


def worker_of(env: RemoteEnv) -> str:
    return env._session.grant.worker


def arrives(session: Any) -> bool:
    """Whether it is being brought into its state at another worker."""
    return session._moving is not None and bool(session._moving.arriving)


def knows(session: Any) -> bool:
    """Whether it has heard that its worker leaves."""
    return session._moving is not None


def held_back(session: Any) -> asyncio.Event:
    """As long as that is not set, it is on its way to another worker; then it stays."""
    moving, stays = Moving(session), asyncio.Event()

    async def move() -> None:
        await stays.wait()
        moving.holds_back = False
        session.moved(away=False)

    moving.holds_back, session._moving = True, moving
    moving._task = asyncio.ensure_future(move())
    moving._task.add_done_callback(moving._ended)
    return stays


def moving(env: RemoteEnv) -> Any:
    """Its way from a worker that leaves."""
    return env._session._moving  # type: ignore[attr-defined]


async def replaced(m: Mesh, workers: Workers) -> None:
    """One more worker, which this client knows of."""
    workers.start()

    async def known() -> bool:
        return {each.worker for each in await m.envs()} >= set(workers.running)

    await until(known, "the new worker is known")


# --------------------------------------------------------------------------- under load


@pytest.mark.parametrize("name", ["CartPole-v1", "FrozenLake-v1"])
async def test_an_env_goes_on_at_another_worker_and_the_one_that_leaves_ends_at_once(
    server: EmbeddedServer, workers: Workers, name: str
) -> None:
    workers.start(2)
    local = gymnasium.make(name)
    async with Mesh(server.url) as m, await m.env(name) as env:
        local.action_space.seed(1)
        same(await env.reset(seed=3), local.reset(seed=3))
        for n in range(2):
            before = worker_of(env)
            leaving = asyncio.ensure_future(workers.drain(before))
            steps = 0
            while not leaving.done() or steps < 20:
                steps += 1
                action = local.action_space.sample()
                theirs = local.step(action)
                same(await env.step(action), theirs)
                if theirs[2] or theirs[3]:
                    same(await env.reset(), local.reset())
            assert leaving.result() == 0
            assert worker_of(env) != before, n
            await replaced(m, workers)


async def test_a_vector_goes_on_and_only_the_shards_of_the_worker_that_leaves_move(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(3)
    local = gymnasium.make_vec("CartPole-v1", 6, vectorization_mode="sync")
    async with Mesh(server.url) as m, await m.vector("CartPole-v1", 6, shards=2) as envs:
        local.action_space.seed(1)
        same(await envs.reset(seed=3), local.reset(seed=3))
        for _ in range(2):
            (first, _), (second, _) = envs.shards
            leaving = asyncio.ensure_future(workers.drain(first))
            steps = 0
            while not leaving.done() or steps < 30:
                steps += 1
                actions = local.action_space.sample()
                same(await envs.step(actions), local.step(actions))
            assert leaving.result() == 0
            assert envs.shards[0][0] != first
            assert envs.shards[1][0] == second, "nobody asked it to"
            await replaced(m, workers)


async def test_a_rolling_restart_of_all_workers_costs_a_pool_under_load_no_transition_and_no_episode(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(3)
    alone = Alone(lambda: gymnasium.make("CartPole-v1"), 12, 5)
    async with Mesh(server.url) as m, await m.pool("CartPole-v1", 12, shards=3) as pool:
        await pool.reset(seed=5)
        for id_ in list(workers.running):
            leaving = asyncio.ensure_future(workers.drain(id_))
            while not leaving.done():
                await play(pool, alone, 5)
            assert leaving.result() == 0
            assert id_ not in {worker for worker, _ in pool.shards}
            await replaced(m, workers)
            await play(pool, alone, 20)
        assert len(workers.running) == 3
    # Alone compares every row with a local env's; an episode that a loss had ended would have differed.
    assert alone.episodes.min() > 1


async def test_one_that_nobody_steps_moves_all_the_same(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.env("Tuned") as env, await m.pool("Tuned", 2, shards=1) as pool:
        await env.reset(seed=1)
        assert (await env.step(5))[0] == 5
        await pool.reset(seed=1)
        await pool.recv(min=2)
        await pool.send([2, 3], [0, 1])
        await asyncio.sleep(0.2)  # both are answered, and not received
        for id_ in {worker_of(env), pool.shards[0][0]}:
            assert await workers.drain(id_) == 0
            await replaced(m, workers)
        assert (await env.step(5))[0] == 10
        assert sorted((await pool.recv(min=2)).observations.tolist()) == [2, 3]
        await pool.send([10, 10], [0, 1])
        assert sorted((await pool.recv(min=2)).observations.tolist()) == [12, 13]


async def test_what_was_set_and_called_moves_too(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.env("Tuned") as env:
        await env.reset(seed=1)
        await env.set_attr("gain", 3)
        assert await env.call("double") == 6
        assert (await env.step(5))[0] == 30
        assert await workers.drain(worker_of(env)) == 0
        assert await env.get_attr("gain") == 6
        assert (await env.step(5))[0] == 60


# --------------------------------------------------------------------------- in the middle of something


async def test_a_step_under_way_is_waited_for_and_not_done_twice(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.env("Slow") as env:
        await env.reset(seed=1)
        for n in range(1, 40):  # the replay takes a second, in which the next one waits
            assert (await env.step(1))[0] == n
        leaving = asyncio.ensure_future(workers.drain(worker_of(env)))
        for n in range(40, 80):
            assert (await env.step(1))[0] == n
        assert await leaving == 0


async def test_a_step_that_was_cancelled_while_it_waited_is_settled_at_the_other_worker(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.env("Slow") as env:
        await env.reset(seed=1)
        for n in range(1, 40):
            assert (await env.step(1))[0] == n
        before = worker_of(env)
        leaving = asyncio.ensure_future(workers.drain(before))
        await until(lambda: arrives(env._session), "it arrives")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await env.step(1)
        obs, *_ = await env.settle()
        assert obs == 40
        assert worker_of(env) != before
        assert (await env.step(1))[0] == 41
        assert await leaving == 0


async def test_one_that_is_closed_while_it_moves_leaves_no_slot_taken(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m:
        env = await m.env("Slow")
        await env.reset(seed=1)
        for _ in range(50):
            await env.step(1)
        leaving = asyncio.ensure_future(workers.drain(worker_of(env)))
        session = env._session
        await until(lambda: arrives(session), "it arrives")
        stepping = asyncio.ensure_future(env.step(1))
        await asyncio.sleep(0.01)
        await env.close()
        with pytest.raises(SessionClosed):
            await stepping
        assert await leaving == 0
        await everything_is_free(m)


async def test_one_that_nobody_holds_any_more_while_it_moves_leaves_no_slot_taken(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url) as m:
        held = [await m.env("Slow")]
        await held[0].reset(seed=1)
        for _ in range(50):
            await held[0].step(1)
        leaving = asyncio.ensure_future(workers.drain(worker_of(held[0])))
        await until(lambda: arrives(held[0]._session), "it arrives")
        with pytest.warns(ResourceWarning, match="unclosed"):
            held.clear()
        assert await leaving == 0
        await everything_is_free(m)


async def everything_is_free(m: Mesh) -> None:
    async def free() -> bool:
        envs = await m.envs()
        return bool(envs) and all(each.free == each.slots for each in envs)

    await until(free, "every slot is free")


@pytest.mark.parametrize("form", ["env", "pool"])
async def test_a_worker_that_dies_while_it_leaves_costs_nothing_either(
    server: EmbeddedServer, workers: Workers, form: str
) -> None:
    workers.start(3)
    async with Mesh(server.url) as m:
        if form == "env":
            env = await m.env("Slow")
            await env.reset(seed=1)
            session: Any = env._session

            async def step() -> int:
                return int((await env.step(1))[0])
        else:
            pool = await m.pool("Slow", 1, shards=1)
            await pool.reset(seed=1)
            await pool.recv()
            (session,) = pool._sessions

            async def step() -> int:
                await pool.send([1], [0])
                return int((await pool.recv()).observations[0])

        for n in range(1, 40):
            assert await step() == n
        before = session.grant.worker
        workers.running[before].terminate()
        stepping = asyncio.ensure_future(step())
        await until(lambda: arrives(session), "it arrives")
        await workers.kill(before)
        assert await stepping == 40
        assert await step() == 41
        assert session.grant.worker != before


async def test_a_worker_that_dies_while_a_session_arrives_there_costs_nothing(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(3)
    async with Mesh(server.url) as m, await m.env("Slow") as env:
        await env.reset(seed=1)
        for n in range(1, 40):
            assert (await env.step(1))[0] == n
        before, session = worker_of(env), env._session
        workers.running[before].terminate()
        stepping = asyncio.ensure_future(env.step(1))
        await until(lambda: arrives(session), "it arrives")
        arrives_at = session.grant.worker
        assert arrives_at != before
        await workers.kill(arrives_at)
        assert (await stepping)[0] == 40
        assert (await env.step(1))[0] == 41
        assert "session_lost" not in (await env.step(1))[4]


# --------------------------------------------------------------------------- what cannot move


async def test_where_nobody_else_is_it_goes_on_until_the_worker_has_gone(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(drain_s=3.0)
    async with Mesh(server.url) as m, await m.env("Tuned") as env:
        await env.reset(seed=1)
        before = worker_of(env)
        leaving = asyncio.ensure_future(workers.drain(before))
        n = 0
        while not leaving.done():
            n += 1
            if n == 20:
                workers.start()
            assert (await env.step(1))[0] == n
        assert leaving.result() == 0
        assert worker_of(env) != before
        assert (await env.step(1))[0] == n + 1


async def test_one_that_never_does_the_same_twice_stays_and_is_told_when_its_worker_has_gone(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2, drain_s=2.0)
    async with Mesh(server.url) as m, await m.env("Random") as env:
        await env.reset(seed=1)
        await env.step(1)
        before = worker_of(env)
        leaving = asyncio.ensure_future(workers.drain(before))
        told: dict[str, Any] = {}
        while not leaving.done() and not told:
            _, _, _, truncated, info = await env.step(1)
            told = info.get("session_lost", {})
            assert truncated == bool(told)
            assert told or worker_of(env) == before
        assert await leaving == 0
        if not told:
            _, _, _, truncated, info = await env.step(1)
            assert truncated
            told = info["session_lost"]
        assert told["not_resumed"] == "replay_diverged"


async def test_one_whose_journal_is_of_no_use_moves_with_the_reset_that_needs_none(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2)
    async with Mesh(server.url) as m, await m.env("Tuned", on_loss="truncate") as env:
        await env.reset(seed=1)
        await env.set_attr("gain", 3)
        assert (await env.step(1))[0] == 3
        before = worker_of(env)
        leaving = asyncio.ensure_future(workers.drain(before))
        await until(lambda: knows(env._session), "it knows that its worker leaves")
        for n in range(2, 20):
            obs, _, _, _, info = await env.step(1)
            assert (obs, info) == (3 * n, {})
        obs, info = await env.reset()
        assert (worker_of(env), info) == (before, {}), "its generator goes on"
        obs, info = await env.reset(seed=2)
        assert worker_of(env) != before
        assert (obs, info) == (0, {})
        assert (await env.step(1))[0] == 3, "what was set goes along"
        assert await leaving == 0


async def test_after_a_call_nobody_knows_what_a_reset_leaves_so_it_stays(
    server: EmbeddedServer, workers: Workers
) -> None:
    workers.start(2, drain_s=2.0)
    async with Mesh(server.url) as m, await m.env("Tuned", on_loss="truncate") as env:
        await env.reset(seed=1)
        assert await env.call("double") == 2
        before = worker_of(env)
        leaving = asyncio.ensure_future(workers.drain(before))
        await until(lambda: knows(env._session), "it knows that its worker leaves")
        await env.reset(seed=2)
        assert worker_of(env) == before
        assert (await env.step(1))[0] == 2
        assert await leaving == 0
        obs, _, _, truncated, info = await env.step(1)
        assert (obs, truncated) == (2, True)
        assert info["session_lost"]["not_resumed"] == "not_asked_for"


async def test_one_that_is_to_be_told_of_losses_is_told_at_the_end(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2, drain_s=1.0)
    async with Mesh(server.url) as m, await m.env("Tuned", on_loss="raise") as env:
        await env.reset(seed=1)
        assert await workers.drain(worker_of(env)) == 0
        with pytest.raises(SessionLost):
            await env.step(1)


async def test_one_that_cannot_move_is_served_all_the_time(server: EmbeddedServer, workers: Workers) -> None:
    """Its first attempt came to another state; what waited meanwhile, and all that follows, is done where it is."""
    workers.start(2, drain_s=5.0)
    async with Mesh(server.url) as m, await m.env("Random") as env, await m.vector("Random", 2, shards=1) as envs:
        await env.reset(seed=1)
        await envs.reset(seed=1)
        before = worker_of(env)
        leaving = asyncio.ensure_future(workers.drain(before))
        steps = 0
        while not leaving.done():
            _, _, _, truncated, _ = await env.step(1)
            steps += not truncated
            await envs.step([1, 1])
        assert await leaving == 0
        assert steps > 100, "none of them waited for the worker's end"


@pytest.mark.parametrize("form", ["env", "vector"])
async def test_a_reset_where_nobody_else_has_room_is_done_where_it_is(
    server: EmbeddedServer, workers: Workers, form: str
) -> None:
    (leaves,) = workers.start()
    async with Mesh(server.url) as m:
        leased: Any = m.env("Slow", on_loss="truncate") if form == "env" else m.vector("Slow", 2, on_loss="truncate")
        async with await leased as env:
            workers.start(slots=1, capabilities={"full": True})
            async with await m.env("Slow", where={"full": True}):
                leaving = asyncio.ensure_future(workers.drain(leaves.id))
                session = env._session if form == "env" else env._sessions[0]
                await until(lambda: knows(session), "it knows that its worker leaves")
                for seed in range(3):
                    await env.reset(seed=seed)
                    assert session.grant.worker == leaves.id
                assert not leaving.done(), "none of them waited for the worker's end"
        assert await leaving == 0


async def test_where_others_have_another_env_it_moves_with_a_reset_that_has_a_seed(
    server: EmbeddedServer, workers: Workers
) -> None:
    """A rolling update of the env itself."""
    workers.start()
    with WorkerProcess(server.url, {"Tuned": "tests.mesh.resumed_envs:TunedOtherwise"}):
        async with Mesh(server.url) as m:
            old = next(iter(workers.running))
            envs = [await m.env("Tuned") for _ in range(2)]
            env = next(env for env in envs if worker_of(env) == old)
            await env.reset(seed=1)
            leaving = asyncio.ensure_future(workers.drain(old))
            await until(lambda: knows(env._session) and bool(moving(env)._unequal), "it knows that the other differs")
            for n in range(1, 10):
                assert (await env.step(1))[0] == n
            assert worker_of(env) == old
            obs, info = await env.reset(seed=2)
            assert worker_of(env) != old
            assert (obs, info) == (0, {})
            assert await leaving == 0
            for each in envs:
                await each.close()


async def test_a_pool_tells_a_loss_also_where_the_action_falls_into_a_move(
    server: EmbeddedServer, workers: Workers
) -> None:
    """The lane's episode was ended by a loss that it has not been told of; then its worker leaves."""
    workers.start(2)
    async with Mesh(server.url) as m, await m.pool("Random", 2, shards=1) as pool:
        await pool.reset(seed=1)
        await pool.recv(min=2)
        for _ in range(3):
            await pool.send([1, 1], [0, 1])
            await pool.recv(min=2)
        session = pool._sessions[0]
        await workers.kill(session.grant.worker)
        await pool.send([1], [0])
        batch = await pool.recv()
        assert (batch.env_ids.tolist(), batch.truncations.tolist()) == ([0], [True])
        held = held_back(session)
        await pool.send([1], [1])
        batch = await pool.recv()
        assert (batch.env_ids.tolist(), batch.truncations.tolist()) == ([1], [True])
        assert "session_lost" in batch.infos
        await pool.send([1], [1])
        held.set()
        await pool.send([1], [0])
        batch = await pool.recv(min=2)
        assert batch.steps.tolist() == [1, 1]


async def test_what_waited_is_told_when_the_connection_ends_for_good(server: EmbeddedServer, workers: Workers) -> None:
    workers.start(2)
    async with Mesh(server.url) as m:
        env, pool = await m.env("Tuned"), await m.pool("Tuned", 1, shards=1)
        await env.reset(seed=1)
        await pool.reset(seed=1)
        await pool.recv()
        holding = [held_back(session) for session in (env._session, pool._sessions[0])]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await env.step(1)
        await pool.send([1], [0])
        context_of(m).connection.give_up(LoginRefused("the login was taken back"))
        for held in holding:
            held.set()
        async with asyncio.timeout(5.0):
            with pytest.raises(MeshError):
                await env.settle()
            with pytest.raises(MeshError):
                await pool.recv()


# --------------------------------------------------------------------------- at the worker


async def test_a_worker_that_does_not_serve_yet_cannot_leave(server: EmbeddedServer) -> None:
    worker = EnvWorker({"CartPole-v1": "CartPole-v1"}, server.url)
    with pytest.raises(UsageError, match="once it serves"):
        worker.leave(1.0)
    async with worker:
        worker.leave(0.0)
        await worker.serve_forever()


async def test_a_worker_without_sessions_goes_at_once(server: EmbeddedServer, workers: Workers) -> None:
    (worker,) = workers.start(drain_s=600.0)
    assert await workers.drain(worker.id) == 0


async def test_acts_that_a_worker_has_taken_are_answered_before_it_goes(server: EmbeddedServer) -> None:
    agents = {"slow": "tests.mesh.draining_agents:slow"}
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(WorkerProcess(server.url, agents, kind="agent", drain_s=DRAIN_S)) for _ in range(2)
        )
        async with Mesh(server.url) as m:
            agent = await m.agent("slow")
            acting = [asyncio.ensure_future(agent.act(np.int64(n))) for n in range(40)]
            await asyncio.sleep(0.05)
            first.terminate()
            later = []
            for n in range(40, 80):
                later.append(asyncio.ensure_future(agent.act(np.int64(n))))
                await asyncio.sleep(0.005)
            assert [int(each) for each in await asyncio.gather(*acting, *later)] == list(range(80))
            assert await asyncio.to_thread(first.ended) == 0
            assert context_of(m).connection.connected
            assert second.running

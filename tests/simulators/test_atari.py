"""Atari games go on elsewhere from resets without a seed, to the bit, where workers have a key (R8)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import gymnasium
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from meshrl import Mesh
from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import MalformedMessage
from meshrl.wire.codec import pack
from meshrl.worker.atari import state_of
from meshrl.worker.describe import describe_env
from meshrl.worker.origins import Outliving, outliving
from meshrl.worker.sealing import StateKey
from tests.mesh.losing import same
from tests.mesh.test_cli import Cli, cli, read_until
from tests.mesh.test_resume_pools import Alone, play
from tests.mesh.worker_process import WorkerProcess
from tests.simulators.atari_envs import breakout, make, pong, preprocessed

KEY = StateKey(b"k" * 32)
ENVS = "tests.simulators.atari_envs"
__all__ = ["cli"]  # a fixture
Make = Callable[[], gymnasium.Env[Any, Any]]


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as started:
        yield started


def kept_of(env: Any, key: StateKey = KEY) -> Outliving:
    kept = outliving(env, key)
    assert kept is not None
    return kept


def played(env: Any, steps: int, seed: int) -> list[bytes]:
    """What steps with actions drawn from a seed tell, infos too, through as many episodes as they take."""
    actions = gymnasium.spaces.Discrete(env.action_space.n, seed=seed)
    told = []
    for _ in range(steps):
        *outcome, terminated, truncated, info = env.step(actions.sample())
        told.append(pack([*outcome, terminated, truncated, info]))
        if terminated or truncated:
            told.append(pack(list(env.reset())))
    return told


GAMES: list[Any] = [
    pytest.param(partial(make, game, obs_type=obs_type), id=f"{game} {obs_type}")
    for game in ("Breakout", "Pong", "Seaquest")
    for obs_type in ("rgb", "grayscale", "ram")
]
GAMES += [
    pytest.param(partial(make, "Breakout", obs_type="ram", max_num_frames_per_episode=None), id="whole episodes"),
    pytest.param(partial(make, "Freeway", obs_type="ram", mode=3, difficulty=1), id="mode and difficulty"),
    pytest.param(pong, id="frame skips that are drawn"),
    pytest.param(preprocessed, id="preprocessed"),
]


@pytest.mark.parametrize("made", GAMES)
def test_a_fresh_game_goes_on_from_the_state_of_another(made: Make) -> None:
    env, fresh = made(), made()
    env.reset(seed=5)
    played(env, 250, seed=1)
    kept_of(fresh).put(kept_of(env).get())
    assert pack(list(fresh.reset())) == pack(list(env.reset()))
    theirs = played(env, 450, seed=2)
    assert played(fresh, 450, seed=2) == theirs
    assert len(theirs) > 451, "several episodes"
    env.close()
    fresh.close()


def test_how_often_nothing_is_done_at_first_is_drawn_by_a_generator_that_goes_with_it() -> None:
    def began() -> set[int]:
        fresh, numbers = preprocessed(), set()
        kept_of(fresh).put(state)
        for _ in range(3):
            numbers.add(fresh.reset()[1]["frame_number"])
        return numbers

    env = preprocessed()
    env.reset(seed=5)
    state = kept_of(env).get()
    assert began() == began() == {env.reset()[1]["frame_number"] for _ in range(3)}


def test_a_state_that_no_worker_sealed_does_not_reach_the_emulator() -> None:
    env = breakout()
    env.reset(seed=5)
    sealed = kept_of(env).get()
    flipped = bytearray(sealed)
    flipped[500] ^= 1
    elsewhere = make("Pong", obs_type="ram")
    elsewhere.reset(seed=5)
    foreign = [sealed[:-1], sealed[32:], bytes(flipped), b"", kept_of(elsewhere).get()]
    foreign += [kept_of(env, StateKey(b"o" * 32)).get(), None]  # type: ignore[list-item]  # whatever a client sends
    before = state_of(env.unwrapped)
    for bad in foreign:
        with pytest.raises(MalformedMessage):
            kept_of(env).put(bad)
    assert state_of(env.unwrapped) == before


def test_only_resets_with_a_seed_count_without_a_key_or_with_sound_or_in_an_unknown_class() -> None:
    class Derived(type(breakout().unwrapped)):  # type: ignore[misc]
        """One of ALE's with something more, for all that is known."""

    assert outliving(breakout()) is None
    assert outliving(make("Breakout", obs_type="ram", sound_obs=True), KEY) is None
    assert outliving(Derived("breakout"), KEY) is None


def test_workers_with_other_keys_are_no_equals() -> None:
    def fingerprint(made: Any, key: StateKey | None) -> str:
        return describe_env(
            made,
            name="game",
            worker="w1",
            capabilities={},
            allow_kwargs=(),
            allow=(),
            step_deadline_s=1.0,
            state_key_id=None if key is None else key.id,
        ).fingerprint

    other = StateKey(b"o" * 32)
    assert len({fingerprint(breakout(), key) for key in (None, KEY, other)}) == 3
    assert len({fingerprint(gymnasium.make("CartPole-v1"), key) for key in (None, KEY, other)}) == 1


# --------------------------------------------------------------------------- on a mesh


def started(stack: ExitStack, server: EmbeddedServer, count: int, **kwargs: Any) -> dict[str, WorkerProcess]:
    served = {name: f"{ENVS}:{name}" for name in ("breakout", "pong", "preprocessed")}
    workers = [stack.enter_context(WorkerProcess(server.url, served, wait=False, **kwargs)) for _ in range(count)]
    return {worker.wait_advertised(): worker for worker in workers}


@pytest.mark.parametrize(
    ("name", "isolation", "key"),
    [
        ("breakout", "thread", KEY),
        ("breakout", "process", KEY),
        ("breakout", "thread", None),
        ("pong", "thread", KEY),
        ("preprocessed", "thread", KEY),
    ],
)
async def test_a_game_outlives_its_worker_across_resets_without_a_seed(
    server: EmbeddedServer, name: str, isolation: str, key: StateKey | None
) -> None:
    local = {"breakout": breakout, "pong": pong, "preprocessed": preprocessed}[name]()
    local.action_space.seed(5)
    with ExitStack() as stack:
        by_id = started(stack, server, 2, isolation=isolation, state_key=key)
        async with Mesh(server.url) as m, await m.env(name) as env:
            same(await env.reset(seed=5), local.reset(seed=5))
            episodes = steps = 0
            while episodes < 6:
                if (episodes, steps) == (4, 20):
                    await asyncio.to_thread(by_id[env.worker].kill)
                same(await env.step(action := local.action_space.sample()), theirs := local.step(action))
                steps += 1
                if theirs[2] or theirs[3]:
                    same(await env.reset(), local.reset())
                    episodes, steps = episodes + 1, 0
            journal: Any = env._session.recovery.journal  # type: ignore[attr-defined]
            assert len(journal) == 1 if key else len(journal) > 200
    local.close()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("key", [KEY, None], ids=["a key", "no key"])
async def test_vectors_of_games_outlive_their_workers_across_autoresets(
    server: EmbeddedServer, mode: AutoresetMode, key: StateKey | None
) -> None:
    local = SyncVectorEnv([breakout] * 4, autoreset_mode=mode)
    local.action_space.seed(5)
    with ExitStack() as stack:
        by_id = started(stack, server, 3, state_key=key)
        async with Mesh(server.url) as m, await m.vector("breakout", 4, shards=2, autoreset_mode=mode) as envs:
            same(await envs.reset(seed=5), local.reset(seed=5))
            for n in range(330):
                if n == 260:
                    await asyncio.to_thread(by_id[envs.shards[0][0]].kill)
                actions = local.action_space.sample()
                same(await envs.step(actions), local.step(actions))
            sessions: Any = envs._sessions
            for session in sessions:
                journal = session._recovery.journal
                assert len(journal) < 200 if key else len(journal) > 330
    local.close()


async def test_a_pool_of_games_outlives_its_worker(server: EmbeddedServer) -> None:
    alone = Alone(breakout, 2, 5)
    with ExitStack() as stack:
        by_id = started(stack, server, 2, state_key=KEY)
        async with Mesh(server.url) as m, await m.pool("breakout", 2, shards=1) as pool:
            await pool.reset(seed=5)
            await play(pool, alone, 150, least=1)
            # Rounds of both: journals begin anew at the first resets after so many steps of each.
            await play(pool, alone, 260, least=2)
            await asyncio.to_thread(by_id[pool.shards[0][0]].kill)
            await play(pool, alone, 60, least=1)
            journal: Any = pool._sessions[0].recovery.journal  # type: ignore[attr-defined]
            assert len(journal) < 300, "of 470 rounds"
    assert alone.episodes.min() > 2


async def test_a_worker_with_another_key_is_not_asked_to_go_on(server: EmbeddedServer) -> None:
    with ExitStack() as stack:
        by_id = started(stack, server, 1, state_key=KEY)
        async with Mesh(server.url) as m, await m.env("breakout", wait=2.0) as env:
            await env.reset(seed=5)
            await env.step(1)
            await env.reset()
            others = await asyncio.to_thread(started, stack, server, 1, state_key=StateKey(b"o" * 32))
            await asyncio.to_thread(by_id[env.worker].kill)
            *_, truncated, info = await env.step(1)
            assert truncated
            assert info["session_lost"]["not_resumed"] == "no_worker"
            await env.reset()
            assert env.worker in others


@pytest.mark.parametrize(
    ("line", "sealed"),
    [
        (["serve", f"breakout={ENVS}:breakout", "--processes", "2", "--state-key", "mine.key"], True),
        (["serve", f"breakout={ENVS}:breakout"], False),
        (["up", "--workers", "1"], True),
    ],
    ids=["serve with a key", "serve without", "up"],
)
async def test_commands_hand_the_key_to_their_workers(
    cli: Cli, server: EmbeddedServer, line: list[str], sealed: bool
) -> None:
    (cli.directory / "mine.key").write_text("k" * 32)
    url = server.url
    if line[0] == "serve":
        process = cli.start(*line, MESHRL_URL=url)
        await asyncio.to_thread(read_until, process.stdout, "serving")
    else:
        process = cli.start(*line)
        printed = await asyncio.to_thread(read_until, process.stdout, "Ctrl-C ends it")
        url = next(text.strip().removeprefix("MESHRL_URL=") for text in printed if "MESHRL_URL=" in text)
    async with Mesh(url) as m, await m.env("breakout" if line[0] == "serve" else "ale_py:ALE/Breakout-v5") as env:
        await env.reset(seed=5)
        await env.reset()
        journal: Any = env._session.recovery.journal  # type: ignore[attr-defined]
        assert [len(body) > 14_000 for _, body in journal.entries] == ([True] if sealed else [False, False])
    process.terminate()
    await asyncio.to_thread(process.communicate)

"""A Minari dataset becomes recordings: the same arrays by every way there is to them, once, whatever goes wrong."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer

from meshrl import EnvWorker, Mesh
from meshrl.adapters.datasets import Progress, export_minari, import_minari
from meshrl.errors import MalformedMessage, UsageError
from meshrl.recording.streams import Retention
from tests.exports.envs import Odd, Wide
from tests.exports.episodes import alike
from tests.mesh.envs import Nested
from tests.mesh.recordings import drive, listed


async def recorded(m: Mesh, served: str, level: Any, episodes: int = 3, max_steps: int = 20) -> None:
    async with await m.env(served, record=level, labels={"run": "a"}, policy="dqn") as env:
        env.policy_version = 3
        for n in range(episodes):
            await drive(env, 1, 7 + n, max_steps=max_steps)
    await listed(m, served, episodes)


async def same_recordings(m: Mesh, one: str, other: str) -> None:
    ones = [summary async for summary in m.episodes(one)]
    others = [summary async for summary in m.episodes(other)]
    assert [(a.steps, a.reason) for a in ones] == [(b.steps, b.reason) for b in others]
    for a, b in zip(ones, others, strict=True):
        mine, theirs = await m.episode(a.episode_id), await m.episode(b.episode_id)
        for name in ("rewards", "terminations", "truncations", "policy_versions", "seed", "options"):
            assert alike(getattr(mine, name), getattr(theirs, name)), name
        assert all(map(alike, mine.infos, theirs.infos))
        for t, u in zip(mine.transitions(), theirs.transitions(), strict=True):
            assert alike(t.observation, u.observation)
            assert alike(t.action, u.action)
            assert alike(t.next_observation, u.next_observation)
        assert not theirs.remade


def same_datasets(one: str, other: str) -> None:
    ones, others = minari.load_dataset(one), minari.load_dataset(other)
    assert (ones.observation_space, ones.action_space) == (others.observation_space, others.action_space)
    assert ones.env_spec == others.env_spec
    for a, b in zip(ones, others, strict=True):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            assert alike(getattr(a, name), getattr(b, name)), name
        keys = [{key for key in infos if not key.startswith("meshrl")} for infos in (a.infos, b.infos)]
        assert keys[0] == keys[1]
        assert all(np.asarray(a.infos[key]).tolist() == np.asarray(b.infos[key]).tolist() for key in keys[0] - {"sums"})


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
@pytest.mark.parametrize(("env", "level"), [("CartPole-v1", "actions"), (Nested, "full"), (Odd, "full")])
async def test_what_was_exported_comes_back_and_goes_out_the_same(
    url: str, datasets: Path, env: Any, level: Any, storage: Any
) -> None:
    served = f"from-{getattr(env, '__name__', env)}-{storage}"
    async with EnvWorker({served: env}, url), Mesh(url) as m:
        await recorded(m, served, level)
        await export_minari(m, m.episodes(served), "of-tests/out-v0", storage=storage)
        seen: list[Progress] = []
        told = await import_minari(m, "of-tests/out-v0", f"{served}-back", labels={"b": "c"}, on_progress=seen.append)
        assert (told.episodes, told.already) == (3, False)
        assert [(p.phase, p.episodes) for p in seen] == [(w, n) for w in ("reading", "writing") for n in (1, 2, 3)]
        labels = {"run": "a", "b": "c", "imported": "of-tests/out-v0"}
        found = await listed(m, f"{served}-back", 3, labels=labels, policy="dqn")
        assert {one.episode_id.rpartition(".0.")[0] for one in found} == {told.session}
        await same_recordings(m, served, f"{served}-back")
        await export_minari(m, m.episodes(f"{served}-back"), "of-tests/out-v1", storage=storage)
        same_datasets("of-tests/out-v0", "of-tests/out-v1")


async def test_what_has_all_that_it_needs_is_verified(url: str, datasets: Path) -> None:
    async with EnvWorker({"CartPole-v1": "CartPole-v1"}, url), Mesh(url, namespace="default") as m:
        await recorded(m, "CartPole-v1", "full")
        await export_minari(m, m.episodes("CartPole-v1"), "all-v0")
        told = await import_minari(m, "all-v0")
        assert told.env == "CartPole-v1"
        verdicts = [await m.verify(f"{told.session}.0.{n}") for n in range(3)]
        assert [one.status for one in verdicts] == ["exact"] * 3


def foreign(dataset_id: str, episodes: list[EpisodeBuffer], **kwargs: Any) -> None:
    """A dataset that somebody else made, as Minari's documentation has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it asks for authors and the like
        minari.create_dataset_from_buffers(
            dataset_id,
            buffer=episodes,
            observation_space=spaces.Box(-1, 1, (2,), np.float32),
            action_space=spaces.Discrete(2),
            **kwargs,
        )


def buffer(steps: int, *, ends: bool = True, seed: int | None = None, first: bool = False) -> EpisodeBuffer:
    rng = np.random.default_rng(steps)
    flags = np.array([False] * (steps - 1) + [ends])
    return EpisodeBuffer(
        seed=seed,
        observations=rng.random((steps + 1, 2), np.float32),
        actions=rng.integers(0, 2, steps),
        rewards=rng.random(steps, np.float32),
        terminations=np.array([True, *flags[1:]]) if first else flags,
        truncations=np.zeros(steps, np.bool_),
        infos={"at": list(range(steps + 1)), "deep": {"said": ["x"] * (steps + 1)}},
    )


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
async def test_a_dataset_of_somebody_else_is_read_by_every_way(url: str, datasets: Path, data_format: str) -> None:
    made = [buffer(3), buffer(5, ends=False), buffer(4, ends=False)]
    foreign("theirs-v0", made, data_format=data_format, env="CartPole-v1", algorithm_name="sac")
    name = f"CartPole-v1-{data_format}"
    async with EnvWorker({name: "CartPole-v1"}, url), Mesh(url) as m:
        told = await import_minari(m, str(datasets / "theirs-v0"), name)
        found = await listed(m, name, 3)
        assert [(one.steps, one.reason, one.policy) for one in found] == [
            (3, "terminated", "sac"),
            (5, "reset", "sac"),
            (4, "closed", "sac"),
        ]
        for one, summary in zip(made, found, strict=True):
            episode = await m.episode(summary.episode_id)
            assert alike(episode.observations, one.observations)
            assert alike(episode.actions, one.actions)
            assert episode.rewards.tolist() == np.asarray(one.rewards).tolist()
            assert [info["at"] for info in episode.infos] == list(range(len(one) + 1))
            if data_format == "hdf5":
                assert episode.infos[1]["deep"] == {"said": "x"}
            verdict = await m.verify(summary.episode_id)
            assert (verdict.status, verdict.reasons) == ("unverifiable", ("imported",))
        (batch,) = [one async for one in m.experience(name, follow=False)]
        assert alike(batch.observations, np.concatenate([one.observations[:-1] for one in made]))
        assert alike(batch.next_observations, np.concatenate([one.observations[1:] for one in made]))
        assert set(batch.episode_ids) == {f"{told.session}.0.{n}" for n in range(3)}


async def test_with_a_seed_it_is_run_again_and_never_said_to_diverge(url: str, datasets: Path) -> None:
    foreign("seeded-v0", [buffer(3, seed=4)])
    async with EnvWorker({"seeded": Wide}, url), Mesh(url) as m:
        with pytest.raises(UsageError, match="--env"):
            await import_minari(m, "seeded-v0")
        async with EnvWorker({"seeded": "CartPole-v1"}, url):
            told = await import_minari(m, "seeded-v0", "seeded")
    async with EnvWorker({"seeded": "CartPole-v1"}, url), Mesh(url) as m:
        verdict = await m.verify(f"{told.session}.0.0")
        assert verdict.status == "unverifiable"
        assert "imported" in verdict.reasons


async def test_it_is_there_once_unless_asked_again(url: str, datasets: Path) -> None:
    foreign("once-v0", [buffer(3), buffer(4)])
    async with Mesh(url) as m:
        first = await import_minari(m, "once-v0", "once")
        second = await import_minari(m, "once-v0", "once")
        assert (second.session, second.already, second.episodes) == (first.session, True, 2)
        await listed(m, "once", 2)
        third = await import_minari(m, "once-v0", "once", again=True)
        assert third.session != first.session
        assert not third.already
        await listed(m, "once", 4)
        other = await import_minari(m, "once-v0", "other")
        assert other.session != first.session
        await listed(m, "other", 2)


async def test_one_that_was_cut_off_goes_on_where_it_stopped(url: str, datasets: Path) -> None:
    class Cut(Exception):
        pass

    def cut(done: Progress) -> None:
        if done.phase == "writing" and done.episodes == 40:
            raise Cut

    episodes = [buffer(400 + n, ends=n % 2 == 0) for n in range(60)]
    for one in episodes:  # what compresses little fills chunks
        assert one.infos is not None
        one.infos["noise"] = np.random.default_rng(len(one)).integers(0, 256, (len(one) + 1, 100), np.uint8)
    foreign("cut-v0", episodes)
    async with Mesh(url) as m:
        with pytest.raises(Cut):
            await import_minari(m, "cut-v0", "cut", on_progress=cut)
        there = [one async for one in m.episodes("cut")]
        assert 0 < len(there) < 60
        told = await import_minari(m, "cut-v0", "cut")
        assert not told.already
        found = await listed(m, "cut", 60)
        assert {one.episode_id for one in there} < {one.episode_id for one in found}
        for one, summary in list(zip(episodes, found, strict=True))[::7]:
            episode = await m.episode(summary.episode_id)
            assert alike(episode.observations, one.observations)
            assert [info["at"] for info in episode.infos] == list(range(len(one) + 1))


async def test_two_that_import_the_same_at_once_do_not_double_it(url: str, datasets: Path) -> None:
    foreign("twice-v0", [buffer(30 + n) for n in range(20)])
    async with Mesh(url) as m, Mesh(url) as n:
        done = await asyncio.gather(
            *(import_minari(one, "twice-v0", "twice") for one in (m, n)), return_exceptions=True
        )
        assert any(not isinstance(one, BaseException) for one in done)
        await import_minari(m, "twice-v0", "twice")
        found = await listed(m, "twice", 20)
        for number, summary in enumerate(found):
            assert alike((await m.episode(summary.episode_id)).observations, buffer(30 + number).observations)


async def test_what_is_no_episode_stops_it_or_is_left_out(url: str, datasets: Path) -> None:
    foreign("broken-v0", [buffer(3), buffer(5, first=True), buffer(4)])
    async with Mesh(url) as m:
        with pytest.raises(MalformedMessage, match="episode 1 of broken-v0"):
            await import_minari(m, "broken-v0", "broken")
        assert not [one async for one in m.episodes("broken")]
        told = await import_minari(m, "broken-v0", "broken", skip_unreadable=True)
        assert (told.episodes, [one.episode_id for one in told.skipped]) == (2, ["1"])
        assert [one.steps for one in await listed(m, "broken", 2)] == [3, 4]
        with pytest.raises(UsageError, match="minari list local"):
            await import_minari(m, "absent-v0", "broken")


async def test_a_stream_that_keeps_less_than_there_is_is_said_to(url: str, datasets: Path) -> None:
    noisy = [buffer(300 + n) for n in range(10)]
    for one in noisy:
        assert one.infos is not None
        one.infos["noise"] = np.random.default_rng(len(one)).integers(0, 256, (len(one) + 1, 1000), np.uint8)
    foreign("large-v0", noisy)
    async with Mesh(url) as m:
        with pytest.raises(UsageError, match="--record-bytes"):
            await import_minari(m, "large-v0", "large", retention=Retention(max_bytes=1 << 20))

"""Learners that keep what they are told, episode by episode, in whatever form they hold their envs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from meshrl import Mesh
from meshrl.client.episode import Episode
from tests.mesh.recordings import Told, copied
from tests.mesh.test_vector_parity import different

Spaces = tuple[gymnasium.Space[Any], gymnasium.Space[Any]]
Options = dict[str, Any] | None
# What happens meanwhile: it is given the env, vector or pool, and how many steps or results there were.
Meanwhile = Callable[[Any, int], Awaitable[None]]
T = TypeVar("T")


@dataclass
class ToldEpisode(Told):
    """An episode as its learner saw it.

    Attributes:
        env: the served name.
        spaces: of observations and of actions.
        options: of its reset.
        seed: of its reset, where the learner gave one.
    """

    env: str = field(kw_only=True)
    spaces: Spaces = field(kw_only=True)
    options: Options = field(kw_only=True)
    seed: int | None = field(kw_only=True)

    def stepped(self, action: Any, obs: Any, reward: Any, terminated: Any, truncated: Any) -> None:
        self.actions.append(copied(action))
        self.obs.append(copied(obs))
        self.rewards.append(float(reward))
        self.terminations.append(bool(terminated))
        self.truncations.append(bool(truncated))

    def check(self, episode: Episode) -> None:
        """Whether a recorded episode is the same, to the bit, dtype and type; infos of vectors apart."""
        (observations, actions), size = self.spaces, len(self.rewards)
        told = {
            "env": self.env,
            "options": self.options,
            "seed": episode.seed if self.seed is None else self.seed,
            "observation_space": observations,
            "action_space": actions,
            "observations": batch_of(observations, self.obs),
            "actions": batch_of(actions, self.actions),
            "rewards": np.array(self.rewards, np.float64),
            "terminations": np.array(self.terminations, np.bool_),
            "truncations": np.array(self.truncations, np.bool_),
        }
        if self.infos:
            told["infos"] = self.infos
        found = [different(getattr(episode, name), value, name) for name, value in told.items()]
        assert not any(found), f"{episode.episode_id} {episode.recorded.form}: {[*filter(None, found)]}"
        assert len(episode) == size


class Row(NamedTuple):
    """Of an answer to a vector or pool.

    Attributes:
        episode: whose info it has.
        step: of that; 0 is the reset.
        ended: the episode that has ended with it, where another has begun.
        final_obs: that of the step that ended it.
    """

    episode: str
    step: int
    ended: str = ""
    final_obs: Any = None


@dataclass
class Learned:
    """All that learners were told.

    Attributes:
        episodes: those that have steps, by their ids.
        answers: to vectors and pools, their merged infos with the rows of which they are.
    """

    episodes: dict[str, ToldEpisode] = field(default_factory=dict)
    answers: list[tuple[dict[str, Any], list[Row | None]]] = field(default_factory=list)

    def add(self, other: Learned) -> None:
        self.episodes |= other.episodes
        self.answers += other.answers

    def check(self, read: Mapping[str, Episode]) -> None:
        """Whether what was read of all of them is the same."""
        for id_, told in self.episodes.items():
            told.check(read[id_])
        compared = 0
        for infos, rows in self.answers:
            vector: VectorEnv[Any, Any, Any] = VectorEnv()
            vector.num_envs = len(rows)
            again: dict[str, Any] = {}
            if any(row is not None and row.episode not in read for row in rows):
                continue  # one has begun that was not stepped any more, and is not listed
            for k, row in enumerate(rows):
                if row is None:
                    continue
                if row.ended:
                    final = read[row.ended].infos[-1]
                    again = vector._add_info(again, {"final_obs": row.final_obs, "final_info": final}, k)
                again = vector._add_info(again, read[row.episode].infos[row.step], k)
            found = different(again, infos, "infos")
            assert not found, f"{found}: {rows}"
            compared += 1
        assert compared >= 0.9 * len(self.answers)


def batch_of(space: gymnasium.Space[Any], values: list[Any]) -> Any:
    out: Any = create_empty_array(space, len(values))
    return concatenate(space, values, out)


async def of_all(ask: Callable[[str], Awaitable[T]], ids: Iterable[str]) -> dict[str, T]:
    """What is answered of each episode; some are asked for at once."""
    turn = asyncio.Semaphore(16)

    async def one(id_: str) -> T:
        async with turn:
            return await ask(id_)

    ids = list(ids)
    return dict(zip(ids, await asyncio.gather(*map(one, ids)), strict=True))


class Lanes:
    """What the sub-environments of a vector or pool told, each for itself.

    Args:
        envs: of whom.
        env: the served name.
    """

    def __init__(self, envs: Any, env: str) -> None:
        self._spaces = envs.single_observation_space, envs.single_action_space
        self._env = env
        # By env_id, the session that has it, and which of that one's it is.
        self._lanes = [
            f"{session.grant.session}.{lane}"
            for session, (_, size) in zip(envs._sessions, envs.shards, strict=True)
            for lane in range(size)
        ]
        self._numbers = [0] * len(self._lanes)
        self._ids = [""] * len(self._lanes)
        self._all: dict[str, ToldEpisode] = {}
        self._answers: list[tuple[dict[str, Any], list[Row | None]]] = []

    def rows(self, observations: Any, size: int) -> list[Any]:
        """Observations of a batch, one by one."""
        return list(iterate(batch_space(self._spaces[0], size), observations))

    def answered(self, infos: dict[str, Any], rows: list[Row | None]) -> None:
        """That is what all of them told at once."""
        self._answers.append((copied(infos), rows))

    def began(self, i: int, obs: Any, *, seed: int | None = None, options: Options = None) -> Row:
        """A reset."""
        self._ids[i] = id_ = f"{self._lanes[i]}.{self._numbers[i]}"
        self._numbers[i] += 1
        self._all[id_] = ToldEpisode([copied(obs)], [], env=self._env, spaces=self._spaces, options=options, seed=seed)
        return Row(id_, 0)

    def stepped(self, i: int, action: Any, obs: Any, *facts: Any) -> Row:
        """A step."""
        now = self._all[self._ids[i]]
        now.stepped(action, obs, *facts)
        return Row(self._ids[i], len(now.rewards))

    def ended(self, i: int, action: Any, obs: Any, reset_obs: Any, *facts: Any) -> Row:
        """A step, and a reset after it."""
        before = self.stepped(i, action, obs, *facts)
        return self.began(i, reset_obs)._replace(ended=before.episode, final_obs=copied(obs))

    @property
    def learned(self) -> Learned:
        return Learned({id_: one for id_, one in self._all.items() if one.rewards}, self._answers)


# --------------------------------------------------------------------------- learners

SEED = 11


async def nothing(_: Any, __: int) -> None:
    """What happens mostly."""


async def play_one(
    m: Mesh,
    env: str,
    level: Any,
    steps: int,
    *,
    options: Options = None,
    seed: int | None = SEED,
    meanwhile: Meanwhile = nothing,
) -> Learned:
    """Steps of a single env, whose resets but the first have no seed, and every other one options."""
    learned = Learned()
    async with await m.env(env, record=level) as remote:
        remote.action_space.seed(SEED)
        spaces = remote.observation_space, remote.action_space
        now: ToldEpisode | None = None
        for n in range(steps):
            await meanwhile(remote, n)
            if now is None or now.ended:
                given = options if len(learned.episodes) % 2 else None
                seed, own = None, seed
                obs, info = await remote.reset(seed=own, options=given)
                now = ToldEpisode([copied(obs)], [copied(info)], env=env, spaces=spaces, options=given, seed=own)
                learned.episodes[f"{remote.session_id}.0.{len(learned.episodes)}"] = now
            action = remote.action_space.sample()
            *outcome, info = await remote.step(action)
            now.stepped(action, *outcome)
            now.infos.append(copied(info))
    return learned


async def play_vector(
    m: Mesh,
    env: str,
    level: Any,
    steps: int,
    *,
    mode: AutoresetMode = AutoresetMode.NEXT_STEP,
    num_envs: int = 3,
    options: Options = None,
    seed: int | None = SEED,
    meanwhile: Meanwhile = nothing,
    **kwargs: Any,
) -> Learned:
    """Steps of a vector; in the middle one sub-environment is reset, and with DISABLED each that has ended."""
    async with await m.vector(env, num_envs, autoreset_mode=mode, record=level, **kwargs) as envs:
        lanes, ended = Lanes(envs, env), np.zeros(num_envs, np.bool_)
        envs.action_space.seed(SEED)

        async def reset(mask: Any, given: Options, seed: int | None = None) -> None:
            if not mask.all():
                given = given or {}  # what is left of them beside the mask
            masked = given if mask.all() else {**(given or {}), "reset_mask": mask}
            obs, infos = await envs.reset(seed=seed, options=masked)
            lanes.answered(
                infos,
                [
                    lanes.began(i, one, options=given, seed=None if seed is None else seed + i) if mask[i] else None
                    for i, one in enumerate(lanes.rows(obs, num_envs))
                ],
            )
            ended[mask] = False

        await reset(~ended, options, seed)
        for n in range(steps):
            await meanwhile(envs, n)
            if n == steps // 2:
                await reset((np.arange(num_envs) == 1) | ended, options)
            elif mode is AutoresetMode.DISABLED and ended.any():
                await reset(ended.copy(), None)
            actions = envs.action_space.sample()
            obs, *columns, infos = await envs.step(actions)
            rows: list[Row | None] = []
            for i, (one, action) in enumerate(
                zip(lanes.rows(obs, num_envs), iterate(envs.action_space, actions), strict=True)
            ):
                facts = [column[i] for column in columns]
                over = facts[1] or facts[2]
                if ended[i]:  # NEXT_STEP: the action counts nothing
                    rows.append(lanes.began(i, one))
                elif over and mode is AutoresetMode.SAME_STEP:
                    rows.append(lanes.ended(i, action, infos["final_obs"][i], one, *facts))
                else:
                    rows.append(lanes.stepped(i, action, one, *facts))
                ended[i] = over and mode is not AutoresetMode.SAME_STEP
            lanes.answered(infos, rows)
    return lanes.learned


async def play_pool(
    m: Mesh,
    env: str,
    level: Any,
    results: int,
    *,
    num_envs: int = 3,
    options: Options = None,
    seed: int | None = SEED,
    meanwhile: Meanwhile = nothing,
    **kwargs: Any,
) -> Learned:
    """So many results of a pool, of whose first sub-environment an episode is cut short by a reset."""
    async with await m.pool(env, num_envs, record=level, **kwargs) as pool:
        lanes, space = Lanes(pool, env), pool.single_action_space
        space.seed(SEED)
        acted: dict[int, Any] = {}
        begun: dict[int, tuple[int | None, Options]] = {
            i: (None if seed is None else seed + i, options) for i in range(num_envs)
        }
        await pool.reset(seed=seed, options=options)
        got, cut = 0, results // 2
        while acted or begun or got < results:
            await meanwhile(pool, got)
            batch = await pool.recv(min=1, timeout=20)
            got += len(batch)
            rows: list[Row | None] = []
            for k, (i, one) in enumerate(
                zip(batch.env_ids.tolist(), lanes.rows(batch.observations, len(batch)), strict=True)
            ):
                facts = batch.rewards[k], batch.terminations[k], batch.truncations[k]
                if batch.first[k]:
                    own, given = begun.pop(i)
                    rows.append(lanes.began(i, one, seed=own, options=given))
                elif facts[1] or facts[2]:
                    rows.append(lanes.ended(i, acted.pop(i), batch.infos["final_obs"][k], one, *facts))
                else:
                    rows.append(lanes.stepped(i, acted.pop(i), one, *facts))
            lanes.answered(batch.infos, rows)
            turns = batch.env_ids.tolist() if got < results else []
            if got >= cut and 0 in turns:
                cut, begun[0] = results, (None, None)
                turns.remove(0)
                await pool.reset(env_ids=[0])
            if turns:
                acted |= {i: space.sample() for i in turns}
                await pool.send(batch_of(space, [acted[i] for i in turns]), turns)
    return lanes.learned

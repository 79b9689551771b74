"""Sub-environments: the envs of one vector or pool, stepped and reset one by one, by the rules of R6 and R7.

:meth:`SubEnvs.step_all` is the hot loop: a Python turn for each sub-environment, and nothing in it that the env does
not need. What is the same for all of them (stacking observations, casting rewards) is done after it by numpy.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from meshrl.errors import MalformedMessage, MeshError, ResetNeeded
from meshrl.protocol.autoreset import RULES, Ended, OnEnd
from meshrl.protocol.seeding import Seeding
from meshrl.wire.batches import batching
from meshrl.wire.messages import AutoresetName, Open
from meshrl.worker.drawing import alone, draws
from meshrl.worker.origins import resumable
from meshrl.worker.outcomes import Info, Outcome, Outcomes
from meshrl.worker.proof import Proof, says_digests
from meshrl.worker.recording import Recording
from meshrl.worker.sealing import StateKey

# A drawn seed has the bits of a derived one (R7), so that either can be given back to reset.
SEED_BITS = 31

# So many ids may a request name even of fewer sub-environments, some of them more than once.
FEW_IDS = 64


class Crashed(Exception):
    """A sub-environment's own code raised; the exception itself is the cause of this one.

    Attributes:
        env_id: its global index.
    """

    def __init__(self, env_id: int) -> None:
        super().__init__(env_id)
        self.env_id = env_id


class SubEnvs:
    """The sub-environments of one session.

    Args:
        envs: local envs, or objects like them.
        open_: what was asked for: mode and seeding.
        state_key: see :class:`~meshrl.worker.proof.Proof`.

    Attributes:
        envs: as given.
        batches: of their observations.
        draws: whether they run alone; see :mod:`~meshrl.worker.drawing`.
        ended: whether each one's episode has ended and it was not reset since.
        first: the global index of the first.
        proof: what goes with their answers where the client keeps journals of them; None where it does not, or an env
            says that it cannot be resumed.
        recording: of the session; None where it is not recorded.
    """

    def __init__(self, envs: Sequence[Any], open_: Open, state_key: StateKey | None = None) -> None:
        mode: AutoresetName = "SameStep" if open_.form == "pool" else open_.autoreset_mode
        self.envs = list(envs)
        self.name = open_.name
        self.first = open_.first_env_id
        self.ended = [False] * len(self.envs)
        self.batches = batching(self.envs[0].observation_space)
        self.stack, self.rows_or_stack = self.batches.stack, self.batches.rows_or_stack
        self._seeding = Seeding(open_.seeding, open_.first_env_id, len(self.envs), lambda: secrets.randbits(SEED_BITS))
        self._resets_ended = RULES[mode].ended is Ended.RESET
        self._refuses_ended = RULES[mode].ended is Ended.REFUSE
        self._resets_at_once = RULES[mode].on_end is OnEnd.RESET
        self._steps = [env.step for env in self.envs]
        self._resets = [env.reset for env in self.envs]
        self.draws = any(map(draws, self.envs))
        if self.draws:
            self._steps, self._resets = [*map(alone, self._steps)], [*map(alone, self._resets)]
        self._was_reset = [False] * len(self.envs)
        self.recording: Recording | None = None
        self.proof: Proof | None = None
        if open_.digests != "none" and all(map(resumable, self.envs)):
            says = says_digests(open_, self.batches.space)
            self.proof = Proof(self.envs, self.batches, self._seeding, says=says, state_key=state_key)

    def __len__(self) -> int:
        return len(self.envs)

    @property
    def counts(self) -> Callable[[], None] | None:
        """Takes what was told into the digests that go with their answers; None where none do."""
        return self.proof.count if self.proof is not None and self.proof.says else None

    # ---------------------------------------------------------------- checks

    def check_step(self, ids: Iterable[int]) -> None:
        """Whether these may be stepped.

        Raises:
            ResetNeeded: one was never reset, or has ended where nobody but the client resets it.
        """
        self.check_began("step", ids)
        if self._refuses_ended and any(self.ended):
            ended = [self.first + i for i in ids if self.ended[i]]
            if ended:
                raise ResetNeeded(
                    f"{self.name}: the episodes of sub-environments {_some(ended)} have ended, and autoreset is "
                    'disabled; reset them with options={"reset_mask": ...}',
                    env_ids=ended,
                )

    def check_began(self, op: str, ids: Iterable[int]) -> None:
        """Whether these were ever reset, as ``op`` needs.

        Raises:
            ResetNeeded: one was not.
        """
        if not all(self._was_reset):
            new = [self.first + i for i in ids if not self._was_reset[i]]
            if new:
                raise ResetNeeded(
                    f"{self.name}: {op} before the first reset of sub-environments {_some(new)}; call reset once",
                    env_ids=new,
                )

    def was_reset(self, i: int) -> bool:
        """Whether that one ever was."""
        return self._was_reset[i]

    def check_all_reset(self, also: Iterable[int]) -> None:
        """Whether every one was reset, those of ``also`` counted.

        Raises:
            ResetNeeded: one would have no observation to show.
        """
        new = set(also)
        missing = [self.first + i for i, was in enumerate(self._was_reset) if not was and i not in new]
        if missing:
            raise ResetNeeded(
                f"{self.name}: a first reset leaves out sub-environments {_some(missing)}; reset all of them first",
                env_ids=missing,
            )

    def check_seeds(self, seeds: object) -> Sequence[int | None]:
        """One seed a sub-environment, each maybe None.

        Raises:
            InvalidSeed: it is none of that.
        """
        return self._seeding.check(seeds)

    def check_episodes(self, episodes: object, count: int) -> Sequence[int | None]:
        """Of ``count`` sub-environments that are reset, how many episodes each has had, if that is said; see R7.

        Raises:
            MalformedMessage: it is none of that.
        """
        if episodes is None:
            return [None] * count
        if not isinstance(episodes, list) or len(episodes) != count or not all(map(_is_number_or_none, episodes)):
            raise MalformedMessage(f"the episodes of {count} sub-environments are a list of as many, or nothing")
        return episodes

    def check_seed(self, seed: object) -> int | None:
        """The seed of one, or None.

        Raises:
            InvalidSeed: it is no seed.
        """
        return self._seeding.check_one(seed)

    # ---------------------------------------------------------------- one

    def reset_one(self, i: int, seed: int | None, options: Info | None, episodes: int | None = None) -> Outcome:
        """An explicit reset; ``episodes`` says how many a root has had, where it is not a new one."""
        seed = self._begins(i, self._seeding.reset(i, seed, episodes or 0), options)
        obs, info = self._guarded(i, self._resets[i], seed=seed, options=options)
        return self._was_reset_now(i, obs, info)

    def reset_from(self, i: int, origin: Info, options: Info | None) -> Outcome:
        """The reset of a fresh env that is to be where another one was after a reset with that origin."""
        obs, info = self._guarded(i, self._resets[i], seed=self._begins_from(i, origin, options), options=options)
        return self._was_reset_now(i, obs, info)

    def step_one(self, i: int, action: Any) -> Outcome:
        """A step, with what autoreset makes of it."""
        if self.ended[i] and self._resets_ended:
            obs, info = self._guarded(i, self._resets[i], **self._next_episode(i))
            return self._was_reset_now(i, obs, info)
        obs, reward, terminated, truncated, info = self._guarded(i, self._steps[i], action)
        if terminated or truncated:
            return self._ended_now(i, obs, reward, terminated, truncated, info)
        return Outcome(obs, reward, terminated, truncated, (info,) if info else ())

    async def reset_one_async(
        self, i: int, seed: int | None, options: Info | None, episodes: int | None = None
    ) -> Outcome:
        """The same of an env whose methods are coroutine functions."""
        seed = self._begins(i, self._seeding.reset(i, seed, episodes or 0), options)
        obs, info = await self.awaited(i, self._resets[i], seed=seed, options=options)
        return self._was_reset_now(i, obs, info)

    async def reset_from_async(self, i: int, origin: Info, options: Info | None) -> Outcome:
        """The same of an env whose methods are coroutine functions."""
        seed = self._begins_from(i, origin, options)
        obs, info = await self.awaited(i, self._resets[i], seed=seed, options=options)
        return self._was_reset_now(i, obs, info)

    async def step_one_async(self, i: int, action: Any) -> Outcome:
        """The same of an env whose methods are coroutine functions."""
        if self.ended[i] and self._resets_ended:
            obs, info = await self.awaited(i, self._resets[i], **self._next_episode(i))
            return self._was_reset_now(i, obs, info)
        obs, reward, terminated, truncated, info = await self.awaited(i, self._steps[i], action)
        if not (terminated or truncated) or not self._resets_at_once:
            self.ended[i] = bool(terminated or truncated)
            return Outcome(obs, reward, terminated, truncated, (info,) if info else ())
        final = {"final_obs": obs, "final_info": _as_now(info)}
        obs, info = await self.awaited(i, self._resets[i], **self._next_episode(i))
        return Outcome(obs, reward, terminated, truncated, (final, info) if info else (final,))

    def _next_episode(self, i: int) -> dict[str, Any]:
        """The arguments of an autoreset: none, as in Gymnasium, unless its seed is derived."""
        seed = self._begins(i, self._seeding.next(i))
        return {} if seed is None else {"seed": seed}

    def _begins(self, i: int, seed: int | None, options: Info | None = None) -> int | None:
        """A reset is about to begin, with that seed."""
        proof, recording = self.proof, self.recording
        try:
            anew = proof is not None and proof.begins(i, seed)
            if recording is not None:
                number = recording.began(i, seed, options)
                if anew and proof is not None:
                    proof.numbered(i, number)
        except BaseException as exc:
            raise Crashed(self.first + i) from exc
        return seed

    def _begins_from(self, i: int, origin: Info, options: Info | None) -> int | None:
        assert self.proof is not None, "only what was proved is done again"
        seed = self.proof.begins_from(i, origin)
        if self.recording is not None:
            self.recording.begins_from(i, origin)
            self._guarded(i, self.recording.began, i, seed, options)
        return seed

    def _was_reset_now(self, i: int, obs: Any, info: Info) -> Outcome:
        self.ended[i] = False
        self._was_reset[i] = True
        return Outcome(obs, 0.0, False, False, (info,) if info else ())

    def _guarded(self, i: int, call: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except BaseException as exc:
            raise Crashed(self.first + i) from exc

    async def awaited(self, i: int, call: Any, *args: Any, **kwargs: Any) -> Any:
        """What a call of sub-environment ``i`` gives, awaited if that can be.

        Raises:
            Crashed: it raised, or cancelled itself.
        """
        try:
            made = call(*args, **kwargs)
            return await made if inspect.isawaitable(made) else made
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # by whoever ends the session
            raise Crashed(self.first + i) from exc
        except (Exception, SystemExit) as exc:  # SystemExit would end the event loop
            raise Crashed(self.first + i) from exc

    def asked(self, i: int, ask: Callable[..., Any], *args: Any) -> Any:
        """What ``ask`` gets from the env of sub-environment ``i``: ``ask(env, *args)``.

        Raises:
            MeshError: the request is refused.
            Crashed: the env's own code raised.
        """
        try:
            return alone(ask)(self.envs[i], *args) if self.draws else ask(self.envs[i], *args)
        except MeshError:
            raise
        except BaseException as exc:
            raise Crashed(self.first + i) from exc

    # ---------------------------------------------------------------- many, one after another

    def step_all(self, ids: Sequence[int], actions: Iterable[Any]) -> Outcomes:
        """Step ``ids`` one after another."""
        out = Outcomes()
        # Taken apart at once: an outcome's tuple and an empty info that were kept for the whole batch would have the
        # next env write into memory that no cache holds (measured: 10 % of a CartPole's step).
        add_obs, add_reward = out.obs.append, out.rewards.append
        add_terminated, add_truncated = out.terminated.append, out.truncated.append
        steps, ended = self._steps, self.ended
        resets_some = self._resets_ended and any(ended)
        try:
            for i, action in zip(ids, actions, strict=True):
                if resets_some and ended[i]:
                    obs, reward, terminated, truncated, infos = self.step_one(i, action)
                    out.infos += [(len(out.obs), info) for info in infos]
                else:
                    obs, reward, terminated, truncated, info = steps[i](action)
                    if terminated or truncated:
                        obs, infos = self._ends(i, obs, info)
                        out.infos += [(len(out.obs), info) for info in infos]
                    elif info:
                        out.infos.append((len(out.obs), info))
                add_obs(obs)
                add_reward(reward)
                add_terminated(terminated)
                add_truncated(truncated)
        except Crashed:
            raise
        except BaseException as exc:
            raise Crashed(self.first + ids[len(out.obs)]) from exc
        return out

    def _ended_now(self, i: int, obs: Any, reward: Any, terminated: Any, truncated: Any, info: Info) -> Outcome:
        """An env's step that ended its episode, with what autoreset makes of it."""
        obs, infos = self._ends(i, obs, info)
        return Outcome(obs, reward, terminated, truncated, infos)

    def _ends(self, i: int, obs: Any, info: Info) -> tuple[Any, Sequence[Info]]:
        """An episode ends with that observation and info; gives those that the step shows."""
        if not self._resets_at_once:
            self.ended[i] = True
            return obs, (info,) if info else ()
        final = {"final_obs": obs, "final_info": _as_now(info)}
        obs, info = self._guarded(i, self._resets[i], **self._next_episode(i))
        return obs, (final, info) if info else (final,)


def _as_now(info: Info) -> Info:
    """An info as it is before the reset: an env may fill the same dict and arrays again."""
    now: Info = {}
    for key, value in info.items():
        if type(value) is dict:
            now[key] = _as_now(value)
        else:
            now[key] = value.copy() if isinstance(value, np.ndarray) else value
    return now


def is_number(value: object) -> bool:
    """Whether it can be the number of an episode."""
    return type(value) is int and 0 <= value < 1 << 62


def _some(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:8]))
    return shown if len(ids) <= 8 else f"{shown} and {len(ids) - 8} more"


def _is_number_or_none(value: object) -> bool:
    return value is None or is_number(value)

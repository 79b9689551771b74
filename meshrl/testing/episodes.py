"""Checks of what an env gives: spaces, observations, rewards, flags, infos, frames."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from numbers import Real
from typing import Any

import gymnasium
import numpy as np

from meshrl.errors import EnvError
from meshrl.testing.compare import Transition, arrays, same, short, why_outside
from meshrl.testing.trial import Broken, Doubtful, NotApplicable, Trial
from meshrl.wire import spaces
from meshrl.wire.codec import pack, unpack

SAMPLES = 20
# What an env on a worker without the packages for drawing raises.
NOT_INSTALLED = {"DependencyNotInstalled", "ModuleNotFoundError", "ImportError"}


async def opens(trial: Trial) -> str:
    """A session can be had, and its env is the one described."""
    async with trial.env() as env:
        differing = [
            which
            for which, space, described in (
                ("observation", env.observation_space, trial.description.observation_space),
                ("action", env.action_space, trial.description.action_space),
            )
            if described is not None and not trial.kwargs and spaces.rebuild(described) != space
        ]
        if differing:
            raise Broken(
                f"the {' and the '.join(differing)} space of a session is not the one described",
                "spaces may depend on the constructor's arguments and on nothing else",
            )
        return f"worker {env.worker} opened a session"


async def round_trip(trial: Trial) -> str:
    """Spaces and their samples travel and stay what they are."""
    async with trial.env() as env:
        for which, space in (("observation", env.observation_space), ("action", env.action_space)):
            if spaces.rebuild(spaces.describe(space)) != space:
                raise Broken(f"the {which} space {short(space)} is another one after a round trip")
            space.seed(trial.seed)
            for _ in range(SAMPLES):
                _sample_travels(space, which)
        return f"{short(env.observation_space)} and {short(env.action_space)}"


def _sample_travels(space: gymnasium.Space[Any], which: str) -> None:
    value = space.sample()
    arrived = unpack(pack(value))
    if not same(value, arrived):
        raise Broken(f"{short(value)} of the {which} space arrives as {short(arrived)}")
    reason = why_outside(space, arrived)
    if reason is not None:
        raise Broken(f"a sample of the {which} space is not in it: {reason}", "check the space's bounds and dtype")


async def resets(trial: Trial) -> str:
    """Reset gives an observation of the space, and an info."""
    async with trial.env() as env:
        obs, info = await env.reset(seed=trial.seed)
        reason = why_outside(env.observation_space, obs)
        if reason is not None:
            raise Broken(f"the observation of reset is outside the observation space: {reason}", OUTSIDE)
        _check_info(info, "reset")
        return f"gave {short(obs)}"


OUTSIDE = "return what the space declares (np.asarray(obs, dtype=space.dtype), np.clip), or declare what is returned"


async def steps(trial: Trial) -> str:
    """Episodes of random actions run without an exception, and end or go on."""
    trial.played = []
    async with trial.env() as env:
        for n in range(trial.episodes):
            trial.played.append(await trial.play(env, trial.seed + n))
    lengths = [len(episode.steps) for episode in trial.played]
    ended = sum(episode.ended for episode in trial.played)
    shortest, longest = min(lengths), max(lengths)
    many = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    what = f"{len(lengths)} episode{'s' if len(lengths) > 1 else ''} of {many} steps"
    return f"{what}; {ended} ended" if ended else f"{what}; none ended by then"


async def observations(trial: Trial) -> str:
    """Every observation of a step is in the observation space."""
    async with trial.env() as env:
        space = env.observation_space
    count = 0
    for n, episode in enumerate(trial.played, 1):
        for where, obs in episode.observations():
            reason = why_outside(space, obs)
            if reason is not None:
                raise Broken(
                    f"the observation of {where} of episode {n} is outside the observation space: {reason}", OUTSIDE
                )
            if isinstance(space, gymnasium.spaces.Box) and obs.dtype != space.dtype:
                raise Doubtful(
                    f"the observation of {where} of episode {n} has dtype {obs.dtype}; the space says {space.dtype}",
                    "a vector of this env casts it",
                )
            count += 1
    return f"{count} observations"


async def rewards(trial: Trial) -> str:
    """Rewards are finite numbers."""
    return _each(trial, "reward", _reward_problem, "return float(reward)")


def _reward_problem(step: Transition) -> str | None:
    reward = step.reward
    if isinstance(reward, (bool, np.bool_)) or not isinstance(reward, (Real, np.number)):
        return f"is {short(reward)} ({type(reward).__name__}), not a number"
    return None if np.isfinite(float(reward)) else f"is {reward}"


async def flags(trial: Trial) -> str:
    """Terminated and truncated are booleans."""
    return _each(trial, "end flag", _flag_problem, "return bool(terminated), bool(truncated)")


def _flag_problem(step: Transition) -> str | None:
    for name in ("terminated", "truncated"):
        flag = getattr(step, name)
        if not isinstance(flag, (bool, np.bool_)):
            return f"{name} is {short(flag)} ({type(flag).__name__}), not a bool"
    return None


async def infos(trial: Trial) -> str:
    """Infos are dicts with text for keys, of values that can travel."""
    for episode in trial.played:
        _check_info(episode.info, "reset")
        for n, step in enumerate(episode.steps, 1):
            _check_info(step.info, f"step {n}")
    keys = sorted({key for episode in trial.played for step in episode.steps for key in step.info})
    return f"keys: {', '.join(keys)}" if keys else "without any key"


def _check_info(info: Any, where: str) -> None:
    if not isinstance(info, dict):
        raise Broken(f"the info of {where} is {short(info)}, not a dict", "return {} when there is nothing to say")
    strange = [key for key in info if not isinstance(key, str)]
    if strange:
        raise Broken(f"the info of {where} has the key {strange[0]!r}, which is no text", "use str(key)")


def _each(trial: Trial, what: str, problem: Callable[[Transition], str | None], remedy: str) -> str:
    count = 0
    for n, episode in enumerate(trial.played, 1):
        for m, step in enumerate(episode.steps, 1):
            reason = problem(step)
            if reason is not None:
                raise Broken(f"the {what} of step {m} of episode {n} {reason}", remedy)
            count += 1
    return f"{count} steps"


async def owned(trial: Trial) -> str:
    """Arrays that arrive are the receiver's own: writable, and never used again for a later reply."""
    count = 0
    for episode in trial.played:
        replies = [list(arrays([obs])) for _, obs in episode.observations()]
        replies[0] += arrays(episode.info)
        for n, step in enumerate(episode.steps, 1):
            replies[n] += arrays(step.info)
        for held in replies:
            if not all(array.flags.writeable for array in held):
                raise Broken("an array that arrived cannot be written to", REPORT)
            count += len(held)
        for before, after in pairwise(replies):
            if any(np.may_share_memory(a, b) for a in before for b in after if a.size and b.size):
                raise Broken("an array that arrived shares its memory with one of the reply before", REPORT)
    if not count:
        raise NotApplicable("neither observations nor infos hold arrays")
    return f"{count} arrays"


REPORT = "this is a fault of meshrl and not of the env: please report it"


async def renders(trial: Trial) -> str:
    """Each render mode that the env declares gives frames of its kind."""
    modes = trial.description.metadata.get("render_modes") or []
    modes = [mode for mode in modes if isinstance(mode, str) and mode != "human"]
    if not modes:
        raise NotApplicable("the env declares no render mode but human")
    shown = []
    for mode in modes:
        try:
            async with trial.env(mode) as env:
                await env.reset(seed=trial.seed)
                await env.step(env.action_space.sample())
                shown.append(f"{mode}: {_frame(mode, await env.render())}")
        except EnvError as exc:
            if exc.details.get("type") in NOT_INSTALLED:
                raise Doubtful(
                    f"the render mode {mode} needs what its worker has not installed: {exc.message}",
                    "install it at the worker, or leave the mode out of metadata['render_modes']",
                ) from exc
            raise
    return ", ".join(shown)


def _frame(mode: str, frame: Any) -> str:
    """A frame in words."""
    if mode.endswith("_list"):
        if not isinstance(frame, list):
            raise Broken(f"render in the mode {mode} gave {type(frame).__name__}, not a list of frames")
        return f"{len(frame)} frames"
    if mode == "rgb_array":
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise Broken(
                f"render in the mode rgb_array gave {short(frame)}",
                "return an array of shape (height, width, 3) and dtype uint8",
            )
        return f"{frame.shape[1]} x {frame.shape[0]}"
    if mode == "ansi":
        if not isinstance(frame, str):
            raise Broken(f"render in the mode ansi gave {type(frame).__name__}", "return the text")
        return f"{len(frame)} characters"
    if frame is None:
        raise Broken(f"render in the mode {mode} gave nothing")
    return type(frame).__name__

"""Checks of how an env behaves: seeds, ends, refusals, other sessions, the close."""

from __future__ import annotations

import asyncio

from meshrl.client.context import context_of
from meshrl.errors import (
    EnvError,
    InvalidAction,
    MeshError,
    MeshFull,
    NotAllowed,
    ResetNeeded,
    SessionClosed,
    SessionLost,
)
from meshrl.testing.compare import Episode, difference, info_difference, same, short, why_outside
from meshrl.testing.episodes import OUTSIDE, REPORT
from meshrl.testing.trial import Broken, Doubtful, NotApplicable, Trial, Walk

SEEDED = "draw everything from self.np_random, which super().reset(seed=seed) seeds, and keep no state over reset"
# A second slot for the same client at the same time; a mesh without one is not at fault.
SECOND_SLOT_S = 2.0
# Long enough for envs that close a simulator.
FREED_S = 10.0
# The first pause; ten that double fill the time above.
AGAIN_S = 0.01


async def seeding(trial: Trial) -> str:
    """The same seed and actions give the same episode in two sessions, bit for bit."""
    first, second = await _in_new_session(trial), await _in_new_session(trial)
    _must_equal(first, second, "of two sessions with the same seed")
    return f"{len(first.steps)} steps twice the same"


async def _in_new_session(trial: Trial) -> Episode:
    async with trial.env() as env:
        return await trial.play(env, trial.seed)


def _must_equal(one: Episode, other: Episode, which: str) -> None:
    differing = difference(one, other)
    if differing is not None:
        where = "" if one.worker == other.worker else f" (at the workers {one.worker} and {other.worker})"
        raise Broken(f"the episodes {which} differ{where}: {differing}", SEEDED)
    differing = info_difference(one, other)
    if differing is not None:
        raise Doubtful(
            f"the episodes {which} differ in {differing} alone",
            "times and ids in info are harmless; what an agent acts on is not",
        )


async def reseeding(trial: Trial) -> str:
    """The same seed gives the same episode again in the same session, whatever was played in between."""
    async with trial.env() as env:
        first = await trial.play(env, trial.seed)
        await trial.play(env, trial.seed + 1)
        second = await trial.play(env, trial.seed)
    _must_equal(first, second, "of one session that was reset twice with the same seed")
    return f"{len(first.steps)} steps twice the same"


async def seeds_differ(trial: Trial) -> str:
    """Another seed gives another episode."""
    async with trial.env() as env:
        first = await trial.play(env, trial.seed, action_seed=trial.seed)
        second = await trial.play(env, trial.seed + 1, action_seed=trial.seed)
    if difference(first, second) is None:
        raise Doubtful(
            f"the seeds {trial.seed} and {trial.seed + 1} give the same episode for the same actions",
            "fine for an env without chance; else see that reset passes its seed on",
        )
    return f"the seeds {trial.seed} and {trial.seed + 1} differ"


async def unseeded(trial: Trial) -> str:
    """A reset without a seed goes on with the generator: reproducible, and not the same start again."""
    starts = []
    for _ in range(2):
        async with trial.env() as env:
            first, _info = await env.reset(seed=trial.seed)
            starts.append((first, *[(await env.reset())[0] for _ in range(trial.episodes)]))
    for n, (one, other) in enumerate(zip(*starts, strict=True)):
        if not same(one, other):
            raise Broken(
                f"after the same seed, reset {n} without one gave {short(one)} and then {short(other)}", SEEDED
            )
    if trial.episodes and all(same(obs, starts[0][0]) for obs in starts[0][1:]):
        raise Doubtful(
            "every reset gives the same observation",
            "fine for an env with one start; else reset(seed=None) must not seed anew",
        )
    return f"{trial.episodes} resets went on from the seed"


async def after_end(trial: Trial) -> str:
    """After an end, reset begins an episode like any other."""
    if not any(episode.ended for episode in trial.played):
        raise NotApplicable(f"no episode ended within {trial.max_steps} steps")
    async with trial.env() as env:
        for n in range(max(2, trial.episodes)):
            ended = await trial.play(env, trial.seed + n)
            obs, _ = await env.reset()
            reason = why_outside(env.observation_space, obs)
            if reason is not None:
                raise Broken(f"the observation of a reset after an end is outside the space: {reason}", OUTSIDE)
            if not ended.ended:
                continue
            *_, terminated, truncated, _ = await env.step(env.action_space.sample())
            if len(ended.steps) > 1 and (terminated or truncated):
                raise Doubtful(
                    "the first step after an end and a reset ended the episode again",
                    "see that reset clears what makes step say terminated or truncated",
                )
            return "it went on"
    raise NotApplicable("no episode ended this time")


async def wrong_action(trial: Trial) -> str:
    """An action of the wrong kind is refused before it is sent, and the env goes on."""
    async with trial.env() as env:
        await env.reset(seed=trial.seed)
        try:
            # A dict with a key that no space has: outside of every space, whatever its class.
            await env.step({"no such key in any action space": None})
        except InvalidAction:
            pass
        else:
            raise Broken(f"an action that is not in {short(env.action_space)} was taken")
        state = await env.state()
        if state.total_steps:
            raise Broken("an action that was refused reached the env")
        await env.step(env.action_space.sample())
    return "InvalidAction was raised"


async def step_before_reset(trial: Trial) -> str:
    """A step before the first reset raises ResetNeeded, and the env goes on."""
    async with trial.env() as env:
        try:
            await env.step(env.action_space.sample())
        except ResetNeeded:
            state = await env.state()
            if state.phase != "new":
                raise Broken(f"a step that was refused left the session {state.phase}", REPORT) from None
            return "ResetNeeded was raised"
        raise Broken("a step before the first reset was taken")


async def private_names(trial: Trial) -> str:
    """Private and missing attributes are refused, and the env goes on."""
    async with trial.env() as env:
        await env.reset(seed=trial.seed)
        for name in ("_np_random", "__class__", "no_such_attribute_of_any_env"):
            try:
                value = await env.get_attr(name)
            except NotAllowed:
                continue
            raise Broken(
                f"get_attr({name!r}) gave {short(value)}",
                "an env should raise AttributeError for names that it does not have",
            )
        await env.step(env.action_space.sample())
    return "NotAllowed was raised"


async def independent(trial: Trial) -> str:
    """Two sessions at the same time don't touch each other."""
    alone = await _in_new_session(trial)
    async with trial.env() as env:
        try:
            async with trial.env(wait=SECOND_SLOT_S) as other:
                walk, beside = Walk(env, trial.seed), Walk(other, trial.seed + 1)
                episode = await walk.begin(trial.seed)
                await beside.begin(trial.seed + 1)
                goes_on = True
                while len(episode.steps) < trial.max_steps and await walk.step():
                    if goes_on:
                        goes_on = await beside.step()
                    else:
                        await beside.begin(None)
                        goes_on = True
        except MeshFull as exc:
            raise NotApplicable(
                "there was no second slot at the same time", "give the worker more --slots, or run it alone"
            ) from exc
    differing = difference(alone, episode)
    if differing is not None:
        raise Broken(
            f"an episode beside another session is not the one that it is alone: {differing}",
            "keep the env's state in the instance, not in its class or module",
        )
    return f"{len(episode.steps)} steps beside another session are those alone"


async def closing(trial: Trial) -> str:
    """Close ends the session and frees its slot."""
    async with trial.env() as env:
        await env.reset(seed=trial.seed)
        await env.close()
        await env.close()
        try:
            await env.step(env.action_space.sample())
        except SessionClosed:
            pass
        else:
            raise Broken("a step after close was taken")
    try:
        async with asyncio.timeout(FREED_S):
            return await _slot_comes_back(trial)
    except TimeoutError:
        ours = 1  # the open that was given up just now may still be in the advertisements
        if sum(ad.waiting for ad in await trial.mesh.envs() if ad.name == trial.description.name) > ours:
            raise Doubtful(
                f"others wait for slots, so that it cannot be told whether this one was free within {FREED_S:g} s",
                "run the suite when nobody waits (meshrl ls)",
            ) from None
        raise Broken(
            f"the slot was not free again within {FREED_S:g} s", "see that the env's close returns, and soon"
        ) from None


async def _slot_comes_back(trial: Trial) -> str:
    """Open and close until a worker has no fewer free slots than when it was met before.

    Slots that don't come back become fewer each time, whatever other clients do at once. The pauses grow, so that one
    slow close after another is not taken for that.
    """
    last: dict[str, int] = {}
    pause_s = AGAIN_S
    while True:
        session = await context_of(trial.mesh).open("env", trial.name, trial.kwargs, None, 2 * FREED_S)
        load, worker = session.grant.load, session.grant.worker
        await session.close()
        if load.free >= last.get(worker, load.slots - 1):  # met first, it has to be idle but for this session
            return "the slot was free again"
        if worker in last:
            await asyncio.sleep(pause_s)
            pause_s *= 2
        last[worker] = load.free


async def exceptions(trial: Trial) -> str:
    """An exception of the env's own code ends its session alone, with its traceback."""
    async with trial.env() as env:
        await env.reset(seed=trial.seed)
        try:
            await env.reset(options={"no such option": None}, seed=trial.seed)
        except EnvError as exc:
            if not exc.remote_traceback:
                raise Broken("an exception arrived without its traceback") from exc
            try:
                await env.step(env.action_space.sample())
            except SessionLost:
                pass
            else:
                raise Broken("a session went on after its env raised") from exc
        except MeshError as exc:
            raise Broken(f"reset with an unknown option was answered by {exc.code}: {exc.message}") from exc
        else:
            raise NotApplicable("the env raised nothing; unknown reset options are ignored")
    async with trial.env() as env:
        await env.reset(seed=trial.seed)
    return "it ended its own session, and the next one was opened"

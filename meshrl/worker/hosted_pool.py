"""A hosted pool: sub-environments that are a lane each, stepped in whatever groups they are asked for (R2, R6)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage, MeshError
from meshrl.protocol.pace import BatchPace
from meshrl.protocol.values import own
from meshrl.wire.batches import batching
from meshrl.wire.frames import Frame, Indices
from meshrl.wire.infos import pack_infos
from meshrl.wire.messages import Open
from meshrl.worker.calls import Calls
from meshrl.worker.outcomes import Outcome, Outcomes, flags_of, rewards_of
from meshrl.worker.recording import Recording
from meshrl.worker.redoing import Deed, Done, Redoing, Replay
from meshrl.worker.sealing import StateKey
from meshrl.worker.several import close_all, has_coroutines
from meshrl.worker.spread import Finished, Spread
from meshrl.worker.sub_envs import Crashed, SubEnvs, is_number
from meshrl.worker.threads import Threads

# Gives the reply's own fields of one lane of several, by its place among them; before any of them runs again.
Alone = Callable[[int], Frame]
# What some lanes of a request gave: their positions in it, the reply's own fields or what was raised, and the former of
# each lane.
Told = Callable[[Indices, Frame | BaseException, Alone | None], None]


class HostedPool:
    """The sub-environments of one shard of a pool under one session.

    Args:
        envs: local envs with equal spaces.
        open_: what was asked for.
        threads: where what takes its time runs.
        state_key: with which the worker seals what only workers may have written.

    Attributes:
        envs: as given.
        pace: where to step them.
        coroutine: whether their ``reset`` or ``step`` must be awaited.
        draws: whether they run alone; see :mod:`~meshrl.worker.drawing`.
        first: the env_id of lane 0.
        episodes: int64, the number of each one's episode, from 1; 0 before the first reset. Under derived seeding they
            are counted from the reset that gave the root.
        steps: int64, how many steps it has.
    """

    def __init__(
        self, envs: Sequence[Any], open_: Open, *, threads: Threads, state_key: StateKey | None = None
    ) -> None:
        self.name = open_.name
        self.pace = BatchPace(len(envs))
        self._reset_pace = BatchPace(len(envs))
        self.coroutine = has_coroutines(envs[0])
        self.episodes: NDArray[np.int64] = np.zeros(len(envs), np.int64)
        self.steps: NDArray[np.int64] = np.zeros(len(envs), np.int64)
        self._derived = open_.seeding == "derived"
        self._subs = SubEnvs(envs, open_, state_key)
        self.envs = self._subs.envs
        self.counts = self._subs.counts
        self.draws = self._subs.draws
        self.first = self._subs.first
        self._batches = batching(envs[0].action_space)
        self._threads = threads
        self._calls = Calls(threads)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._spreads: dict[int, Spread] = {}  # under way, by a number of their own
        self._spread_number = 0
        self._over = False
        self._acted: dict[int, Any] = {}  # by lane, what was asked for last, where it is recorded
        self._policies: dict[int, int] = {}  # and by which version of the policy, once one was said
        self._redoing = Redoing(self._subs, _changes_nothing, lambda: not self._over)

    def __repr__(self) -> str:
        return f"<HostedPool of {len(self._subs)} {self.name}>"

    @property
    def recording(self) -> Recording | None:
        """Of what is done; None where nobody records it."""
        return self._subs.recording

    def record(self, recording: Recording) -> None:
        """Tell it whatever is done from now on."""
        self._subs.recording = recording

    def check(self, op: str, lanes: Indices, body: Frame) -> list[Any]:
        """What each lane of a request is given: its action, its seed and the options, or the replay.

        Args:
            op: ``step``, ``reset`` or ``replay``.
            lanes: all that the request names.
            body: the request.

        Raises:
            MeshError: the request is refused and nothing was touched.
        """
        if op == "step":
            self._subs.check_step(lanes.tolist())
            actions = body.get("actions")
            self._batches.check(actions, len(lanes), "actions", exact=False)
            if self._subs.recording is not None:
                version = self._subs.recording.acted(body)
                if version is not None:
                    self._policies.update(dict.fromkeys(lanes.tolist(), version))
                kept = self._batches.rows(own(actions), len(lanes))
                self._acted.update(zip(lanes.tolist(), kept, strict=True))
            return list(self._batches.rows(actions, len(lanes)))
        if op == "reset":
            seeds, options = body.get("seeds"), body.get("options")
            if options is not None and not isinstance(options, dict):
                raise MalformedMessage(f"reset options are a map or nothing, not {type(options).__name__}")
            if seeds is None:
                seeds = [None] * len(lanes)
            elif not isinstance(seeds, list) or len(seeds) != len(lanes):
                raise MalformedMessage(f"the seeds of {len(lanes)} lanes are a list of as many, or nothing")
            episodes = self._subs.check_episodes(body.get("episodes"), len(lanes))
            checked = map(self._subs.check_seed, seeds)
            return [(seed, options, episode) for seed, episode in zip(checked, episodes, strict=True)]
        if op == "replay":
            if self._subs.proof is None or len(lanes) != len(self._subs) or self.episodes.any():
                raise MalformedMessage(
                    "a replay is of all lanes, and the first request of a session that was opened with digests"
                )
            replay = Replay(body, len(lanes), self._batches)
            if not all(is_number(replay.number(lane)) for lane in range(len(lanes))):
                raise MalformedMessage("the episodes of a pool's lanes are numbered from 0")
            return [replay] * len(lanes)
        raise MalformedMessage(f"a pool session has no op {op!r}")

    def run(self, op: str, lanes: Indices, given: list[Any]) -> tuple[Frame, Alone]:
        """Carry out one op, the lanes one after another; gives the reply's own fields, together and of each lane.

        Raises:
            Exception: whatever a sub-environment's own code raises; the session is over then.
        """
        self._count_anew(op, lanes, given)
        if op == "step":
            return self._frame(op, lanes, self._subs.step_all(lanes.tolist(), given))
        ids = lanes.tolist()
        outcomes = (self._subs.reset_one(i, *arguments) for i, arguments in zip(ids, given, strict=True))
        return self._frame(op, lanes, Outcomes.of(outcomes))

    def spread(self, op: str, lanes: Indices, given: list[Any], told: Told) -> None:
        """The same on threads; ``told`` gets each lane's answer on the event loop, those together that finish so."""
        self._count_anew(op, lanes, given)
        ids = lanes.tolist()
        step, reset, redo = self._subs.step_one, self._subs.reset_one, self._redoing.one

        def job(k: int) -> Outcome | Done:
            if op == "replay":
                return redo(ids[k], given[k])
            return step(ids[k], given[k]) if op == "step" else reset(ids[k], *given[k])

        pace = {"step": self.pace, "reset": self._reset_pace}.get(op) or BatchPace(len(ids))
        left = len(ids)
        self._spread_number += 1
        spread_number = self._spread_number

        def collect(finished: list[Finished]) -> None:
            nonlocal left
            left -= len(finished)
            if not left:
                del self._spreads[spread_number]
            pace.took(sum(one.seconds for one in finished), len(finished))
            if op == "replay":
                self._redone(lanes, given, [(one.number, one.outcome) for one in finished], told)
            else:
                self._tell(op, lanes, [(one.number, one.outcome) for one in finished], told)

        self._spreads[spread_number] = Spread(self._threads, len(ids), job, collect, wide=pace.wide, narrow=self.draws)

    def start(self, op: str, lanes: Indices, given: list[Any], told: Told) -> None:
        """The same of envs with coroutine functions, which run concurrently."""
        self._count_anew(op, lanes, given)
        done: list[tuple[int, Any]] = []
        loop = asyncio.get_running_loop()

        def tell() -> None:
            fresh = list(done)
            done.clear()
            if op == "replay":
                self._redone(lanes, given, fresh, told)
            else:
                self._tell(op, lanes, fresh, told)

        async def one(i: int, arguments: Any) -> Any:
            try:
                if op == "step":
                    return await self._subs.step_one_async(i, arguments)
                if op == "replay":
                    return await self._redoing.one_async(i, arguments)
                return await self._subs.reset_one_async(i, *arguments)
            except (Exception, SystemExit) as exc:  # noqa: BLE001  # its session ends with it
                return exc

        def ended(k: int, task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not done:
                loop.call_soon(tell)
            # Here, because of a task that is cancelled before its first turn nothing runs.
            done.append((k, asyncio.CancelledError("the step was cancelled") if task.cancelled() else task.result()))

        for k, (i, arguments) in enumerate(zip(lanes.tolist(), given, strict=True)):
            task = loop.create_task(one(i, arguments))
            self._tasks.add(task)
            task.add_done_callback(partial(ended, k))

    def _count_anew(self, op: str, lanes: Indices, given: list[Any]) -> None:
        """Where a reset says how many episodes there were, its own is the next.

        Under derived seeding one that gives a root begins with episode 1, so that its number tells its seed.
        """
        if op != "reset":
            return
        for lane, (seed, _, episodes) in zip(lanes.tolist(), given, strict=True):
            if episodes is not None or (self._derived and seed is not None):
                self.episodes[lane] = episodes or 0

    def cancel(self) -> None:
        """The session is over: coroutines that still run are not waited for, and no lane begins on a thread."""
        self._over = True
        for task in self._tasks:
            task.cancel()
        for spread in self._spreads.values():
            spread.stop()

    async def close(self, seconds: float) -> None:
        """Close every sub-environment; see :func:`~meshrl.worker.several.close_all`."""
        await close_all(self._calls, self._subs.envs, seconds)

    def _tell(self, op: str, lanes: Indices, finished: list[tuple[int, Any]], told: Told) -> None:
        never = [one for one in finished if isinstance(one[1], asyncio.CancelledError)]
        if never and len(never) < len(finished):  # those that ran are answered with what came of them
            self._tell(op, lanes, [one for one in finished if not isinstance(one[1], asyncio.CancelledError)], told)
            finished = never
        positions = np.array([number for number, _ in finished], np.int64)
        answer: Frame | BaseException | None
        alone: Alone | None = None
        try:
            answer = next((self._crash(lanes, *one) for one in finished if isinstance(one[1], BaseException)), None)
            if answer is None:
                answer, alone = self._frame(op, lanes[positions], Outcomes.of(outcome for _, outcome in finished))
        except Exception as exc:  # noqa: BLE001  # an observation that does not fit its space is the env's error
            answer = exc
        told(positions, answer, alone)

    def _redone(self, lanes: Indices, given: list[Any], finished: list[tuple[int, Any]], told: Told) -> None:
        """Some lanes were done again, each by itself; what is wrong with one is no other's."""
        well, refused = [], []
        for number, done in finished:
            if isinstance(done, Done):
                lane = int(lanes[number])
                self.episodes[lane] = given[number].number(lane) + done.resets
                self.steps[lane] = done.steps
                well.append(number)
            elif isinstance(done, MeshError):
                refused.append((number, done))
            else:
                told(np.array([number], np.int64), self._crash(lanes, number, done), None)
        if refused:  # they are told the first's
            told(np.array([number for number, _ in refused], np.int64), refused[0][1], None)
        if well:
            told(np.array(well, np.int64), {}, None)

    def _crash(self, lanes: Indices, number: int, raised: BaseException) -> Crashed:
        if isinstance(raised, Crashed):
            return raised
        crash = Crashed(self._subs.first + int(lanes[number]))  # what it returned was nothing a step gives, say
        crash.__cause__ = raised
        return crash

    def _frame(self, op: str, lanes: Indices, out: Outcomes) -> tuple[Frame, Alone]:
        terminations, truncations = flags_of(out.terminated), flags_of(out.truncated)
        if op == "step":
            self.steps[lanes] += 1
        else:
            self.episodes[lanes] += 1
            self.steps[lanes] = 0
        frame = {
            "obs": self._subs.rows_or_stack(out.obs),
            "rewards": rewards_of(out.rewards),
            "terminations": terminations,
            "truncations": truncations,
            "first": op == "reset",
            "episodes": self.episodes[lanes],
            "steps": self.steps[lanes],
        }
        if out.infos:
            frame["infos"] = pack_infos(out.infos, len(lanes))
        if self._subs.recording is not None:
            actions = policies = None
            if op == "step":
                asked = lanes.tolist()
                actions = [self._acted[lane] for lane in asked]
                if self._policies:
                    policies = [self._policies.get(lane) for lane in asked]
            self._subs.recording.told(lanes, actions, frame, out.infos, policies)
        ended = lanes[terminations | truncations]
        if len(ended):  # they were reset at once
            self.episodes[ended] += 1
            self.steps[ended] = 0
        if self._subs.proof is not None:
            self._subs.proof.add(frame, lanes, self.episodes)
        return frame, partial(self._alone, frame, out)

    def _alone(self, frame: Frame, out: Outcomes, k: int) -> Frame:
        columns = ("rewards", "terminations", "truncations", "episodes", "steps", "digests")
        alone: Frame = {name: frame[name][k : k + 1] for name in columns if name in frame}
        origins = frame.get("origins", [])
        if k in origins[::2]:
            alone["origins"] = [0, origins[2 * origins[::2].index(k) + 1]]
        alone.update(obs=self._subs.stack([out.obs[k]]), first=frame["first"])
        infos = [(0, info) for at, info in out.infos if at == k]
        if infos:
            alone["infos"] = pack_infos(infos, 1)
        return alone


def _changes_nothing(_i: int, deed: Deed) -> Any:
    raise MalformedMessage(f"a pool has no {deed.op}")

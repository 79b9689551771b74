"""Doing again: the journals of a lost session's sub-environments, each by itself in a fresh env (R8).

A request of a replay holds the journals of all of them as one list of requests; here it is taken apart into a plan for
each, so that slow ones can be done on threads of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from meshrl.errors import MalformedMessage, MeshError, ReplayDiverged, SessionUnknown
from meshrl.protocol.journal import CHANGING
from meshrl.wire.batches import Batching
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Frame
from meshrl.worker.sub_envs import Outcome, Outcomes, SubEnvs, flags_of, rewards_of

# Rows that wait to be taken into a digest together.
ROWS = 1024


class Deed(NamedTuple):
    """One thing to do with a sub-environment.

    Attributes:
        op: ``step``, ``reset``, ``set_attr``, ``call``, or ``origin``, the reset with which its journal begins.
        given: the action; the seed and the options; the request; the origin and the options.
    """

    op: str
    given: Any


class Plan(NamedTuple):
    """What is to be done again of one sub-environment.

    Attributes:
        deeds: in their order.
        digest: what all that it tells must come to.
        number: of the episode with which it begins, in a pool.
    """

    deeds: Sequence[Deed]
    digest: int
    number: Any


class Done(NamedTuple):
    """What came of a plan.

    Attributes:
        last: the last outcome of a reset or step; None where there was none.
        resets: how many episodes began after that of the origin, where those that end are followed at once.
        steps: how many steps the last of them has.
    """

    last: Outcome | None
    resets: int
    steps: int


def plans_of(body: Frame, count: int, batches: Batching) -> list[Plan]:
    """The plans of a replay request, by sub-environment.

    Args:
        body: the request.
        count: how many sub-environments there are.
        batches: of their actions.

    Raises:
        MalformedMessage: it is none.
    """
    journal, origins = body.get("journal"), body.get("origins")
    arrays = [body.get(name) for name in ("begins", "ends", "digests")]
    if not isinstance(journal, list) or not isinstance(origins, list) or len(origins) != count:
        raise MalformedMessage("a replay needs a journal, a list of requests, and an origin or nil for each lane")
    for array, dtype in zip(arrays, (np.int64, np.int64, np.uint64), strict=True):
        if not isinstance(array, np.ndarray) or array.shape != (count,) or array.dtype != dtype:
            raise MalformedMessage(f"a replay of {count} sub-environments needs begins, ends and digests of as many")
    requests = [_Request(entry, count, batches) for entry in journal]
    begins, ends, digests = (array.tolist() for array in arrays if array is not None)
    return [_plan(i, requests, begins[i], ends[i], _checked(origins[i]), digests[i]) for i in range(count)]


def read_entry(entry: object) -> tuple[str, Frame]:
    """The op and the request of one entry of a journal.

    Raises:
        MalformedMessage: it is none.
    """
    if type(entry) is not list or [type(part) for part in entry] != [str, bytes] or entry[0] not in CHANGING:
        raise MalformedMessage("a journal's entry is an op that changes something and the request's body")
    request = unpack(entry[1])
    if type(request) is not dict:
        raise MalformedMessage("a journal's request is a map")
    return entry[0], request


class _Request:
    """An entry of a journal, read once for all sub-environments."""

    def __init__(self, entry: object, count: int, batches: Batching) -> None:
        self.op, self.body = read_entry(entry)
        body = self.body
        self.rows = self._rows(count)
        if self.op == "step":
            actions = body.get("actions")
            batches.check(actions, len(self.rows), "actions", exact=False)
            self._given: Sequence[Any] = list(batches.rows(actions, len(self.rows)))
        elif self.op == "reset":
            seeds = body.get("seeds")
            # A vector's seeds are of all its sub-environments, a pool's of the lanes that it names.
            given = len(self.rows) if "lanes" in body else count
            if seeds is not None and (not isinstance(seeds, list) or len(seeds) != given):
                raise MalformedMessage("a journal's reset has a seed for each, or none")
            options = body.get("options")
            if options is not None and not isinstance(options, dict):
                raise MalformedMessage("reset options are a map or nothing")
            by_row = seeds if seeds is None or "lanes" in body else [seeds[i] for i in self.rows]
            self._given = [(None if by_row is None else by_row[row], options) for row in range(len(self.rows))]
        else:
            values = body.get("values")
            if self.op == "set_attr" and (not isinstance(values, list) or len(values) != len(self.rows)):
                raise MalformedMessage("a journal's set_attr has a value for each")
            self._given = [body] * len(self.rows) if values is None else [{**body, "value": v} for v in values]

    def _rows(self, count: int) -> dict[int, int]:
        """Which sub-environments it is of: the place of each in the request."""
        lanes, mask, ids = (self.body.get(name) for name in ("lanes", "mask", "ids"))
        if lanes is not None:
            listed = lanes.tolist() if isinstance(lanes, np.ndarray) and lanes.dtype == np.int64 else None
        elif self.op == "reset" and mask is not None:
            right = isinstance(mask, np.ndarray) and mask.dtype == np.bool_ and mask.shape == (count,)
            listed = np.flatnonzero(mask).tolist() if right else None
        elif self.op in {"set_attr", "call"} and ids is not None:
            listed = ids if isinstance(ids, list) else None
        else:
            listed = list(range(count))
        if listed is None or not all(type(i) is int and 0 <= i < count for i in listed):
            raise MalformedMessage(f"a journal's request names sub-environments below {count}")
        return {i: row for row, i in enumerate(listed)}

    def deed(self, i: int) -> Deed | None:
        """What it is to sub-environment ``i``."""
        row = self.rows.get(i)
        return None if row is None else Deed(self.op, self._given[row])


def _checked(origin: object) -> Frame | None:
    if origin is None:
        return None
    read = unpack(origin) if type(origin) is bytes else None
    if type(read) is not dict:
        raise MalformedMessage("an origin is a packed map, as it was told, or nothing")
    return read


def _plan(i: int, requests: list[_Request], begin: int, end: int, origin: Frame | None, digest: int) -> Plan:
    if not -1 <= begin < max(1, len(requests)) or end >= len(requests) or (origin is None) != (begin < 0):
        raise MalformedMessage(f"the journal of sub-environment {i} begins or ends where there is none")
    deeds = [deed for request in requests[: max(0, begin)] if request.op == "set_attr" and (deed := request.deed(i))]
    if origin is not None:
        first = requests[begin].deed(i)
        deeds.append(Deed("origin", (origin, first.given[1] if first is not None and first.op == "reset" else None)))
    deeds += [deed for request in requests[begin + 1 : end + 1] if (deed := request.deed(i))]
    return Plan(deeds, digest, 0 if origin is None else origin.get("number", 0))


class Redoing:
    """Does plans again.

    Args:
        subs: fresh sub-environments, with digests.
        change: carries out ``set_attr`` or ``call`` on one of them.
        wanted: whether the session still is.
    """

    def __init__(self, subs: SubEnvs, change: Callable[[int, Deed], Any], wanted: Callable[[], bool]) -> None:
        self._subs = subs
        self._change = change
        self._wanted = wanted

    def one(self, i: int, plan: Plan) -> Done:
        """Do one again; to be called on a thread.

        Raises:
            ReplayDiverged: it has not led where the client was told that it was, or something was refused.
            SessionUnknown: the session has ended meanwhile.
            Crashed: the env raised.
        """
        told = _Told(self._subs, i)
        for deed in plan.deeds:
            with _refused(deed):
                self._check(i, deed)
                told.took(deed, self._do(i, deed))
        return told.done(plan)

    async def one_async(self, i: int, plan: Plan) -> Done:
        """The same of an env with coroutine functions."""
        told = _Told(self._subs, i)
        for deed in plan.deeds:
            with _refused(deed):
                self._check(i, deed)
                told.took(deed, await self._do_async(i, deed))
            await asyncio.sleep(0)  # others of this worker have their turns
        return told.done(plan)

    def _check(self, i: int, deed: Deed) -> None:
        if not self._wanted():
            raise SessionUnknown(f"{self._subs.name}: the session ended during its replay", reason="closed")
        if deed.op == "step":
            self._subs.check_began("step", (i,))

    def _do(self, i: int, deed: Deed) -> Outcome | None:
        match deed.op:
            case "step":
                return self._subs.step_one(i, deed.given)
            case "reset":
                return self._subs.reset_one(i, *deed.given)
            case "origin":
                return self._subs.reset_from(i, *deed.given)
        self._change(i, deed)
        return None

    async def _do_async(self, i: int, deed: Deed) -> Outcome | None:
        match deed.op:
            case "step":
                return await self._subs.step_one_async(i, deed.given)
            case "reset":
                return await self._subs.reset_one_async(i, *deed.given)
            case "origin":
                return await self._subs.reset_from_async(i, *deed.given)
        await self._subs.awaited(i, self._change, i, deed)
        return None


class _Told:
    """What a sub-environment tells as it is done again."""

    def __init__(self, subs: SubEnvs, i: int) -> None:
        assert subs.proof is not None, "what proves nothing is not done again"
        self._subs = subs
        self._proof = subs.proof
        self._i = i
        self._rows: list[Outcome] = []
        self._anew = False
        self._last: Outcome | None = None
        self._resets = self._steps = 0

    def took(self, deed: Deed, outcome: Outcome | None) -> None:
        """That deed came to it."""
        if outcome is None:
            return
        self._last = outcome
        if deed.op == "step":
            self._steps += 1
        if deed.op == "reset" or (deed.op == "step" and (outcome.terminated or outcome.truncated)):
            self._resets, self._steps = self._resets + 1, 0
        if self._proof.take_origin(self._i):
            self._rows.clear()
            self._anew = True
        self._rows.append(outcome)
        if len(self._rows) == ROWS:
            self._digest()

    def _digest(self) -> None:
        if self._rows:
            out = Outcomes.of(self._rows)
            flags = flags_of(out.terminated), flags_of(out.truncated)
            self._proof.chain(self._i, self._subs.stack(out.obs), rewards_of(out.rewards), flags, anew=self._anew)
            self._rows.clear()
            self._anew = False

    def done(self, plan: Plan) -> Done:
        """All of it is done.

        Raises:
            ReplayDiverged: it told something else before.
        """
        self._digest()
        if self._proof.digest_of(self._i) != plan.digest:
            env_id = self._subs.first + self._i
            raise ReplayDiverged(
                f"{self._subs.name}: {len(plan.deeds)} requests were done again of sub-environment {env_id} and led to "
                "another state: the env does not do the same when asked the same, or is another one",
                env_id=env_id,
            )
        return Done(self._last, self._resets, self._steps)


@contextmanager
def _refused(deed: Deed) -> Iterator[None]:
    """What is refused now was not when it was asked first."""
    try:
        yield
    except (MalformedMessage, SessionUnknown):
        raise
    except MeshError as exc:
        raise ReplayDiverged(f"a {deed.op} of the journal was refused: {exc.message}", op=deed.op) from exc

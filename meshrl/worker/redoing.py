"""Doing again: the journals of a lost session's sub-environments, each by itself in a fresh env (R8).

A replay holds the journals of all of them as one list of requests; here it is taken apart for each, so that slow ones
can be done on threads of their own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np

from meshrl.errors import MalformedMessage, MeshError, ReplayDiverged, SessionUnknown
from meshrl.protocol.journal import CHANGING, MAX_ENTRIES
from meshrl.protocol.seeds import check_seed
from meshrl.wire.batches import Batching
from meshrl.wire.codec import unpack
from meshrl.wire.frames import Frame
from meshrl.worker.outcomes import Outcome, flags_of, rewards_of
from meshrl.worker.sub_envs import FEW_IDS, SubEnvs

# Rows that wait to be taken into a digest together.
ROWS = 256


class Deed(NamedTuple):
    """One thing to do with a sub-environment.

    Attributes:
        op: ``step``, ``reset``, ``set_attr``, ``call``, or ``origin``, the reset with which its journal begins.
        given: the action; the seed and the options; the request; the origin and the options.
    """

    op: str
    given: Any


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


class Replay:
    """A replay request: what is to be done again of each sub-environment.

    Args:
        body: the request.
        count: how many sub-environments there are.
        batches: of their actions.

    Raises:
        MalformedMessage: it is none, as far as can be seen at once. Its requests are read when somebody needs them, on
            a thread: a journal may have a million.
    """

    def __init__(self, body: Frame, count: int, batches: Batching) -> None:
        journal, origins = body.get("journal"), body.get("origins")
        arrays = [body.get(name) for name in ("begins", "ends", "digests")]
        if not isinstance(journal, list) or len(journal) > MAX_ENTRIES:
            raise MalformedMessage(f"a replay needs a journal, a list of at most {MAX_ENTRIES} requests")
        if not isinstance(origins, list) or len(origins) != count:
            raise MalformedMessage(f"a replay needs {count} origins, nil where there is none")
        for array, dtype in zip(arrays, (np.int64, np.int64, np.uint64), strict=True):
            if not isinstance(array, np.ndarray) or array.shape != (count,) or array.dtype != dtype:
                raise MalformedMessage(
                    f"a replay of {count} sub-environments needs begins, ends and digests of as many"
                )
        self._journal = journal
        self._origins = [_checked(origin) for origin in origins]
        self._begins, self._ends, self._digests = (array.tolist() for array in arrays if array is not None)
        for i, origin in enumerate(self._origins):
            begin, end = self._begins[i], self._ends[i]
            if not -1 <= begin < max(1, len(journal)) or not -1 <= end < max(1, len(journal)):
                raise MalformedMessage(f"the journal of sub-environment {i} begins or ends where there is none")
            if (origin is None) != (begin < 0) or (end >= 0 and not journal):
                raise MalformedMessage(f"the journal of sub-environment {i} begins or ends where there is none")
        self._count = count
        self._batches = batches
        self._requests: list[_Request] | None = None
        self._reading = threading.Lock()

    @property
    def only_sets(self) -> bool:
        """Whether it sets attributes and does nothing else."""
        entries = all(type(entry) is list and entry[:1] == ["set_attr"] for entry in self._journal)
        return entries and not any(self._origins)

    def digest(self, i: int) -> int:
        """What all that sub-environment ``i`` tells must come to."""
        return int(self._digests[i])

    def number(self, i: int) -> Any:
        """Of the episode with which it begins, in a pool; 0 where it begins with nothing."""
        origin = self._origins[i]
        return 0 if origin is None else origin.get("number", 0)

    def deeds(self, i: int) -> Iterator[Deed]:
        """What is to be done with it, in order.

        Raises:
            MalformedMessage: there is something in the journal that is no request.
        """
        with self._reading:
            if self._requests is None:
                self._requests = [_Request(entry, self._count, self._batches) for entry in self._journal]
        requests, begin, end, origin = self._requests, self._begins[i], self._ends[i], self._origins[i]
        for request in islice(requests, max(0, begin)):
            if request.op == "set_attr":
                yield from request.deeds(i)
        if origin is not None:
            yield Deed("origin", (origin, requests[begin].options_of(i)))
        for request in islice(requests, begin + 1, end + 1):
            yield from request.deeds(i)


class _Request:
    """An entry of a journal, read once for all sub-environments."""

    __slots__ = ("_given", "_options", "_rows", "op")

    def __init__(self, entry: object, count: int, batches: Batching) -> None:
        self.op, body = read_entry(entry)
        listed = self._listed(body, count)
        # Where each sub-environment stands in it; None: where it stands among all.
        self._rows: dict[int, list[int]] | None = None
        if listed is not None:
            self._rows = {}
            for row, i in enumerate(listed):
                self._rows.setdefault(i, []).append(row)
        rows = count if listed is None else len(listed)
        self._options = body.get("options")
        if self.op == "step":
            actions = body.get("actions")
            batches.check(actions, rows, "actions", exact=False)
            # An array is its own list of rows, and takes a tenth of the memory.
            self._given: Any = actions if type(actions) is np.ndarray else list(batches.rows(actions, rows))
        elif self.op == "reset":
            if self._options is not None and not isinstance(self._options, dict):
                raise MalformedMessage("reset options are a map or nothing")
            self._given = self._seeds(body, count, listed)
        else:
            values = body.get("values")
            if self.op == "set_attr" and (not isinstance(values, list) or len(values) != rows):
                raise MalformedMessage("a journal's set_attr has a value for each")
            self._given = body

    @staticmethod
    def _seeds(body: Frame, count: int, listed: list[int] | None) -> list[int | None] | None:
        """Of each row its seed; a vector's seeds are of all its sub-environments, a pool's of the lanes named."""
        seeds = body.get("seeds")
        if seeds is None:
            return None
        given = len(listed) if listed is not None and "lanes" in body else count
        if not isinstance(seeds, list) or len(seeds) != given:
            raise MalformedMessage("a journal's reset has a seed for each, or none")
        checked = [None if seed is None else check_seed(seed) for seed in seeds]
        return checked if listed is None or "lanes" in body else [checked[i] for i in listed]

    def _listed(self, body: Frame, count: int) -> list[int] | None:
        """Which sub-environments it is of; None for all."""
        lanes, mask, ids = (body.get(name) for name in ("lanes", "mask", "ids"))
        listed: Any = None
        if lanes is not None:
            right = isinstance(lanes, np.ndarray) and lanes.dtype == np.int64 and lanes.ndim == 1
            listed = lanes.tolist() if right else [-1]
            if len(set(listed)) != len(listed):
                raise MalformedMessage("a journal's request names a lane once")
        elif self.op == "reset" and mask is not None:
            right = isinstance(mask, np.ndarray) and mask.dtype == np.bool_ and mask.shape == (count,)
            listed = np.flatnonzero(mask).tolist() if right else [-1]
        elif self.op in {"set_attr", "call"} and ids is not None:
            listed = ids if isinstance(ids, list) and len(ids) <= max(count, FEW_IDS) else [-1]
        if listed is not None and not all(type(i) is int and 0 <= i < count for i in listed):
            raise MalformedMessage(f"a journal's request names sub-environments below {count}")
        return cast("list[int] | None", listed)

    def options_of(self, i: int) -> Frame | None:
        """Those that sub-environment ``i`` was reset with, if this is a reset of it."""
        return self._options if self.op == "reset" and (self._rows is None or i in self._rows) else None

    def deeds(self, i: int) -> Iterator[Deed]:
        """What it is to sub-environment ``i``: nothing, or once for each time that it is named."""
        for row in (i,) if self._rows is None else self._rows.get(i, ()):
            if self.op == "step":
                yield Deed("step", self._given[row])
            elif self.op == "reset":
                yield Deed("reset", (None if self._given is None else self._given[row], self._options))
            elif self.op == "set_attr":
                yield Deed("set_attr", {**self._given, "value": self._given["values"][row]})
            else:
                yield Deed("call", self._given)


def _checked(origin: object) -> Frame | None:
    if origin is None:
        return None
    read = unpack(origin) if type(origin) is bytes else None
    if type(read) is not dict:
        raise MalformedMessage("an origin is a packed map, as it was told, or nothing")
    return read


class Redoing:
    """Does plans again.

    Args:
        subs: fresh sub-environments; without digests, only attributes are set.
        change: carries out ``set_attr`` or ``call`` on one of them.
        wanted: whether the session still is.
    """

    def __init__(self, subs: SubEnvs, change: Callable[[int, Deed], Any], wanted: Callable[[], bool]) -> None:
        self._subs = subs
        self._change = change
        self._wanted = wanted

    def one(self, i: int, replay: Replay) -> Done:
        """Do one again; to be called on a thread.

        Raises:
            ReplayDiverged: it has not led where the client was told that it was, or something was refused.
            SessionUnknown: the session has ended meanwhile.
            MalformedMessage: there is something in the journal that is no request.
            Crashed: the env raised.
        """
        told = _Told(self._subs, i)
        for deed in replay.deeds(i):
            with _refused(deed):
                self._check(i, deed)
                told.took(deed, self._do(i, deed))
        return told.done(replay.digest(i))

    async def one_async(self, i: int, replay: Replay) -> Done:
        """The same of an env with coroutine functions."""
        told = _Told(self._subs, i)
        for deed in replay.deeds(i):
            with _refused(deed):
                self._check(i, deed)
                told.took(deed, await self._do_async(i, deed))
            await asyncio.sleep(0)  # others of this worker have their turns
        return told.done(replay.digest(i))

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
        self._subs = subs
        self._proof = subs.proof
        self._i = i
        # Observations as batches of one: copies, since an env may fill the same array again.
        self._rows: list[tuple[Any, Any, Any, Any]] = []
        self._anew = False
        self._last: Outcome | None = None
        self._resets = self._steps = 0

    def took(self, deed: Deed, outcome: Outcome | None) -> None:
        """That deed came to it."""
        if outcome is not None and self._subs.recording is not None:
            self._subs.recording.redone(self._i, deed.given if deed.op == "step" else None, outcome)
        if outcome is None or self._proof is None:
            return
        self._last = outcome
        if deed.op == "step":
            self._steps += 1
        if deed.op == "reset" or (deed.op == "step" and (outcome.terminated or outcome.truncated)):
            self._resets, self._steps = self._resets + 1, 0
        if self._proof.take_origin(self._i):
            self._rows.clear()
            self._anew = True
        obs, reward, terminated, truncated, _ = outcome
        self._rows.append((self._subs.stack([obs]), reward, terminated, truncated))
        if len(self._rows) == ROWS:
            self._digest()

    def _digest(self) -> None:
        if self._rows and self._proof is not None:
            obs, rewards, terminated, truncated = zip(*self._rows, strict=True)
            batch = self._subs.batches.joined(obs, [1] * len(obs))
            flags = flags_of(list(terminated)), flags_of(list(truncated))
            self._proof.chain(self._i, batch, rewards_of(list(rewards)), flags, anew=self._anew)
            self._rows.clear()
            self._anew = False

    def done(self, digest: int) -> Done:
        """All of it is done, and should have come to that digest.

        Raises:
            ReplayDiverged: it told something else before.
        """
        self._digest()
        if self._proof is not None and self._proof.digest_of(self._i) != digest:
            env_id = self._subs.first + self._i
            raise ReplayDiverged(
                f"{self._subs.name}: what sub-environment {env_id} was asked was done again and led to another state: "
                "the env does not do the same when asked the same, or is another one",
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

"""A transcript: what a session's lanes were asked and told since the last chunk of its recording.

On the step path it only puts aside what an answer was made of. Everything else is done for some thousand rows at once
when a chunk is taken, on whichever thread has time for it (:mod:`~meshrl.protocol.chunking`).

    began    a lane is about to be reset            any thread, one at a time for each lane
    note     a step or reset is about to be answered           the worker's event loop
    settle   the answer has left: large observations, which are the envs' own, are taken in now     the same
    take     what was noted becomes a chunk         one thread at a time
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from meshrl.protocol.block import Answer, Block, is_plain
from meshrl.protocol.digests import hashes_of, seen
from meshrl.protocol.noted import (
    Asked,
    Began,
    Indices,
    Info,
    Note,
    One,
    finals_of,
    packed_info,
    packed_infos,
    rows_in,
)
from meshrl.protocol.shelf import Shelf
from meshrl.protocol.stored import Stored, Told
from meshrl.protocol.values import hashes_of_values, numbers_of, own, truths_of
from meshrl.wire.batches import Batching, form_of
from meshrl.wire.large import LARGE_BYTES, Rows

Level = Literal["actions", "full"]
# Of one env, before it is taken in.
_Untold = tuple[float, Any, Any, Any, Any, Any, Any, "Began | None"]

# Of an episode's number, as clients keep it.
_NUMBER_BITS = 40
# Whether observations were hashed: those that were and those that are kept stand in no chunk together.
_BOTH = {True, False}
# What may wait to be taken.
MAX_NOTED_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class _Full:
    """What is called when as much was noted; a new one each time, since one thread sets it and another one calls."""

    at: float
    call: Callable[[], None]


@dataclass(slots=True)
class Transcript:
    """What the lanes of one session did, until it is taken.

    Args:
        count: of lanes.
        observations: the space of each.
        actions: the same.
        level: ``full`` keeps observations and infos too.
        hashes_at_once: whether observations are too large to be kept until a chunk is taken.
        row_bytes: about what a row takes of a chunk; what it takes until then is added.
        shown_bytes: of one observation.

    Attributes:
        closed: nobody takes what is noted, so that nothing is; see :meth:`close`.
        strict: somebody waits for all that is noted, so that it is stored at once.
        missed: rows that were not noted, since too many were not taken.
        policy: the version of whoever chooses the actions from now on, where that is said.
        watched: whether somebody watches, so that observations and infos are noted whatever the level is.
        redone: whether its session was brought back by a replay.
        begun: the epoch in which the recording began that it goes on with.
    """

    count: int
    observations: Batching
    actions: Batching
    level: Level
    hashes_at_once: bool
    row_bytes: int
    shown_bytes: int = 0
    policy: int | None = None
    closed: bool = False
    strict: bool = False
    missed: int = 0
    watched: bool = False
    redone: bool = False
    begun: int = 1
    _stored: Stored = field(default_factory=Stored)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _full: _Full = field(default_factory=lambda: _Full(math.inf, lambda: None))
    _noted_bytes: int = 0
    _taken_bytes: int = 0
    _most: int = 0  # that may be noted and not taken
    _shelf: Shelf | None = None  # for observations, where they are arrays
    _began: dict[int, Began] = field(default_factory=dict)
    _numbers: list[int] = field(default_factory=list)
    _noted: deque[Block | Note | One | Asked] = field(default_factory=deque)
    _block: Block | None = None  # the last of them, where that is one which goes on
    _unsettled: list[Note] = field(default_factory=list)
    _unsettled_ones: list[_Untold] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = [0] * self.count
        self._most = MAX_NOTED_BYTES
        space = self.observations.space
        if form_of(space) == "array" and space.dtype is not None and space.shape:
            self._shelf = Shelf(space.dtype, space.shape)
        if self.level == "actions" and not self.hashes_at_once:  # kept until they are hashed, and in no chunk
            self.row_bytes += self.shown_bytes

    @property
    def shows(self) -> bool:
        """Whether observations and infos are kept."""
        return self.level == "full" or self.watched

    @property
    def settles(self) -> bool:
        """Whether there is anything to do when an answer has left."""
        return self.hashes_at_once or self.count * self.shown_bytes >= LARGE_BYTES

    @property
    def nbytes(self) -> int:
        """About what was noted and not taken, in bytes of a chunk."""
        return self._noted_bytes - self._taken_bytes

    def began(self, lane: int, seed: int | None, state: bytes | None, options: Info | None) -> int:
        """A lane is about to be reset; the next answer to it shows what that gave.

        Returns:
            the episode's number as its client keeps it for a replay: with the epoch in which its recording began.
        """
        number = self._numbers[lane]
        self._numbers[lane] = number + 1
        self._began[lane] = Began(number, seed, state, options)
        return self.begun << _NUMBER_BITS | number

    def numbered(self, lane: int, nth: int) -> None:
        """The next episode of a lane is that one: it is done again."""
        self.begun, self._numbers[lane] = nth >> _NUMBER_BITS, nth & ((1 << _NUMBER_BITS) - 1)

    def note(
        self,
        at: float,
        lanes: Indices | None,
        actions: Any,
        obs: Any,
        rewards: NDArray[np.float64],
        terminations: NDArray[np.bool_],
        truncations: NDArray[np.bool_],
        infos: Sequence[tuple[int, Info]],
        policies: list[int | None] | None = None,
    ) -> None:
        """A step, or an explicit reset (``actions`` None), is about to be answered.

        Of observations nothing is copied that is in a batch of its own already.

        Args:
            at: now, in monotonic seconds.
            lanes: of each row; None for all of them in order.
            actions: a batch of one a row.
            obs: the same of what is told.
            rewards: one a row.
            terminations: one a row.
            truncations: one a row.
            infos: pairs (row, info), those of a step that ended before that of the reset that followed it.
            policies: of each row, where requests are answered in another order than they came.
        """
        begun: dict[int, Began] = {}
        if self._began:
            if lanes is None:
                begun, self._began = self._began, begun
            else:
                began = self._began
                begun = {row: began.pop(lane) for row, lane in enumerate(lanes.tolist()) if lane in began}
        finals: Sequence[tuple[int, Any]] = ()
        told: Sequence[tuple[int, bool, bytes]] = ()
        if infos:
            if begun and actions is not None:
                ended = {row for row in begun if terminations[row] or truncations[row]}
                finals = finals_of([one for one in infos if one[0] in ended]) if ended else ()
            if self.shows:
                told = packed_infos(infos, {row for row, _ in finals})
        rows, more = len(rewards) + len(finals), sum([len(info) for _, _, info in told]) if told else 0
        if lanes is None and not self.hashes_at_once:
            if self._noted_bytes - self._taken_bytes > self._most and self._refuses(len(rewards)):
                return
            nbytes = rows * self.row_bytes + more
            answer = at, actions, obs, rewards, terminations, truncations, begun, finals, told, nbytes
            if (self._block is not None and self._block.add(answer, self.policy)) or self._begin_block(answer):
                self._noted_now(nbytes)
                return
        policy = self.policy if policies is None else policies
        nbytes = self._bytes_of(rows) + more
        note = Note(at, lanes, actions, obs, rewards, terminations, truncations, begun, finals, told, policy, nbytes)
        if self.hashes_at_once or type(obs) is Rows:
            self._unsettled.append(note)
        else:
            self._keep(note)

    def _begin_block(self, answer: Answer) -> bool:
        """Begin a new one with an answer to all lanes; gives whether it can stand in one, or is noted by itself."""
        _, actions, obs, *_ = answer
        if not (is_plain(actions) and is_plain(obs)):
            return False
        self._close_block()
        block = self._block = Block(actions, obs, self.policy)
        self._noted.append(block)
        return block.add(answer, self.policy)

    def _close_block(self) -> None:
        """What is noted next stands behind it."""
        if self._block is not None:
            self._block.closed = True
            self._block = None

    def note_one(
        self, at: float, action: Any, obs: Any, reward: Any, terminated: Any, truncated: Any, info: Any, *, reset: bool
    ) -> None:
        """The same of a session of one env; an explicit reset has no action, and no one else writes to any other."""
        begun = self._began.pop(0, None) if reset else None
        one = (at, action, obs, reward, terminated, truncated, info, begun)
        if self.hashes_at_once:
            self._unsettled_ones.append(one)
        else:
            self._settle_one(*one)

    def asked(self, at: float, lane: int, op: str, given: Info) -> None:
        """A method of a lane's env was called, or an attribute set."""
        self.settle()
        self._keep(Asked(at, lane, op, given))

    def note_redone(
        self, at: float, lane: int, action: Any, obs: Any, reward: Any, ended: tuple[Any, Any], infos: Sequence[Info]
    ) -> None:
        """What one of several lanes told as it was done again; on any thread, and taken in at once."""
        begun = self._began.pop(lane, None)
        finals = [] if begun is None else finals_of([(0, info) for info in infos])
        note = Note(
            at,
            np.array([lane], np.int64),
            None if action is None else [own(action)],
            self.observations.stack([obs]),
            numbers_of([reward]),
            truths_of([ended[0]]),
            truths_of([ended[1]]),
            {} if begun is None else {0: begun},
            finals,
            packed_infos([(0, info) for info in infos], {0} if finals else ()) if self.shows else (),
            self.policy,
            self._bytes_of(1 + len(finals)),
        )
        if self.hashes_at_once and not self.shows:
            note = self._hashed(note)
        with self._lock:
            self._keep(note)

    def settle(self) -> None:
        """Take in what envs may write to again, when the answer has left and before more is asked of them.

        On one thread at a time: a session may end on the event loop while its env is done again on another.
        """
        if self._unsettled or self._unsettled_ones:
            with self._lock:
                self._settle()

    def _settle(self) -> None:
        unsettled, self._unsettled = self._unsettled, []
        for note in unsettled:
            if self.hashes_at_once and not self.shows:
                self._keep(self._hashed(note))
            else:
                self._keep(note._replace(obs=note.obs.stacked()) if type(note.obs) is Rows else note)
        ones, self._unsettled_ones = self._unsettled_ones, []
        for one in ones:
            self._settle_one(*one)

    def _settle_one(
        self,
        at: float,
        action: Any,
        obs: Any,
        reward: Any,
        terminated: Any,
        truncated: Any,
        info: Any,
        begun: Began | None,
    ) -> None:
        packed, number, hash_, shows, nbytes = None, None, None, self.shows, self._bytes_of(1)
        shelf = self._shelf
        if shows and info:
            packed = packed_info(info) or None
            nbytes += len(packed or b"")
        if self.hashes_at_once:
            if shelf is not None:
                number = seen(obs, shelf.dtype, shelf.shape)
            if not shows:
                if number is None:
                    anew = [0] if begun else []
                    columns = [reward], [terminated], [truncated]
                    hash_ = int(hashes_of_values(self.observations, [obs], *columns, anew)[0])
                obs = None
        if obs is not None:
            obs = own(obs) if number is None or shelf is None else shelf.put(obs)
        self._keep(
            One(at, action, obs, reward, terminated, truncated, packed, begun, self.policy, nbytes, hash_, number)
        )

    def _keep(self, note: Note | One | Asked) -> None:
        if self._noted_bytes - self._taken_bytes > self._most and self._refuses(rows_in(note)):
            return
        if self._block is not None:
            self._close_block()
        self._noted.append(note)
        self._noted_now(note.nbytes)

    def _noted_now(self, nbytes: int) -> None:
        self._noted_bytes += nbytes
        full = self._full
        if self._noted_bytes >= full.at:
            full.at = math.inf
            full.call()

    def _refuses(self, rows: int) -> bool:
        """Whether these cannot be noted, where there is as much as there may be, or nobody takes it."""
        if self.closed:
            return True
        if self.strict:  # who is answered nothing does not go on
            return False
        self.missed += rows
        return True

    def _bytes_of(self, rows: int) -> int:
        """About what they take until they are taken; what is hashed at once is kept for viewers alone."""
        shown = self.watched and self.hashes_at_once and self.level == "actions"
        return rows * (self.row_bytes + (self.shown_bytes if shown else 0))

    def _hashed(self, note: Note) -> Note:
        """The same with hashes in place of observations, of the rows and of the finals behind them."""
        batches, count = self.observations, len(note.rewards)
        flags = note.terminations, note.truncations
        hashes = hashes_of(list(batches.leaves(note.obs, count)), note.rewards, *flags, list(note.begun))
        if note.finals:
            rows = [row for row, _ in note.finals]
            ended = batches.stack([obs for _, obs in note.finals])
            told = (note.rewards[rows], note.terminations[rows], note.truncations[rows])
            hashes = np.concatenate([hashes, hashes_of(list(batches.leaves(ended, len(rows))), *told)])
        return note._replace(hashes=hashes, obs=None, finals=[(row, None) for row, _ in note.finals])

    def taken(self, limit_bytes: int) -> list[Note | One | Asked]:
        """What was noted, the oldest first, at most about so much of it; at least one note if there is any.

        Where somebody began to watch, or does no more, it ends.
        """
        taken: list[Note | One | Asked] = []
        part: Note | One | Asked | None
        hashed: bool | None = None
        noted, size = self._noted, 0
        while noted:
            first = noted[0]
            if isinstance(first, Block):
                closed = first.closed  # looked at first: nothing is written after it
                part = first.taken(limit_bytes - size, least=not taken)
                if part is None:
                    if not (closed and first.exhausted):
                        break
                    noted.popleft()
                    continue
            else:
                part, its = first, first.hashed
                if taken and (part.nbytes > limit_bytes - size or {hashed, its} == _BOTH):
                    break
                hashed = hashed if its is None else its
                noted.popleft()
            size += part.nbytes
            taken.append(part)
        self._taken_bytes += size
        if self._shelf is not None and taken:
            self._shelf = self._shelf.another()
        return taken

    # ---------------------------------------------------------------- when to take it

    @property
    def oldest_at(self) -> float:
        """When the first of what was noted and not taken was told; infinity if there is nothing."""
        for k in range(len(self._noted)):
            first = self._noted[k]
            if not isinstance(first, Block):
                return float(first.at)
            if not first.exhausted:
                return first.oldest_at
        return math.inf

    def when_full(self, nbytes: int, full: Callable[[], None]) -> None:
        """Call ``full`` once, on the thread that notes it, when about as much was noted and not taken."""
        self._full = _Full(self._taken_bytes + nbytes, full)

    # ---------------------------------------------------------------- whether it is stored

    def when_stored(self, told: Told) -> None:
        """Call ``told``, on any thread, when all that was noted so far is stored: with None, or with why it is not."""
        self._stored.when(self._noted_bytes, told)

    def settled(self, why: str | None) -> None:
        """All that was taken is stored, or, where it is said why, is not."""
        self._stored.settled(self._noted_bytes if self.closed else self._taken_bytes, why)

    def close(self) -> None:
        """Note nothing more: nobody takes it."""
        self.closed, self._most = True, -1
        self.settled("it is recorded no more")

    def dropped(self) -> tuple[set[int], int]:
        """Forget what was noted, where nobody could keep it; gives the lanes that miss something now, and the rows."""
        lanes: set[int] = set()
        rows = 0
        while taken := self.taken(1 << 62):
            rows += sum(map(rows_in, taken))
            for one in taken:
                if isinstance(one, Note):
                    lanes.update(range(self.count) if one.lanes is None else one.lanes.tolist())
                else:
                    lanes.add(one.lane if isinstance(one, Asked) else 0)
        return lanes, rows

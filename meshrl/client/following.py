"""Following the index of episodes: entry after entry from a place on, each episode once.

A place is known by an entry's number in the stream and by when it was stored, and with both it is seen where the index
is another one than before::

    the entry is there, stored then            go on in it
    another one was stored since, before it    the stream was made anew: begin with its first entry
    neither                                    retention has taken it: go on with the first behind it
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from meshrl.errors import MalformedMessage
from meshrl.recording.library import Library, Located

log = logging.getLogger("meshrl.client")

# Of so many sessions it is kept which of their episodes were told last; of others the index is asked.
KEPT_SESSIONS = 4096
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a reader stands in the index.

    Attributes:
        seq: the number of an entry in its stream; 0 before the first.
        at_us: when that was stored, in microseconds of the server's clock since 1970.
        row: how many of its episodes are behind.
        step: how many steps of the next one are.
    """

    seq: int = 0
    at_us: int = 0
    row: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"{self.seq}.{self.at_us}.{self.row}.{self.step}"

    @property
    def at(self) -> datetime:
        """When its entry was stored."""
        return _EPOCH + self.at_us * _MICROSECOND

    @classmethod
    def parse(cls, text: Any) -> Place:
        """The place that a text says.

        Raises:
            MalformedMessage: it says none.
        """
        parts = text.split(".") if isinstance(text, str) else []
        if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
            raise MalformedMessage("a position in the index of episodes is four whole numbers with points between them")
        return cls(*map(int, parts))


class Following:
    """Reads the index of the episodes of an env, from a place on, as often as it is asked to.

    Args:
        library: that reads it.
        env: the served name.
        place: where to begin.
        since: the time from which entries are wanted, where that is the beginning.
    """

    def __init__(self, library: Library, env: str, place: Place, since: datetime | None) -> None:
        self._library = library
        self._env = env
        self._place = place
        self._since = since
        # Of each lane of a session, the number of the last episode that was told: they only ever rise.
        self._told: OrderedDict[str, dict[int, int]] = OrderedDict()
        self._knows_all = place == Place() and since is None

    async def look(self) -> AsyncIterator[tuple[Place, Located]]:
        """The episodes that there are now and were not told before, each with where it begins.

        Raises:
            MeshError: as of :class:`~meshrl.bus.storing.Reader`.
        """
        begin = self._place
        async for found in self._look(begin):
            yield found
        if begin.seq and not self._place.seq:  # it was made anew
            async for found in self._look(self._place):
                yield found

    async def _look(self, begin: Place) -> AsyncIterator[tuple[Place, Located]]:
        checked = begin.seq == 0
        since = self._since if checked else None
        async for stored, episodes in self._library.entries(self._env, max(1, begin.seq), since=since):
            at_us = (stored.at - _EPOCH) // _MICROSECOND
            row, step = 0, 0
            if not checked and (stored.seq, at_us) == (begin.seq, begin.at_us):
                row, step = begin.row, begin.step
            elif not checked:
                if await self._is_anew():
                    return
                log.warning(
                    "experience of %s: what the index had behind %s is kept no more; it goes on at %s",
                    self._env,
                    begin.at.isoformat(timespec="seconds"),
                    stored.at.isoformat(timespec="seconds"),
                )
            checked = True
            for at in range(row, len(episodes)):
                if not await self._was_told(stored.seq, episodes[at]):
                    yield Place(stored.seq, at_us, at, step if at == row else 0), episodes[at]
            self._place = Place(stored.seq, at_us, len(episodes))
        if not checked:
            await self._is_anew()

    async def _is_anew(self) -> bool:
        """Whether the stream is another one than that of the place; then it begins with its first entry."""
        place = self._place
        async for stored, _ in self._library.entries(self._env, since=place.at, limit=1):
            if stored.seq <= place.seq and stored.at > place.at:
                log.warning(
                    "experience of %s: the index of episodes was made anew; it goes on with the first of them",
                    self._env,
                )
                self._place, self._since = Place(), None
                return True
        return False

    # ---------------------------------------------------------------- each once

    def passed(self, located: Located) -> None:
        """It was told: an entry that tells it again does so in vain."""
        entry, row = located.entry, located.row
        lanes = self._told[entry.session]
        lane, number = int(entry.lanes[row]), int(entry.numbers[row])
        lanes[lane] = max(number, lanes.get(lane, -1))

    async def _was_told(self, seq: int, located: Located) -> bool:
        """Whether an entry before that one has it."""
        entry, row = located.entry, located.row
        lanes = self._told.get(entry.session)
        if lanes is None:
            lanes = self._told[entry.session] = {} if self._knows_all else await self._before(seq, entry.session)
            if len(self._told) > KEPT_SESSIONS:
                self._told.popitem(last=False)
                self._knows_all = False
        self._told.move_to_end(entry.session)
        return int(entry.numbers[row]) <= lanes.get(int(entry.lanes[row]), -1)

    async def _before(self, seq: int, session: str) -> dict[int, int]:
        lanes: dict[int, int] = {}
        async for stored, episodes in self._library.entries(self._env, session=session):
            if stored.seq >= seq:
                break
            for one in episodes:
                lane, number = int(one.entry.lanes[one.row]), int(one.entry.numbers[one.row])
                lanes[lane] = max(number, lanes.get(lane, -1))
        return lanes

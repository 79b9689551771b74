"""A watcher: the changes of the directory that one ``async for`` has not seen yet.

Somebody who looks seldom is told where things stand, not each step of the way, so what is kept for them is bounded by
what they know and what there is:

    unseen        joined      updated     left
    (nothing)     joined      updated     left
    joined        -           joined      (nothing)
    updated       -           updated     left
    left          left joined -           -
    left joined   -           left joined left
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterable

from meshrl.errors import MeshError
from meshrl.protocol.directory import Event, Key


class Watcher:
    """What one watcher has not seen yet, in order; an ``updated`` takes the place of the one before it."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._unseen: dict[Key, list[Event]] = {event.key: [event] for event in events}
        self._told = asyncio.Event()
        self._ended = False
        self._why: MeshError | None = None

    def __len__(self) -> int:
        return sum(map(len, self._unseen.values()))

    def __repr__(self) -> str:
        return f"<Watcher {len(self)} unseen{', ended' if self._ended else ''}>"

    def tell(self, event: Event) -> None:
        """Something changed."""
        unseen = self._unseen.setdefault(event.key, [])
        last = unseen[-1] if unseen else None
        if last is None or last.kind == "left":
            unseen.append(event)
        elif event.kind == "updated":
            unseen[-1] = Event(last.kind, event.key, event.advertisement)
        elif last.kind == "updated":
            unseen[-1] = event
        else:  # it joined and left unseen
            unseen[:] = [event] if len(unseen) > 1 else []
            if not unseen:
                del self._unseen[event.key]
        self._told.set()

    def end(self, why: MeshError | None = None) -> None:
        """Nothing more will change; with an error if that is no wish of this client's."""
        if not self._ended:
            self._ended, self._why = True, why
            self._told.set()

    async def next(self) -> Event | None:
        """The next change; None after the last.

        Raises:
            MeshError: the connection was ended, and not by this client.
        """
        while not self._unseen:
            if self._why is not None:
                raise copy.copy(self._why)
            if self._ended:
                return None
            self._told.clear()
            await self._told.wait()
        key, unseen = next(iter(self._unseen.items()))
        event = unseen.pop(0)
        if not unseen:
            del self._unseen[key]
        return event

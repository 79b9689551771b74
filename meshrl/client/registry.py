"""The registry as one client hears it: who is there, what they serve, and how busy this client believes them (R5)."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
from typing import Any

from meshrl.bus.connection import Connection
from meshrl.client.watcher import Watcher
from meshrl.errors import MalformedMessage, MeshError, from_wire
from meshrl.protocol.directory import Directory, Event, Key
from meshrl.protocol.names import resolve
from meshrl.protocol.placement import Placement
from meshrl.wire.codec import unpack
from meshrl.wire.messages import Advertisement, Ask, Kind, Known, check, parse
from meshrl.wire.subjects import Subjects

log = logging.getLogger("meshrl.client")

# At the start, workers answer the first ask within a few milliseconds; nobody is waited for longer than this.
FIRST_ASK_S = 0.5
# After the first answer, the others have this long.
OTHERS_S = 0.05
# How often silent workers are looked for.
EXPIRE_S = 0.5
# A description that does not come is asked for again after this long.
ASK_AGAIN_S = 1.0
# Each name that was asked for and refused, or is being made, is remembered until it is asked for again; of so many at
# most.
MAX_REFUSALS = 256


class Registry:
    """What a client hears on the registry's subjects.

    Attributes:
        directory: who is there.
        placement: what this client did that the directory cannot know yet.
        on_change: is called at every change.
        on_draining: is told again and again of each worker that is about to leave, and the seconds that are left.
    """

    def __init__(self, connection: Connection, subjects: Subjects) -> None:
        self.directory = Directory(sweep_s=EXPIRE_S)
        self.placement = Placement()
        self.on_change: set[Callable[[], None]] = set()
        self.on_draining: set[Callable[[str, float], None]] = set()
        self._connection = connection
        self._subjects = subjects
        self._changed_at = 0.0
        self._refusals: dict[tuple[str, str], Any] = {}  # as they came: a raised exception would pin its frames
        self._making: dict[str, float] = {}  # as asked for: when a worker last said that it makes it
        self._resolved: dict[tuple[str, str], str | None] = {}  # as long as the same names are served
        self._watchers: dict[Watcher, object] = {}  # and whose they are
        self._asked_about: dict[tuple[str, str, str], float] = {}
        self._heard = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._ask_id = 0
        self._ended = False

    def __repr__(self) -> str:
        return f"<Registry {self.directory!r}, {len(self._watchers)} watchers>"

    # ---------------------------------------------------------------- life

    async def listen(self) -> None:
        """Begin to listen; returns when those who are there have had time to say so."""
        # The request comes first: an advertisement that arrives while this waits for the subscription may make it ask.
        self._ask_id = self._connection.request(self._subjects.ask, Ask().to_wire(), self._on_known)
        self._connection.on_reconnect.append(lambda: self.ask(Ask()))
        await self._connection.subscribe(self._subjects.advertisements, self._on_advertisement)
        self._expire_later()
        try:
            async with asyncio.timeout(FIRST_ASK_S):
                await self._heard.wait()
        except TimeoutError:
            return
        if len(self.directory):
            await asyncio.sleep(OTHERS_S)

    def end(self, why: MeshError | None = None) -> None:
        """Nothing is heard any more: tell everyone who waits for a change."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for watcher in self._watchers:
            watcher.end(why)
        self._notify()

    # ---------------------------------------------------------------- who is there

    def resolve(self, kind: Kind, asked: str) -> str | None:
        """The served name that ``asked`` means now."""
        if (kind, asked) not in self._resolved:
            if len(self._resolved) >= MAX_REFUSALS:
                self._resolved.clear()
            self._resolved[kind, asked] = resolve(asked, self.directory.names(kind))
        return self._resolved[kind, asked]

    def refusal(self, kind: Kind, name: str) -> MeshError | None:
        """Why a worker that serves on demand does not begin to serve ``name``; a new error each time."""
        wire = self._refusals.get((kind, name))
        return None if wire is None else from_wire(wire)

    def making(self, name: str) -> float:
        """When a worker last said that it is making ``name``, in monotonic seconds; long ago if none did."""
        return self._making.get(name, -math.inf)

    async def change(self, timeout: float) -> bool:
        """Wait until something changes, or for ``timeout`` seconds; whether it did. Safe to cancel."""
        loop = asyncio.get_running_loop()
        changed: asyncio.Future[bool] = loop.create_future()

        def tell(what: bool) -> None:
            if not changed.done():
                changed.set_result(what)

        def told() -> None:
            tell(True)

        timer = loop.call_later(max(0.0, timeout), tell, False)
        self.on_change.add(told)
        try:
            return await changed
        finally:
            timer.cancel()
            self.on_change.discard(told)

    def changed_since(self, when: float) -> bool:
        """Whether anything changed after ``when``, in monotonic seconds."""
        return self._changed_at > when

    def end_of(self, owner: object, why: MeshError | None = None) -> None:
        """One of several that share it hears nothing any more."""
        for watcher, whose in self._watchers.items():
            if whose is owner:
                watcher.end(why)
        self._notify()

    async def watch(self, owner: object = None) -> AsyncIterator[Event]:
        """First a ``joined`` for everyone who is there, then the changes."""
        watcher = Watcher(Event("joined", entry.key, entry.advertisement) for entry in self.directory.entries())
        self._watchers[watcher] = owner
        try:
            while (event := await watcher.next()) is not None:
                yield event
        finally:
            del self._watchers[watcher]

    # ---------------------------------------------------------------- asking

    def ask(self, ask: Ask) -> None:
        """Ask workers to tell of themselves."""
        if not self._connection.closed:
            self._connection.again(self._ask_id, self._subjects.ask, ask.to_wire())

    def ask_for(self, kind: Kind, name: str) -> None:
        """Ask every worker for ``name``; one that serves on demand begins to."""
        self._refusals.pop((kind, name), None)
        self.ask(Ask(kind=kind, name=name))

    def gone(self, worker: str) -> None:
        """This client found the worker dead."""
        self.placement.forget(worker)
        self._tell(self.directory.lost(worker, time.monotonic()))

    def released(self, worker: str, slots: int) -> None:
        """A session of this client's at that worker has ended, which had so many slots."""
        self.placement.released(worker, time.monotonic(), slots)
        if not self.directory.has(worker):
            self.placement.forget(worker)  # nobody else will say that it left
        self._notify()  # its advertisements may be the same before and after

    # ---------------------------------------------------------------- hearing

    def _on_advertisement(self, subject: str, _reply: str, body: bytes) -> None:
        try:
            said = _advertised(body)
        except MeshError as exc:
            log.debug("ignored what came on %s: %s", subject, exc)
            return
        # Permissions rest on the subject: a body may not speak for another worker than it was published for.
        if subject == self._subjects.advertisement(said.kind, said.name, said.worker):
            self._take_in(said)

    def _take_in(self, said: Advertisement) -> None:
        now = time.monotonic()
        self._tell(self.directory.heard(said, now))
        if said.draining_s and not said.left:
            for told in list(self.on_draining):
                told(said.worker, said.draining_s)
        key: Key = (said.kind, said.name, said.worker)
        entry = self.directory.get(key)
        if entry is None or entry.description is not None:
            return
        missing = (said.worker, said.name, said.description)
        if now - self._asked_about.get(missing, -ASK_AGAIN_S) >= ASK_AGAIN_S:
            self._asked_about[missing] = now
            self.ask(Ask(worker=said.worker, name=said.name))

    def _on_known(self, data: bytes | None) -> None:
        self._heard.set()
        if data is None:
            return  # no worker is there yet
        body = unpack(data)
        if isinstance(body, dict) and "error" in body:
            self._refused(body["error"])
            return
        known = check(Known, body)
        if len(known.advertisements) != len(known.descriptions):
            raise MalformedMessage("a worker described other names than it advertised")
        for name in known.making:
            self._making.pop(name, None)
            self._making[name] = time.monotonic()
            if len(self._making) > MAX_REFUSALS:
                del self._making[next(iter(self._making))]
        for said, description in zip(known.advertisements, known.descriptions, strict=True):
            if (said.kind, said.name, said.worker) != (description.kind, description.name, description.worker):
                log.debug("ignored a description of %s's that came with another's advertisement", description.worker)
                continue
            self.directory.described(description, said.description)
            self._take_in(said)
        self._notify()

    def _refused(self, wire: object) -> None:
        asked = from_wire(wire).details.get("asked")
        if isinstance(asked, list) and [type(part) for part in asked] == [str, str]:
            self._refusals[asked[0], asked[1]] = wire
            if len(self._refusals) > MAX_REFUSALS:
                del self._refusals[next(iter(self._refusals))]
            self._notify()

    def _tell(self, events: list[Event]) -> None:
        if not events:
            return
        for event in events:
            worker = event.key[2]
            if event.kind != "updated":
                self._resolved.clear()
            if event.kind == "left" and not self.directory.has(worker):
                self.placement.forget(worker)
            for watcher in self._watchers:
                watcher.tell(event)
        self._notify()

    def _notify(self) -> None:
        self._changed_at = time.monotonic()
        for told in list(self.on_change):
            told()

    def _expire_later(self) -> None:
        if not self._ended:
            self._timer = asyncio.get_running_loop().call_later(EXPIRE_S, self._expire)

    def _expire(self) -> None:
        self._expire_later()
        now = time.monotonic()
        self._asked_about = {what: at for what, at in self._asked_about.items() if now - at < ASK_AGAIN_S}
        self._tell(self.directory.expire(now, connected=self._connection.connected))


@lru_cache(maxsize=256)
def _advertised(body: bytes) -> Advertisement:
    """What an advertisement says; every client of this process hears the same, and none can change it.

    Raises:
        MeshError: it is none.
    """
    return parse(Advertisement, body)

"""What a ``Mesh``, its openings, its sessions and its agents share; none of it is the user's concern."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from meshrl.bus.connection import Connection
from meshrl.bus.login import Credentials
from meshrl.client.flights import Flights
from meshrl.client.hearing import Hearing
from meshrl.client.leases import Leases
from meshrl.client.opening import Opening
from meshrl.client.recovery import OnLoss, Recovery
from meshrl.client.registry import Registry
from meshrl.client.resumable import ResumableSession
from meshrl.client.session import RemoteSession
from meshrl.client.shielded import shielded
from meshrl.client.through_workers import AnyReader
from meshrl.errors import MeshError, SessionClosed
from meshrl.protocol.doubt import FROZEN_S
from meshrl.recording.library import Library
from meshrl.wire.messages import Close, Grant, Kind
from meshrl.wire.subjects import Subjects

if TYPE_CHECKING:
    from meshrl.client.mesh import Mesh

S = TypeVar("S", bound=RemoteSession)


def silence_s(timeout: float) -> float:
    """How long nothing at all may be heard of a request's worker, in seconds: see :class:`meshrl.Mesh`."""
    return min(timeout, max(FROZEN_S, timeout / 3))


# The server has a message of a stream at hand within this, or says that it has none.
READ_S = 10.0


class Context:
    """One client's connection, and what goes on over it.

    Args:
        connection: open, and closed by :meth:`close`.
        url: of the server, for the keeper's own connection.
        credentials: of the login.
        subjects: of the mesh.
        timeout: :class:`meshrl.Mesh`'s, in seconds.
    """

    def __init__(
        self,
        connection: Connection,
        url: str,
        credentials: str | Path | Credentials | None,
        subjects: Subjects,
        timeout: float,
    ) -> None:
        self.url, self.credentials = url, credentials
        self.loop = asyncio.get_running_loop()
        self.connection = connection
        self.subjects = subjects
        self.timeout = timeout
        self.hearing = Hearing(connection, url, credentials, subjects)
        self.flights = Flights(connection, subjects, silence_s(timeout))
        self._leases = Leases(connection, url, credentials, subjects, self._lost)
        self._sessions: dict[str, RemoteSession] = {}
        self._slots: dict[str, int] = {}  # of each session
        self.recovering: set[RemoteSession] = set()  # lost, and being opened again
        self._library: Library | None = None
        self._reader: AnyReader | None = None
        self._ended = False
        self._why: MeshError | None = None  # the connection's end, where it was not this client's wish
        connection.on_close.append(self._connection_ended)

    def __repr__(self) -> str:
        return f"<Context {self.connection!r}, {self.registry!r}, {len(self._sessions)} sessions>"

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def registry(self) -> Registry:
        """Who is there, as far as this client knows."""
        return self.hearing.registry

    # ---------------------------------------------------------------- life

    @property
    def ended(self) -> bool:
        """Whether the mesh was closed, by its user."""
        return self._ended

    def check_open(self) -> None:
        """Whether anything can still be done.

        Raises:
            SessionClosed: this client closed the mesh.
            MeshError: the connection was ended otherwise, and why.
        """
        if self._ended:
            raise SessionClosed("this Mesh was closed")
        if self._why is not None:
            raise copy.copy(self._why)

    async def begin(self) -> None:
        """Begin to hear who is there; returns when those who are have had time to say so. Safe to cancel.

        Raises:
            MeshError: the server is away, or does not permit it.
        """
        await self.hearing.begin()
        self.registry.on_draining.add(self._draining)

    def end(self) -> None:
        """Begin nothing more, and renew nothing more; whatever becomes of :meth:`close`, no lease is held for ever."""
        self._ended = True
        self._leases.end()
        self.registry.on_draining.discard(self._draining)
        self.hearing.end()

    async def close(self) -> None:
        """Close every session that is still open, then disconnect."""
        self.end()
        try:
            left = {*self._sessions.values(), *self.recovering}
            await asyncio.gather(*(session.close() for session in left), return_exceptions=True)
        finally:
            try:
                await self._leases.stop()
            finally:
                try:
                    await self.hearing.stop()
                finally:
                    self.flights.close()
                    await self.connection.close()

    def _connection_ended(self, why: MeshError) -> None:
        if not self._ended:
            self._why = why
            self.hearing.end(why)

    async def library(self) -> Library:
        """Reads recordings over this client's connection, as long as that lasts.

        Raises:
            SubjectNotPermitted: the server does not allow this login its inbox.
        """
        if self._library is None:
            self._library = Library(await self.reader(), self.subjects)
        return self._library

    async def reader(self) -> AnyReader:
        """The same for single messages, and for positions of this user's consumers.

        Raises:
            SubjectNotPermitted: the server does not allow this login its inbox.
        """
        if self._reader is None:
            reader = AnyReader(self.connection, min(self.timeout, READ_S), self.subjects)
            await reader.__aenter__()
            self._reader = reader
        return self._reader

    # ---------------------------------------------------------------- sessions

    async def open(
        self,
        kind: Kind,
        name: str,
        kwargs: Mapping[str, Any] | None,
        where: Mapping[str, Any] | None,
        wait: float,
        *,
        on_loss: OnLoss = "raise",
        **request: Any,
    ) -> RemoteSession:
        """Lease a session; what :meth:`meshrl.Mesh.env` and :meth:`meshrl.Mesh.agent` are made of."""
        request["kwargs"] = dict(kwargs or {})
        make: Callable[[Context, Grant], RemoteSession] = RemoteSession
        if on_loss != "raise":
            request.setdefault("digests", "large" if on_loss == "resume" else "none")
            recovery = Recovery(self, kind, name, where, request, wait, resumes=on_loss == "resume")
            make = partial(ResumableSession, recovery=recovery)
        return await self.lease(Opening(self, kind, name, wait=wait, where=where, request=request), make)

    def adopt(self, session: RemoteSession, slots: int) -> None:
        """A session that was lost was granted again: its lease is renewed from now on."""
        self.check_open()  # closed while it was on its way, it would be closed by nobody
        grant = session.grant
        self._slots[grant.session] = slots
        self._sessions[grant.session] = session
        self._leases.hold(grant.worker, grant.session, grant.epoch, grant.lease_s)

    def hold(self, grant: Grant) -> None:
        """Renew, from now on, what a session was granted at another worker beside the one that it is at."""
        self.check_open()
        self._leases.hold(grant.worker, grant.session, grant.epoch, grant.lease_s)

    def give_back(self, grant: Grant, slots: int) -> None:
        """Renew no more, and close, what a session has at a worker that it is not at; nobody waits for that."""
        self._leases.release(grant.worker, grant.session)
        self.registry.released(grant.worker, slots)
        if not self.connection.closed:
            subject = self.subjects.session(grant.worker, self.connection.user, grant.session, "close")
            self.connection.publish(subject, Close(epoch=grant.epoch, moved=True).to_wire())

    async def lease(self, opening: Opening, make: Callable[[Context, Grant], S]) -> S:
        """Carry an opening out, and renew from now on what it was granted; every session comes from here.

        Cancelling gives back what was granted.

        Args:
            opening: not yet run.
            make: the session of a grant.

        Raises:
            MeshError: as :meth:`meshrl.client.opening.Opening.run`.
        """
        grant = await opening.run()
        session = make(self, grant)
        self._slots[grant.session] = opening.num_envs
        self._sessions[grant.session] = session
        try:
            self.check_open()  # closed while it was on its way, it would be closed by nobody
            self._leases.hold(grant.worker, grant.session, grant.epoch, grant.lease_s)
        except BaseException:
            await shielded(session.close())
            raise
        return session

    def forget(self, session: RemoteSession) -> None:
        """The session is over: it is renewed no more, and its slots count as free."""
        grant = session.grant
        if self._sessions.pop(grant.session, None) is not None:
            self._leases.release(grant.worker, grant.session)
            self.registry.released(grant.worker, self._slots.pop(grant.session))

    def _lost(self, worker: str, session: str, reason: str) -> None:
        lost = self._sessions.get(session)
        if lost is not None and lost.grant.worker == worker:  # else it is elsewhere by now
            lost.lost(reason)

    def _draining(self, worker: str, seconds: float) -> None:
        for session in list(self._sessions.values()):
            if session.grant.worker == worker:
                session.worker_drains(seconds)


def context_of(mesh: Mesh) -> Context:
    """The context of a mesh that was entered, for this package's own tools and tests.

    Raises:
        UsageError: it was not entered.
    """
    return mesh._entered()  # noqa: SLF001  # the one way in from outside

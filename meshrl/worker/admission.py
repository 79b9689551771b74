"""Admission: who gets slots, and who waits for them (R4, R5).

A session takes a slot for each of its sub-environments, all at once. Where somebody waits, a newcomer is parked behind
them, also when it would fit into what is free: :mod:`meshrl.protocol.waiting` says why.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from meshrl.errors import (
    KwargsNotAllowed,
    MalformedMessage,
    MeshError,
    SessionUnknown,
    UnknownName,
    UsageError,
    WorkerDraining,
    WrongEpoch,
)
from meshrl.protocol.names import near
from meshrl.protocol.offers import lacking
from meshrl.protocol.session import Key, Opening, Session, SessionTable, State
from meshrl.protocol.waiting import Waiting
from meshrl.wire.codec import Codec
from meshrl.wire.messages import Description, Full, Grant, Kind, Load, Open, parse
from meshrl.worker.audit import Audit
from meshrl.worker.execution import Execution
from meshrl.worker.hold import Held, Hold
from meshrl.worker.hosted_pool import HostedPool
from meshrl.worker.isolation import ENFORCED_S
from meshrl.worker.replies import Replies
from meshrl.worker.threads import Threads

# How often parked opens are looked at whose time is over.
PARKED_S = 0.1
# A worker that has room is not called busier than believed for less than this part of its slots: a thousand clients
# that open at once would all be sent round three times, and be no better off.
SAME_LOAD = 128

# Of what was asked for, and a check that is called between envs: it raises once nobody wants them any more.
Construct = Callable[[Open, Description, Callable[[], None]], tuple[Held | HostedPool, Description]]


class Admission:
    """Takes opens: grants, parks or refuses them.

    Args:
        worker: the worker's id.
        kind: what it serves.
        table: its sessions and slots.
        replies: where answers go.
        threads: where constructors run.
        construct: makes what an open asks for, on a thread.
        audit: is told what is opened and refused.
    """

    def __init__(
        self,
        worker: str,
        kind: Kind,
        table: SessionTable,
        replies: Replies,
        threads: Threads,
        construct: Construct,
        audit: Audit | None = None,
    ) -> None:
        self.served: Mapping[str, Description] = {}
        self.draining_until: float | None = None
        self.idle = asyncio.Event()
        self.on_constructed: Callable[[Session, Open, Description], None] = _nobody
        self.execution: Execution  # given by the service: the two know each other
        self._worker = worker
        self._kind = kind
        self._table = table
        self._replies = replies
        self._threads = threads
        self._construct = construct
        self._audit = audit or Audit(worker)
        self._waiting = Waiting()
        self._parked: dict[Key, tuple[Open, str]] = {}
        self._after_end: dict[Key, tuple[Open, str]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._packed: dict[str, tuple[Description, bytes]] = {}  # of what is served, by name
        self._codecs = {"str": Codec("str"), "bytes": Codec("bytes")}

    # ---------------------------------------------------------------- open

    def on_open(self, subject: str, reply: str, data: bytes) -> None:
        """One open."""
        try:
            open_, user = parse(Open, data), subject.rpartition(".")[2]
        except MeshError as exc:
            self._replies.refuse(reply, exc)
            return
        try:
            self._take(open_, user, reply)
        except MeshError as exc:
            self._refuse(open_, user, reply, exc)

    def _refuse(self, open_: Open, user: str, reply: str, exc: MeshError) -> None:
        self._audit.refused(user, open_, exc)
        self._replies.refuse(reply, exc)

    def _take(self, open_: Open, user: str, reply: str) -> None:
        key = (user, open_.session)
        description = self._check(open_)
        now = time.monotonic()
        if self._table.get(key) is None:
            if self.draining_until is not None:
                raise self._draining()
            # 1. Busier than the client believed, or beyond its user's share: it may find better elsewhere, and asks
            # without belief in the end.
            waits = self._waiting.before(user)
            free = 0 if waits else self._table.free  # for a newcomer
            slack = self._table.slots // SAME_LOAD if free >= open_.num_envs else 0
            beyond = open_.num_envs > self._table.share(user)
            busier = open_.believed_free is not None and (beyond or free < open_.believed_free - slack)
            if busier and key not in self._parked:
                self._replies.send(reply, self._full(open_, user, bounced=True))
                return
            self._check_share(open_)
            # 2. Others wait already: nobody overtakes them.
            if waits:
                self._park(open_, user, reply, now)
                return
        self._open(open_, user, reply, description, now)

    def _open(self, open_: Open, user: str, reply: str, description: Description, now: float) -> None:
        """Do what the table says of an open whose turn it is."""
        key = (user, open_.session)
        opening, session = self._table.open(
            user,
            open_.session,
            open_.epoch,
            reply,
            now,
            num_envs=open_.num_envs,
            pool=open_.form == "pool",
        )
        if session is None:
            self._park(open_, user, reply, now)
        elif opening is Opening.NEW:
            self._begin(session, open_, description)
        elif opening is Opening.REPEAT:
            self._replies.send(reply, session.grant)
        elif opening is Opening.WRONG_EPOCH:
            raise WrongEpoch(
                f"session {session.id} is in epoch {session.epoch}; an open of epoch {open_.epoch} comes too late; "
                "open a new session",
                session=session.id,
                epoch=session.epoch,
            )
        elif opening is not Opening.JOIN:  # RAISED or WAIT: the old env is closed first
            self._after_end[key] = (open_, reply)
            self.execution.end(session, "wrong_epoch")

    def _check(self, open_: Open) -> Description:
        """What is asked for, if this worker serves it, can do it and lets clients pass those kwargs."""
        if open_.form == "single" and open_.num_envs > 1:
            raise MalformedMessage(
                f"an open of form single has one sub-environment, not {open_.num_envs}; open a vector or a pool",
                num_envs=open_.num_envs,
            )
        description = self.served.get(open_.name)
        if description is None or open_.kind != self._kind:
            close = near(open_.name, self.served)
            hint = f"did you mean {', '.join(close)}?" if close else f"it serves {', '.join(self.served) or 'nothing'}"
            raise UnknownName(
                f"worker {self._worker} serves no {open_.kind} {open_.name!r}: {hint}", name=open_.name, near=close
            )
        allowed = description.allow_kwargs
        refused = [] if "*" in allowed else sorted(set(open_.kwargs) - set(allowed))
        if refused:
            raise KwargsNotAllowed(
                f"{open_.name}: the worker's operator does not let clients pass {', '.join(refused)} "
                f"(allowed: {', '.join(allowed) or 'nothing'}); serve it with allow_kwargs={tuple(refused)!r}",
                refused=refused,
                allowed=list(allowed),
            )
        lacks = lacking(description.vectors, open_.form, open_.autoreset_mode, open_.seeding)
        if lacks:
            raise UsageError(
                f"{open_.name}: worker {self._worker} does not offer {lacks}; ask for what it has, or another worker",
                name=open_.name,
                worker=self._worker,
                lacks=lacks,
            )
        if open_.num_envs > self._table.slots:
            raise UsageError(
                f"{open_.name}: {open_.num_envs} sub-environments do not fit worker {self._worker}, which has "
                f"{self._table.slots} slots in all; spread them over several sessions",
                name=open_.name,
                worker=self._worker,
                num_envs=open_.num_envs,
                slots=self._table.slots,
            )
        return description

    def _check_share(self, open_: Open) -> None:
        """Refuse at once what no user will ever get here."""
        share = self._table.max_slots_per_user
        if share is not None and open_.num_envs > share:
            raise UsageError(
                f"{open_.name}: worker {self._worker} gives one user at most {share} of its slots, not "
                f"{open_.num_envs}; spread them over workers, or ask its operator for more (--max-slots-per-user)",
                name=open_.name,
                worker=self._worker,
                num_envs=open_.num_envs,
                share=share,
            )

    def _begin(self, session: Session, open_: Open, description: Description) -> None:
        self._audit.opened(session.user, open_)

        def check_wanted() -> None:  # on a thread
            if session.state is State.ENDING:
                raise SessionUnknown(
                    f"session {session.id} was over before its envs were constructed; open a new session",
                    session=session.id,
                    reason="closed",
                )

        def construct() -> None:
            try:
                held, own = self._construct(open_, description, check_wanted)
            except MeshError as exc:
                self._threads.back(self._not_constructed, session, exc)
            except BaseException as exc:  # noqa: BLE001  # whatever a constructor raises goes to the one who asked
                crashed = self.execution.crashed(open_.name, "constructor", exc)
                self._threads.back(self._not_constructed, session, crashed)
            else:
                self._threads.back(self._constructed, session, open_, held, own)

        self._threads.submit(construct)

    def _constructed(self, session: Session, open_: Open, held: Held | HostedPool, description: Description) -> None:
        session.held = Hold(held, self._codecs[open_.key_style])
        if session.state is State.ENDING:
            self.execution.dispose(session)
            return
        self.on_constructed(session, open_, description)
        grant = Grant(
            session=session.id,
            epoch=session.epoch,
            worker=self._worker,
            lease_s=self._table.lease_s,
            grant_s=self._table.grant_s,
            step_deadline_s=description.step_deadline_s + ENFORCED_S,
            render_mode=open_.render_mode,
            description=description,
            load=self.load(session.user),
        )
        packed = grant.to_wire_with(self._described(description))
        self._replies.send(self._table.granted(session, packed, time.monotonic()), session.grant)

    def _described(self, description: Description) -> bytes:
        """The description, packed: once for all sessions that have it as it is served."""
        if self.served.get(description.name) is not description:
            return description.packed()
        kept = self._packed.get(description.name)
        if kept is None or kept[0] is not description:
            kept = self._packed[description.name] = (description, description.packed())
        return kept[1]

    def _not_constructed(self, session: Session, exc: MeshError) -> None:
        self._audit.failed(session, exc)
        self._table.ending(session, "not_constructed")
        self._table.ended(session)
        self._replies.refuse(session.reply_to, exc)
        self.slot_freed(session.key)

    # ---------------------------------------------------------------- waiting

    def _park(self, open_: Open, user: str, reply: str, now: float) -> None:
        key = (user, open_.session)
        if open_.park_s > 0:
            place = self._waiting.park(
                user,
                open_.session,
                now,
                now + open_.park_s,
                ticket=open_.ticket,
                resume=open_.epoch > 1,
                num_envs=open_.num_envs,
            )
            if place is not None:
                self._parked[key] = (open_, reply)
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(PARKED_S, self._look_at_parked)
                self._admit_parked()  # who is beyond its share stands aside from now on
                return
        self._replies.send(reply, self._full(open_, user))

    def _full(self, open_: Open, user: str, *, ticket: str | None = None, bounced: bool = False) -> bytes:
        """The answer that there is no slot; where that is for the user's share alone, it says so."""
        beyond = open_.num_envs > self._table.share(user)
        share = self._table.max_slots_per_user if beyond else None
        held = None if share is None else self._table.held(user)
        return Full(load=self.load(user), ticket=ticket, bounced=bounced, share=share, held=held).to_wire()

    def take_back(self, key: Key, epoch: int) -> bool:
        """The client gave up an open that is parked, or waits for its session's epoch before to close."""
        after = self._after_end.get(key)
        if after is not None and after[0].epoch == epoch:
            del self._after_end[key]
            return True
        parked = self._parked.get(key)
        if parked is None or parked[0].epoch != epoch:
            return False
        del self._parked[key]
        self._waiting.leave(*key)
        self._admit_parked()  # it may have kept slots from those behind it that are enough for them
        return True

    def _look_at_parked(self) -> None:
        self._timer = None
        for waiter in self._waiting.due(time.monotonic()):
            parked = self._parked.pop((waiter.user, waiter.session), None)
            if parked is not None:
                self._replies.send(parked[1], self._full(parked[0], waiter.user, ticket=waiter.ticket))
        # Room for answers comes without a word, unlike a slot; and who went may have kept slots from the next.
        self._admit_parked()
        if self._parked and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PARKED_S, self._look_at_parked)

    def slot_freed(self, key: Key) -> None:
        """A session's slots are free: an open that waits for just this session first, then as many as fit, in turn."""
        self._waiting.share_freed(key[0])
        after = self._after_end.pop(key, None)
        if after is not None:
            open_, reply = after
            try:
                self._take(open_.model_copy(update={"believed_free": None}), key[0], reply)
            except MeshError as exc:
                self._refuse(open_, key[0], reply, exc)
        self._admit_parked()
        if not len(self._table):
            self.idle.set()

    def _admit_parked(self) -> None:
        table = self._table
        while self._parked:
            waiter = self._waiting.next(table.free, time.monotonic(), table.share)
            if waiter is None:
                break
            parked = self._parked.pop((waiter.user, waiter.session), None)
            if parked is not None:
                self._admit(*parked, waiter.user)

    def _admit(self, open_: Open, reply: str, user: str) -> None:
        try:
            self._open(open_, user, reply, self._check(open_), time.monotonic())
        except MeshError as exc:
            self._refuse(open_, user, reply, exc)

    # ---------------------------------------------------------------- load and drain

    def load(self, user: str) -> Load:
        """How busy the worker is for a user, who may have no more than its share."""
        table = self._table
        draining = self.draining_until is not None
        return Load(slots=table.slots, free=table.free_for(user), waiting=self._waiting.in_line, draining=draining)

    def waiting_count(self) -> int:
        """Parked opens, without those that wait for slots of their own user."""
        return self._waiting.in_line

    def is_parked(self, key: Key) -> bool:
        """Whether an open of that session is parked."""
        return key in self._parked

    def drain(self, until: float) -> None:
        """Take no new sessions any more; who waits is sent elsewhere."""
        self.draining_until = until
        for key, (_, reply) in self._parked.items():
            self._waiting.leave(*key)
            self._replies.refuse(reply, self._draining())
        self._parked.clear()

    def stop(self) -> None:
        """Look at nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _draining(self) -> WorkerDraining:
        return WorkerDraining(f"worker {self._worker} is going away and takes no new sessions", worker=self._worker)


def _nobody(_session: Session, _open: Open, _description: Description) -> None:
    return None

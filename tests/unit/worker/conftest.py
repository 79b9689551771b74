"""A worker's admission and execution without a server: what they would send is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from meshrl.errors import EnvError
from meshrl.protocol.session import Session, SessionTable
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Close, Description, Open
from meshrl.worker.admission import Admission
from meshrl.worker.audit import Audit
from meshrl.worker.execution import Execution
from meshrl.worker.hosted import HostedEnv
from meshrl.worker.replies import Replies
from meshrl.worker.threads import Threads

PREFIX = "session.w1."


class Sent(Replies):
    """Keeps what is sent, by reply subject."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, Any]] = []
        self.marks: list[tuple[int, int]] = []
        self._more = asyncio.Event()

    def send(self, to: str, packed: bytes, lane: int = 0, seq: int = 0) -> None:
        """Keep it."""
        self.sent.append((to, unpack(packed)))
        self.marks.append((lane, seq))
        self._more.set()

    async def to(self, subject: str, count: int = 1) -> Any:
        """The ``count``-th answer to ``subject``."""
        async with asyncio.timeout(30.0):
            while len(found := [body for to, body in self.sent if to == subject]) < count:
                self._more.clear()
                await self._more.wait()
        return found[count - 1]


class Bare:
    """A worker of one env, without a bus."""

    def __init__(self, make: Callable[[], Any], slots: int, max_slots_per_user: int | None = None) -> None:
        self.replies = Sent()
        self.table = SessionTable(slots, max_slots_per_user=max_slots_per_user)
        self.threads = Threads("bare")
        self.threads.loop = asyncio.get_running_loop()
        self.make = make
        self.audit = Audit("w1")
        self.table.on_ending = self.audit.ended
        self.admission = Admission("w1", "env", self.table, self.replies, self.threads, self._construct, self.audit)
        self.execution = Execution(
            "w1",
            self.table,
            self.replies,
            self.threads,
            EnvError,
            parked=self.admission.take_back,
            freed=self.admission.slot_freed,
        )
        self.execution.cut = len(PREFIX)
        self.admission.execution = self.execution
        self.admission.served = {"env": Description(kind="env", name="env", worker="w1", allow_kwargs=["a"])}

    def _construct(
        self, open_: Open, description: Description, check_wanted: Callable[[], None]
    ) -> tuple[HostedEnv, Description]:
        env = HostedEnv(self.make(), name="env", session=open_.session, worker="w1", allow=(), threads=self.threads)
        return env, description

    def open(self, session: str = "s1", user: str = "anon", **fields: Any) -> str:
        """Ask for a session; gives the reply subject, which is new each time."""
        reply = f"open {session} {len(self.replies.sent)} {fields}"
        body = Open(session=session, **{"name": "env", **fields}).to_wire()
        self.admission.on_open(f"worker.w1.open.{user}", reply, body)
        return reply

    def ask(self, op: str, seq: int, session: str = "s1", epoch: int = 1, **fields: Any) -> str:
        """One request of a session; gives the reply subject."""
        reply = f"{op} {session} {epoch} {seq} {len(self.replies.sent)}"
        body = pack({"epoch": epoch, "lane": 0, "seq": seq, **fields})
        self.execution.on_session(f"{PREFIX}anon.{session}.{op}", reply, body)
        return reply

    def close(self, session: str = "s1", epoch: int = 1) -> str:
        """Close a session; gives the reply subject."""
        reply = f"close {session} {epoch} {len(self.replies.sent)}"
        self.execution.on_session(f"{PREFIX}anon.{session}.close", reply, Close(epoch=epoch).to_wire())
        return reply

    async def opened(self, session: str = "s1", **fields: Any) -> Session:
        """A session that is open."""
        answer = await self.replies.to(self.open(session, **fields))
        assert answer.get("session") == session, answer
        found = self.table.get(("anon", session))
        assert found is not None
        return found

    async def emptied(self) -> None:
        """Wait until no session is left."""
        if len(self.table):
            self.admission.idle.clear()
            async with asyncio.timeout(30.0):
                await self.admission.idle.wait()


@pytest.fixture
def bare() -> Callable[..., Bare]:
    """Makes one, on the running loop."""

    def make(env: Callable[[], Any], slots: int = 2, max_slots_per_user: int | None = None) -> Bare:
        return Bare(env, slots, max_slots_per_user)

    return make

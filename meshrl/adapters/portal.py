"""The portal: threads that block on the one side, an event loop with a shared ``Mesh`` on the other.

One portal a process and a set of mesh arguments: a daemon thread, its event loop, one ``Mesh`` that all synchronous
envs with these arguments share. The rules of this file:

    1. A thread waits on one plain lock a call: half the cost of an event, a fifth less than a concurrent future, and
       the wait ends at once for Ctrl-C.
    2. Whatever interrupts that wait cancels the call on the loop, and the call keeps what became of it, so that a
       result which nobody received is not lost.
    3. A forked process has no portal. What it inherited is marked and never touched: the sockets are the parent's.
    4. The last lease that is given back ends the portal; so does the interpreter's exit. Every call ends with it,
       whenever it came: who waits has no deadline.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from meshrl.adapters.call import Call
from meshrl.bus.locate import URL_VARIABLE
from meshrl.client.context import context_of
from meshrl.client.mesh import Mesh
from meshrl.errors import SessionClosed, UsageError


class Closes(Protocol):
    """What can be leased: a remote env, or a vector of them."""

    async def close(self) -> None:
        """Free its slots."""


T = TypeVar("T")
R = TypeVar("R", bound=Closes)

# Closing a mesh takes some milliseconds; a server that is gone costs up to 2 s.
END_S = 5.0
ARGUMENTS = frozenset({"url", "namespace", "credentials", "timeout"})


class Portal:
    """A daemon thread with an event loop and one ``Mesh``; leased by :func:`lease`, given back by :meth:`release`.

    Attributes:
        arguments: of its ``Mesh``.
        inherited: whether this process got it by a fork: then it must not be used.
        over: whether it has ended.
        users: how many leases are out.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = dict(arguments)
        self.inherited = False
        self.over = False
        self.users = 0
        self._said_url = os.environ.get(URL_VARIABLE)
        self._mesh: Mesh | None = None
        self._entering = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: set[Call[Any]] = set()
        self._loop = _new_loop()
        # Its own, so that its threads can be left behind without starting another one to join them.
        self._executor = ThreadPoolExecutor(thread_name_prefix="meshrl-portal")
        self._loop.set_default_executor(self._executor)
        self._thread = threading.Thread(target=self._run, name="meshrl-portal", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        state = "inherited" if self.inherited else "over" if self.over else "open"
        return f"<Portal {self._mesh!r}: {self.users} users, {state}>"

    def serves(self, arguments: Mapping[str, Any]) -> bool:
        """Whether it is the one for these arguments."""
        if self.over or (self._mesh is not None and context_of(self._mesh).connection.closed):
            return False
        same_place = "url" in arguments or self._said_url == os.environ.get(URL_VARIABLE)
        return same_place and self.arguments == arguments

    @property
    def running(self) -> bool:
        """Whether its thread lives."""
        return self._thread.is_alive()

    @property
    def is_here(self) -> bool:
        """Whether the caller is its thread, which must never wait for it."""
        return threading.get_ident() == self._thread.ident

    # ---------------------------------------------------------------- from any thread

    def run(self, call: Call[T]) -> T:
        """Run ``call`` on the loop and wait for it: :meth:`send`, then :meth:`wait`.

        An interrupt (``KeyboardInterrupt``, or whatever a signal handler raises) ends the waiting; then
        ``call.error`` is not what was raised, and the caller has to :meth:`abandon` it.

        Raises:
            SessionClosed: the portal has ended.
            BaseException: what the call raised.
        """
        self.send(call)
        return self.wait(call)

    def send(self, call: Call[Any]) -> None:
        """Run ``call`` on the loop, without waiting for it.

        Raises:
            SessionClosed: the portal has ended.
        """
        if self.over:
            raise SessionClosed(f"{call.op}: the connection to the mesh was closed")
        # Known before it is on its way: what the loop does not come to any more is ended by its thread.
        self._calls.add(call)
        try:
            self._loop.call_soon_threadsafe(self._start, call)
        except RuntimeError:  # the loop is closed
            raise SessionClosed(f"{call.op}: the connection to the mesh was closed") from None

    def wait(self, call: Call[T]) -> T:
        """Wait for a call that was sent.

        Raises:
            BaseException: what the call raised.
        """
        call.wait()
        self._calls.discard(call)
        return call.result()

    def abandon(self, call: Call[Any]) -> None:
        """Cancel ``call``; what comes later finds it over or cancelled, in the order of the calls."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the call with it
            self._loop.call_soon_threadsafe(self._abandon, call)

    def release(self) -> None:
        """Give a lease back; the last one ends the portal."""
        if _PORTALS.release(self):
            self.end()

    def abandon_opening(self, opening: Call[R]) -> None:
        """Give back the lease of a remote that nobody waits for any more; never blocks."""
        self._later(self._dispose(opening))

    def drop(self, remote: Closes) -> None:
        """Close a remote that was garbage, and give its lease back; never blocks, safe in ``__del__`` on any thread."""
        if not self.over and not self.inherited:
            self._later(self._close_dropped(remote))

    def end(self) -> None:
        """Close the mesh and end the thread; returns when it has ended, or after 5 s."""
        if self.inherited:
            return
        if not self.over:
            self._later(self._shut())
        if not self.is_here:
            self._thread.join(END_S)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._begin, work)
        except RuntimeError:
            work.close()  # the loop is closed: there is nothing left to do this to

    # ---------------------------------------------------------------- on the loop

    def _start(self, call: Call[Any]) -> None:
        if self.over:
            call.refuse()
        else:
            call.start(self._loop)

    def _abandon(self, call: Call[Any]) -> None:
        call.cancel()
        self._begin(self._forget(call))

    async def _forget(self, call: Call[Any]) -> None:
        await call.ended()
        self._calls.discard(call)

    async def open(self, opened: Callable[[Mesh], Coroutine[Any, Any, R]]) -> R:
        """Lease a remote over the shared mesh."""
        async with self._entering:
            if self._mesh is None:
                mesh = Mesh(**self.arguments)
                await mesh.__aenter__()
                self._mesh = mesh
                # Registered again, so that it runs before whatever the mesh registered: an embedded server's stop.
                _PORTALS.close_at_exit()
        return await opened(self._mesh)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close_dropped(self, remote: Closes) -> None:
        try:
            await remote.close()
        finally:
            if _PORTALS.release(self):
                await self._shut()

    async def _dispose(self, opening: Call[R]) -> None:
        try:
            opening.cancel()
            await opening.ended()
            if opening.ran:
                await opening.value.close()
        finally:
            if _PORTALS.release(self):
                await self._shut()

    async def _shut(self) -> None:
        if self.over:
            return
        self.over = True
        try:
            if self._mesh is not None:
                await self._mesh.__aexit__(None, None, None)
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self._loop.stop()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._executor.shutdown(wait=False)
            self._loop.close()
            for call in list(self._calls):
                call.refuse()


class _Portals:
    """The portals of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Portal] = []
        # Those whose threads run: one that is left to itself while the interpreter ends can crash it.
        self._running: list[Portal] = []
        self._inherited: list[Portal] = []

    def lease(self, arguments: Mapping[str, Any]) -> Portal:
        with self._lock:
            portal = next((p for p in self._open if p.serves(arguments)), None)
            if portal is None:
                portal = Portal(arguments)
                self._open.append(portal)
                self._running = [*(p for p in self._running if p.running), portal]
            portal.users += 1
            return portal

    def release(self, portal: Portal) -> bool:
        """Whether that was the last lease; from then on nobody gets this portal."""
        with self._lock:
            portal.users -= 1
            if portal.users == 0 and portal in self._open:
                self._open.remove(portal)
                return True
            return False

    def close_at_exit(self) -> None:
        atexit.unregister(self.close_all)
        atexit.register(self.close_all)
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None:
            # Processes of multiprocessing may end without atexit, but not without this.
            from multiprocessing.util import Finalize  # noqa: PLC0415  # loaded in such a process anyway

            Finalize(None, self.close_all, exitpriority=1)

    def close_all(self) -> None:
        with self._lock:
            portals, self._open = self._running, []
        for portal in portals:
            portal.end()

    def forked(self) -> None:
        """In the child: what there is belongs to the parent. It is kept, since freeing it would touch its sockets."""
        self._lock = threading.Lock()
        for portal in self._running:
            portal.inherited = True
        self._inherited += self._running
        self._open, self._running = [], []


_PORTALS = _Portals()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PORTALS.forked)


def lease(arguments: Mapping[str, Any]) -> Portal:
    """The portal of this process for a ``Mesh`` with these arguments; give it back with :meth:`Portal.release`.

    Raises:
        UsageError: ``Mesh`` has no such argument.
    """
    unknown = sorted(set(arguments) - ARGUMENTS)
    if unknown:
        raise UsageError(
            f"mesh= holds {', '.join(map(repr, unknown))}; the arguments of Mesh are {', '.join(sorted(ARGUMENTS))}"
        )
    return _PORTALS.lease(arguments)


def leased(arguments: Mapping[str, Any], op: str, opened: Callable[[Mesh], Coroutine[Any, Any, R]]) -> tuple[Portal, R]:
    """A lease, and what was opened over it.

    Args:
        arguments: as of :func:`lease`.
        op: what the opening is called in errors.
        opened: opens it; where it does not, the lease is given back.

    Raises:
        BaseException: as :func:`lease` and ``opened`` do.
    """
    portal = lease(arguments)
    opening: Call[R] = Call(op, portal.open, opened)
    try:
        return portal, portal.run(opening)
    except BaseException as exc:
        if exc is opening.error:
            portal.release()
        else:
            portal.abandon_opening(opening)
        raise


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415  # not on every platform
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop

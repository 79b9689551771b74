"""Leases, slots and waiting over a real server (R3, R4, R5)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.context import context_of
from meshrl.errors import MeshFull, SessionLost
from meshrl.wire.codec import unpack
from meshrl.wire.messages import Close, Grant, Open, Renew, parse
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.envs import Coroutine, Counter

ROOT = Path(__file__).parents[2]
# After a lease has run out: the next sweep, and the env's close, on a machine that runs other tests meanwhile.
SWEEP_S = 3.0


async def test_a_client_whose_loop_is_blocked_for_three_lease_times_keeps_its_env(url: str) -> None:
    program = """
        import asyncio, sys, time
        from meshrl import Mesh
        async def main():
            async with Mesh(sys.argv[1]) as m:
                env = await m.env("counter")
                await env.reset(seed=0)
                await env.step(1)
                time.sleep(3.3)
                print((await env.step(2))[0])
        asyncio.run(main())
    """
    async with EnvWorker({"counter": Counter}, url, lease_s=1.0) as worker:
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(program), url, cwd=ROOT, stdout=subprocess.PIPE
        )
        out, _ = await client.communicate()
        assert out.split() == [b"2"]
        await until(lambda: worker.table.free == 64, "the slot is free after the client's goodbye")


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
async def test_a_client_that_is_killed_leaves_no_slot_taken(url: str) -> None:
    program = """
        import asyncio, sys
        from meshrl import Mesh
        async def main():
            async with Mesh(sys.argv[1]) as m:
                envs = [await m.env("counter") for _ in range(5)]
                await envs[0].reset()
                print("ready", flush=True)
                while True:
                    await envs[0].step(1)
        asyncio.run(main())
    """
    lease_s = 2.0  # as long as a grant that is not renewed yet
    async with EnvWorker({"counter": Counter}, url, lease_s=lease_s) as worker:
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(program), url, cwd=ROOT, stdout=subprocess.PIPE
        )
        assert client.stdout is not None
        await client.stdout.readline()
        assert worker.table.free == 59
        os.kill(client.pid, signal.SIGKILL)
        await client.wait()
        # By the worker's own clock: nothing lasts longer than a lease from now.
        lapses_at = max(session.lease_until for session in worker.table)
        assert lapses_at <= time.monotonic() + lease_s
        await until(lambda: worker.table.free == 64, "the slots are free within a lease", lease_s + SWEEP_S)


async def test_sessions_of_an_idle_client_are_renewed_for_many_leases(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, lease_s=0.6), Mesh(url) as m:
        env = await m.env("counter")
        await env.reset(seed=0)
        await asyncio.sleep(2.5)  # the scenario: four leases of doing nothing
        assert (await env.step(1))[0] == 1


async def test_a_lease_that_is_not_renewed_runs_out_and_its_client_is_told_so(url: str) -> None:
    subjects = Subjects()
    async with EnvWorker({"counter": Counter}, url, lease_s=0.6) as worker, connect(url) as raw:
        subject = subjects.worker(worker.id, "open", raw.user)
        assert await raw.ask(subject, Open(session="s1", name="counter").to_wire(), 5.0)
        first = subjects.session(worker.id, raw.user, "s1", "reset")
        assert await raw.ask(first, b"\x83\xa5epoch\x01\xa4lane\x00\xa3seq\x01", 5.0)
        await until(lambda: worker.table.free == 64, "the lease runs out")
        answer = await raw.ask(first, b"\x83\xa5epoch\x01\xa4lane\x00\xa3seq\x02", 5.0)
        assert answer is not None
        assert unpack(answer)["error"]["code"] == "session_expired"


async def test_a_lost_open_reply_leaves_no_session_behind(url: str) -> None:
    subjects = Subjects()
    async with EnvWorker({"counter": Counter}, url) as worker, connect(url) as raw:
        raw.publish(subjects.worker(worker.id, "open", raw.user), Open(session="s1", name="counter").to_wire())
        await until(lambda: worker.table.free == 63, "the open is granted")
        await until(lambda: worker.table.free == 64, "nobody renewed it, so it lapses")


async def test_an_open_that_is_cancelled_leaves_no_session_behind(url: str) -> None:
    async with EnvWorker({"counter": slow_counter}, url, lease_s=60.0) as worker, Mesh(url) as m:
        opening = asyncio.create_task(m.env("counter"))
        await until(lambda: worker.table.free == 63, "it is under construction")
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await until(lambda: worker.table.free == 64, "it was taken back")


def slow_counter() -> Counter:
    time.sleep(0.3)
    return Counter()


async def test_opening_the_same_session_again_gives_the_same_grant(url: str) -> None:
    subjects = Subjects()
    async with EnvWorker({"counter": slow_counter}, url) as worker, connect(url) as raw:
        body = Open(session="s1", name="counter").to_wire()
        subject = subjects.worker(worker.id, "open", raw.user)
        raw.publish(subject, body, "_INBOX.anon.nobody")
        while_constructing = await raw.ask(subject, body, 5.0)  # the answer goes to the newest reply subject
        assert while_constructing == await raw.ask(subject, body, 5.0)
        assert worker.table.free == 63
        close = subjects.session(worker.id, raw.user, "s1", "close")
        for existed in (True, False):
            answer = await raw.ask(close, Close(epoch=1).to_wire(), 5.0)
            assert answer is not None
            assert unpack(answer)["existed"] is existed


@pytest.mark.parametrize("clients", [1, 4])
async def test_four_equal_idle_workers_get_four_of_sixteen_sessions_give_or_take_one(url: str, clients: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(EnvWorker({"counter": Counter}, url)) for _ in range(4)]
        meshes = [await stack.enter_async_context(Mesh(url)) for _ in range(clients)]
        opens = [mesh.env("counter") for mesh in meshes for _ in range(16 // clients)]
        envs = await asyncio.gather(*opens)
        held = [len(worker.table) for worker in workers]
        assert sum(held) == len(envs) == 16
        assert all(3 <= count <= 5 for count in held), held


async def test_a_full_mesh_makes_opens_wait_in_turn(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, slots=1) as worker, Mesh(url) as m:
        holder = await m.env("counter")
        order: list[int] = []

        async def wait(number: int) -> None:
            env = await m.env("counter", wait=20.0)
            order.append(number)
            await env.close()

        waiting = []
        for number in range(5):
            waiting.append(asyncio.create_task(wait(number)))
            await until(lambda n=number: worker.waiting_count() == n + 1, "the open is parked")  # type: ignore[misc]
        await holder.close()
        await asyncio.gather(*waiting)
        assert order == [0, 1, 2, 3, 4]


async def test_users_take_turns_however_much_one_of_them_asks_for(url: str) -> None:
    """Three opens of one user wait when another's first arrives: it is served second, not fourth."""
    subjects = Subjects()
    async with EnvWorker({"counter": Counter}, url, slots=1) as worker, connect(url) as raw:
        order: list[str] = []

        async def open_session(user: str, session: str, park_s: float) -> None:
            # The user stands in the subject; a server with accounts holds each login to its own.
            body = Open(session=session, name="counter", park_s=park_s).to_wire()
            answer = await raw.ask(subjects.worker(worker.id, "open", user), body, 30.0)
            assert answer is not None
            parse(Grant, answer)
            order.append(session)

        async def close(user: str, session: str) -> None:
            await raw.ask(subjects.session(worker.id, user, session, "close"), Close(epoch=1).to_wire(), 30.0)

        async def visit(user: str, session: str) -> None:
            await open_session(user, session, 30.0)
            await close(user, session)

        await open_session("carol", "c1", 0.0)
        # A grant that nobody renews lapses after 2 s: this one lasts until all have come.
        await raw.ask(subjects.worker(worker.id, "renew", "carol"), Renew(sessions=[("c1", 1)]).to_wire(), 30.0)
        waiting = []
        for user, session in (("ann", "a1"), ("ann", "a2"), ("ann", "a3"), ("bob", "b1"), ("bob", "b2")):
            waiting.append(asyncio.create_task(visit(user, session)))
            await until(lambda: worker.waiting_count() == len(waiting), "the open is parked")
        await close("carol", "c1")
        await asyncio.gather(*waiting)
        assert order == ["c1", "a1", "b1", "a2", "b2", "a3"]


class Ear:
    """Hears every message of the server, but for those that are sent by the clock, and their answers.

    Nor the entries of the audit, which are for who keeps one, and otherwise go no further than the server.
    """

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.advertised: list[str] = []
        self.renewals: list[str] = []
        self._by_the_clock: set[str] = set()

    def note(self, subject: str, reply: str, _body: bytes) -> None:
        if ".registry." in subject or ".probe." in subject:
            self._by_the_clock.add(reply)
            self.advertised.append(subject.rpartition(".")[2])
        elif subject not in self._by_the_clock and ".audit." not in subject:
            self.heard.append(subject)
            if ".renew." in subject:
                self.renewals.append(reply)


async def test_two_hundred_waiters_cost_a_freed_slot_at_most_four_messages(url: str) -> None:
    # The lease is long, so that no renewal falls due meanwhile.
    async with (
        EnvWorker({"counter": Counter}, url, slots=1, lease_s=600.0) as one,
        EnvWorker({"counter": Counter}, url, slots=1, lease_s=600.0) as two,
        Mesh(url) as holding,
        Mesh(url) as m,
        connect(url) as raw,
    ):
        holders = [await holding.env("counter") for _ in range(2)]
        assert {holder.worker for holder in holders} == {one.id, two.id}
        waiting = [asyncio.create_task(m.env("counter", wait=60.0)) for _ in range(200)]
        await until(lambda: one.waiting_count() + two.waiting_count() == 200, "all are parked")
        assert one.waiting_count() > 0 < two.waiting_count()
        ear = Ear()
        await raw.subscribe("meshrl.>", ear.note)
        await raw.subscribe("_INBOX.>", ear.note)
        await holders[0].close()
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        await until(lambda: ear.renewals != [] and ear.renewals[0] in ear.heard, "the grant's renewal is answered")
        # What waiters make of the news: both workers have advertised twice since, and the client has dealt with it.
        ear.advertised.clear()
        await until(lambda: min(ear.advertised.count(w.id) for w in (one, two)) >= 2, "the news is out")
        await context_of(m).connection.flush()
        await raw.flush()
        assert one.table.free == two.table.free == 0
        # Of the holder's own are the close and its answer. All else is what the freed slot cost.
        closes = [subject for subject in ear.heard if subject.endswith(".close")]
        assert holders[0].worker in closes[0]
        assert len(ear.heard) - 2 <= 4, ear.heard
        assert one.waiting_count() + two.waiting_count() == 199
        for task in waiting:
            task.cancel()
        granted = await asyncio.gather(*waiting, return_exceptions=True)
        assert sum(not isinstance(result, BaseException) for result in granted) == 1


async def test_a_full_mesh_says_after_wait_what_was_asked_and_how_full_it_is(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, slots=1) as worker, Mesh(url) as m:
        env = await m.env("counter")
        with pytest.raises(MeshFull, match="0 of 1 free") as caught:
            await m.env("counter", wait=0.3)
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.details["wait_s"] == 0.3
        await until(lambda: worker.waiting_count() == 0, "its place was given up")
        await env.close()
        async with await m.env("counter", wait=5.0):
            assert worker.table.free == 0


async def test_a_waiter_moves_to_a_worker_that_joins_with_room(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, slots=1) as full, Mesh(url) as m:
        holder = await m.env("counter")
        waiting = asyncio.create_task(m.env("counter", wait=20.0))
        await until(lambda: full.waiting_count() == 1, "it is parked")
        async with EnvWorker({"counter": Counter}, url, slots=1) as empty:
            env = await waiting
            assert env.worker == empty.id
            assert holder.worker == full.id
            await until(lambda: full.waiting_count() == 0, "its place in the other queue was given up")


async def test_a_session_is_found_lost_when_its_worker_is_gone(server: EmbeddedServer) -> None:
    program = """
        import asyncio, sys
        from meshrl import EnvWorker
        from tests.mesh.envs import Counter
        async def main():
            async with EnvWorker({"counter": Counter}, sys.argv[1], allow_kwargs=("*",)) as w:
                print(w.id, flush=True)
                await w.serve_forever()
        asyncio.run(main())
    """
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(program), server.url, cwd=ROOT, stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    await worker.stdout.readline()
    try:
        async with Mesh(server.url) as m:
            idle = await m.env("counter", on_loss="raise")
            stepping = await m.env("counter", {"slow_s": 3600}, on_loss="raise")
            await idle.reset()
            await stepping.reset()
            under_way = asyncio.create_task(stepping.step(1))
            await asyncio.sleep(0.05)
            worker.kill()
            with pytest.raises(SessionLost) as caught:
                await under_way
            assert caught.value.details["reason"] == "worker_lost"
            with pytest.raises(SessionLost, match="open a new"):
                await idle.step(1)
            with pytest.raises(SessionLost):
                await idle.reset()
    finally:
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
        await worker.wait()


async def test_a_step_of_many_leases_costs_nobody_the_lease_the_heartbeat_or_a_step(url: str) -> None:
    """R10 with every duration shortened by the same factor: the step takes six leases."""
    async with EnvWorker({"counter": Counter}, url, lease_s=0.5, allow_kwargs=("*",)) as worker, Mesh(url) as m:
        slow, quick = await m.env("counter", {"slow_s": 3.0}), await m.env("counter")
        await slow.reset(seed=0)
        await quick.reset(seed=0)
        under_way = asyncio.create_task(slow.step(1))
        count = 0
        while not under_way.done():
            count += 1
            assert (await quick.step(count))[:2] == (count, float(count))
            assert [ad.worker for ad in await m.envs()] == [worker.id]
        assert (await under_way)[0] == 1
        assert count > 100


async def test_a_step_that_blocks_the_workers_loop_costs_no_lease_either(url: str) -> None:
    """An env that was fast for a hundred steps is stepped inline; then it hangs for six leases."""
    async with EnvWorker({"counter": Counter}, url, lease_s=0.5, allow_kwargs=("*",)) as worker:
        program = """
            import asyncio, sys
            from meshrl import Mesh
            async def main():
                async with Mesh(sys.argv[1]) as m:
                    slow, other = await m.env("counter", {"slow_s": -1}), await m.env("counter")
                    await slow.reset(seed=0); await other.reset(seed=0)
                    for _ in range(150): await slow.step(0)
                    under_way = asyncio.create_task(slow.step(3000))
                    await asyncio.sleep(0.1)
                    print((await other.step(1))[0], (await under_way)[0], (await slow.step(0))[0], len(await m.envs()))
            asyncio.run(main())
        """
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(program), url, cwd=ROOT, stdout=subprocess.PIPE
        )
        out, _ = await client.communicate()
        assert out.split() == [b"1", b"151", b"152", b"1"]
        assert len(worker.table) == 0


async def test_closing_a_session_ends_the_coroutine_that_it_runs(url: str) -> None:
    async with EnvWorker({"chat": Coroutine}, url) as worker, Mesh(url) as m:
        env = await m.env("chat")
        await env.reset()
        stepping = asyncio.create_task(env.step("never"))
        await until(lambda: any(s.running for s in worker.table), "it runs")
        await env.close()
        await asyncio.gather(stepping, return_exceptions=True)
        await until(lambda: worker.table.free == 64, "the slot is free")

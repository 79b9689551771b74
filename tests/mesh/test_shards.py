"""Vectors over several workers: slots, shards, all or none (R5), over a real server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.context import context_of
from meshrl.client.session import RemoteSession
from meshrl.client.shards import open_shards
from meshrl.errors import EnvError, MeshFull, UnknownName, UsageError, from_wire
from meshrl.wire.codec import unpack
from meshrl.wire.messages import Close, Description, Form, Open, Vectors, parse
from meshrl.wire.subjects import Subjects
from meshrl.worker.hosted import HostedEnv
from tests.mesh.conftest import until
from tests.mesh.envs import Counter
from tests.mesh.worker_process import WorkerProcess

SUBJECTS = Subjects()
LEASE_S = 60.0  # a slot that is free was given back, and did not lapse


class Serving(EnvWorker):
    """A worker whose vectors are one env each, whatever their size: what is tested is who gets slots.

    It notes the opens whose envs it makes; its constructors wait for ``gate``, and raise where ``broken`` is set.
    """

    def __init__(self, url: str, *, vectors: Vectors | None = None, **kwargs: Any) -> None:
        super().__init__({"counter": Counter}, url, lease_s=LEASE_S, **{"slots": 8, **kwargs})
        self.table.grant_s = LEASE_S  # what is opened by hand is renewed by nobody
        self.offers = vectors or Vectors()
        self.opens: list[Open] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    async def _describe_all(self) -> dict[str, Description]:
        described = await super()._describe_all()
        return {name: said.model_copy(update={"vectors": self.offers}) for name, said in described.items()}

    def _construct(
        self, open_: Open, description: Description, check_wanted: Callable[[], None]
    ) -> tuple[HostedEnv, Description]:
        self.opens.append(open_)
        self.gate.wait(60.0)
        if self.broken:
            raise RuntimeError("no simulator here")
        env = HostedEnv(
            Counter(), name=open_.name, session=open_.session, worker=self.id, allow=(), threads=self._threads
        )
        return env, description

    @property
    def sizes(self) -> list[int]:
        """Of the sessions it holds."""
        return sorted(session.num_envs for session in self.table)


@contextlib.asynccontextmanager
async def serving(url: str, *workers: dict[str, Any]) -> AsyncIterator[list[Serving]]:
    """Workers, each with its own arguments."""
    async with contextlib.AsyncExitStack() as stack:
        made = [await stack.enter_async_context(Serving(url, **kwargs)) for kwargs in workers]
        try:
            yield made
        finally:
            for worker in made:
                worker.gate.set()


async def opened(
    mesh: Mesh, num_envs: int, shards: int | None = None, wait: float = 20.0, form: Form = "vector", **request: Any
) -> list[RemoteSession]:
    return await open_shards(
        context_of(mesh),
        "counter",
        None,
        None,
        wait,
        num_envs=num_envs,
        shards=shards,
        on_loss="raise",
        form=form,
        **request,
    )


def all_free(*workers: EnvWorker) -> bool:
    return all(worker.table.free == worker.table.slots for worker in workers)


async def closed(sessions: list[RemoteSession]) -> None:
    await asyncio.gather(*(session.close() for session in sessions))


async def ask(raw: Connection, worker: EnvWorker, session: str, **fields: Any) -> Any:
    """One open, by hand."""
    body = Open(session=session, name="counter", **fields).to_wire()
    answer = await raw.ask(SUBJECTS.worker(worker.id, "open", raw.user), body, 30.0)
    assert answer is not None
    return unpack(answer)


def take(mesh: Mesh, worker: EnvWorker, session: str, num_envs: int) -> None:
    """Take slots behind a mesh's back: over its own connection, so before anything that it sends from now on."""
    connection = context_of(mesh).connection
    body = Open(session=session, name="counter", form="vector", num_envs=num_envs).to_wire()
    connection.publish(SUBJECTS.worker(worker.id, "open", connection.user), body)


async def close(raw: Connection, worker: EnvWorker, session: str) -> None:
    await raw.ask(SUBJECTS.session(worker.id, raw.user, session, "close"), Close(epoch=1).to_wire(), 30.0)
    await until(lambda: worker.table.get((raw.user, session)) is None, "its slots are free")


async def knows(mesh: Mesh, *workers: EnvWorker) -> None:
    """Wait until the mesh has heard how full each worker is."""

    def told() -> bool:
        entries = context_of(mesh).registry.directory.entries("env")
        heard = {e.worker: (e.advertisement.free, e.advertisement.waiting) for e in entries}
        return all(heard.get(worker.id) == (worker.table.free, worker.waiting_count()) for worker in workers)

    await until(told, "the load is told")


async def opens_at(raw: Connection, *workers: EnvWorker) -> list[Open]:
    """Every open that is sent to one of these from now on, in a list that grows."""
    heard: list[Open] = []
    for worker in workers:
        await raw.subscribe(
            SUBJECTS.worker(worker.id, "open", raw.user), lambda _s, _r, body: heard.append(parse(Open, body))
        )
    await raw.flush()
    return heard


# ---------------------------------------------------------------- slots


async def test_a_session_of_ten_takes_ten_slots_and_gives_them_back(url: str) -> None:
    async with serving(url, {"slots": 16}) as (worker,), Mesh(url) as m:
        sessions = await opened(m, 10)
        assert [(s.first_env_id, s.num_envs) for s in sessions] == [(0, 10)]
        assert (worker.sizes, worker.table.free) == ([10], 6)
        assert sessions[0].grant.load.free == 6
        await knows(m, worker)
        await closed(sessions)
        await until(lambda: all_free(worker), "all are free")


async def test_a_client_counts_the_slots_of_its_own_vectors_before_they_are_advertised(url: str) -> None:
    async with serving(url, {"slots": 16}) as (worker,), Mesh(url) as m:
        sessions = await opened(m, 10)
        registry = context_of(m).registry
        (entry,) = registry.directory.entries("env")
        assert registry.placement.believed_free(entry) == 6
        await closed(sessions)
        assert registry.placement.believed_free(registry.directory.entries("env")[0]) == 16
        await until(lambda: all_free(worker), "all are free")


async def test_more_than_a_worker_has_and_a_single_env_of_many_are_refused(url: str) -> None:
    async with serving(url, {}) as (worker,), connect(url) as raw:
        refusal = from_wire((await ask(raw, worker, "s1", form="vector", num_envs=9))["error"])
        assert isinstance(refusal, UsageError)
        assert "9 sub-environments" in refusal.message
        assert "8 slots" in refusal.message
        assert from_wire((await ask(raw, worker, "s2", num_envs=2))["error"]).code == "malformed_message"
        assert all_free(worker)


async def test_an_open_that_is_parked_for_many_slots_is_not_overtaken(url: str) -> None:
    async with serving(url, {"slots": 4}) as (worker,), connect(url) as raw, Mesh(url) as m:
        for session in ("s1", "s2"):
            await ask(raw, worker, session)
        big = asyncio.create_task(opened(m, 4, shards=1))
        await until(lambda: worker.waiting_count() == 1, "it is parked")
        small = asyncio.create_task(ask(raw, worker, "small", park_s=60.0))
        await until(lambda: worker.waiting_count() == 2, "one that would fit is parked behind it")
        await close(raw, worker, "s1")
        assert (worker.table.free, small.done()) == (3, False)
        await close(raw, worker, "s2")
        sessions = await big
        assert (worker.table.free, small.done()) == (0, False)
        await closed(sessions)
        assert (await small)["session"] == "small"


async def test_a_single_env_is_opened_where_nobody_waits_for_many_slots(url: str) -> None:
    async with serving(url, {"slots": 8}, {"slots": 4}) as (large, small), connect(url) as raw, Mesh(url) as m:
        await ask(raw, large, "s1")
        await ask(raw, small, "s2", form="vector", num_envs=3)
        waiting = asyncio.create_task(ask(raw, large, "big", form="vector", num_envs=8, park_s=60.0))
        await until(lambda: large.waiting_count() == 1, "it is parked")
        await knows(m, large, small)
        at_large = await opens_at(raw, large)
        async with await m.env("counter", wait=10.0) as env:
            assert env.worker == small.id
        await context_of(m).connection.flush()
        await raw.flush()
        assert at_large == []
        waiting.cancel()


# ---------------------------------------------------------------- shards


async def test_shards_spread_evenly_over_three_workers_in_global_order(url: str) -> None:
    async with serving(url, {}, {}, {}) as workers, Mesh(url) as m:
        sessions = await opened(m, 13, autoreset_mode="SameStep", seeding="derived")
        assert sorted(len(worker.table) for worker in workers) == [1, 1, 1]
        assert sorted(s.num_envs for s in sessions) == [4, 4, 5]
        firsts = [s.first_env_id for s in sessions]
        assert firsts == [sum(s.num_envs for s in sessions[:n]) for n in range(3)]
        asked = {open_.session: open_ for worker in workers for open_ in worker.opens}
        for session in sessions:
            open_ = asked[session.grant.session]
            assert (open_.first_env_id, open_.num_envs) == (session.first_env_id, session.num_envs)
            assert (open_.form, open_.autoreset_mode, open_.seeding) == ("vector", "SameStep", "derived")
        await closed(sessions)
        await until(lambda: all_free(*workers), "all are free")


@pytest.mark.parametrize(("shards", "sizes"), [(1, [6]), (2, [3, 3]), (4, [2, 2, 1, 1])])
async def test_as_many_shards_as_were_asked_for(url: str, shards: int, sizes: list[int]) -> None:
    async with serving(url, {}, {}) as workers, Mesh(url) as m:
        sessions = await opened(m, 6, shards)
        assert [session.num_envs for session in sessions] == sizes
        assert sorted(size for worker in workers for size in worker.sizes) == sorted(sizes)
        assert len({s.grant.worker for s in sessions}) == min(shards, 2)


async def test_leases_of_all_shards_are_renewed(url: str) -> None:
    async with serving(url, {}, {}) as workers, Mesh(url) as m:
        await opened(m, 4)
        held = [session for worker in workers for session in worker.table]
        assert len(held) == 2
        await until(lambda: all(session.confirmed for session in held), "the keeper has renewed them")


async def test_a_mesh_that_is_left_gives_back_all_shards(url: str) -> None:
    async with serving(url, {}, {}) as workers:
        async with Mesh(url) as m:
            await opened(m, 16)
            assert all(worker.table.free == 0 for worker in workers)
        await until(lambda: all_free(*workers), "all are free")


async def test_nothing_is_left_of_a_vector_of_which_one_shard_fails(url: str) -> None:
    async with serving(url, {}, {}, {}) as workers, Mesh(url) as m:
        workers[1].broken = True
        workers[1].gate.clear()
        opening = asyncio.create_task(opened(m, 12))
        await until(lambda: sum(len(worker.table) for worker in workers) == 3, "all are asked")
        await until(lambda: len(context_of(m)) == 2, "two are granted")
        workers[1].gate.set()
        with pytest.raises(EnvError, match="no simulator here"):
            await opening
        assert len(context_of(m)) == 0
        await until(lambda: all_free(*workers), "all are free")


@pytest.mark.parametrize("granted", [0, 1, 2])
async def test_an_opening_that_is_cancelled_leaves_all_slots_free(url: str, granted: int) -> None:
    async with serving(url, {}, {}, {}) as workers, Mesh(url) as m:
        for worker in workers[granted:]:
            worker.gate.clear()
        opening = asyncio.create_task(opened(m, 12))
        await until(lambda: sum(len(worker.opens) for worker in workers) == 3, "all are asked")
        await until(lambda: len(context_of(m)) == granted, "some are granted")
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert len(context_of(m)) == 0
        for worker in workers:
            worker.gate.set()
        await until(lambda: all_free(*workers), "all are free")


async def test_a_parked_vector_that_is_cancelled_leaves_nobody_waiting(url: str) -> None:
    async with serving(url, {}, {}) as workers, Mesh(url) as holding, Mesh(url) as m:
        await opened(holding, 10)
        opening = asyncio.create_task(opened(m, 12))
        await until(lambda: sum(worker.waiting_count() for worker in workers) == 2, "both shards are parked")
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await until(lambda: sum(worker.waiting_count() for worker in workers) == 0, "both places are given up")
        assert sum(worker.table.free for worker in workers) == 6


# ---------------------------------------------------------------- full


@pytest.mark.parametrize("shards", [None, 2])
async def test_after_wait_the_error_says_how_many_were_asked_for_and_what_is_free_where(
    url: str, shards: int | None
) -> None:
    async with serving(url, {}, {}) as (one, two), Mesh(url) as holding, Mesh(url) as m:
        (held,) = await opened(holding, 6, shards=1)
        holder, other = (one, two) if held.grant.worker == one.id else (two, one)
        await knows(m, one, two)
        with pytest.raises(MeshFull, match="no room for 12 sub-environments") as caught:
            await opened(m, 12, shards, wait=0.5)
        assert f"{holder.id}: 2 of 8 free" in caught.value.message
        assert f"{other.id}: 8 of 8 free" in caught.value.message, "what it held itself is free again"
        assert (caught.value.details["num_envs"], caught.value.details["wait_s"]) == (12, 0.5)
        await until(lambda: all_free(other) and holder.table.free == 2, "nothing is kept")
        assert one.waiting_count() == two.waiting_count() == 0


async def test_more_than_the_mesh_will_ever_hold_is_waited_for_and_then_refused(url: str) -> None:
    async with serving(url, {}) as (one,), Mesh(url) as m:
        with pytest.raises(MeshFull, match=r"no room for 12 sub-environments.* 8 slots in all .*8 of 8 free.*--slots"):
            await opened(m, 12, wait=0.3)
        opening = asyncio.create_task(opened(m, 12))
        async with Serving(url, slots=8) as two:
            assert sorted(session.num_envs for session in await opening) == [6, 6]
            assert one.table.free == two.table.free == 2


@pytest.mark.parametrize(
    ("num_envs", "shards", "says"),
    [(20, None, "have 12 slots in all "), (17, 1, "have 12 slots in all "), (10, 1, "too few each for shards of 10")],
)
async def test_more_than_the_workers_have_in_all_is_refused_long_before_wait_is_over(
    url: str, num_envs: int, shards: int | None, says: str
) -> None:
    async with serving(url, {}, {"slots": 4}) as workers, Mesh(url) as m:
        await knows(m, *workers)
        with pytest.raises(MeshFull, match=rf"{says}.*meshrl up --slots, meshrl serve --slots"):
            await opened(m, num_envs, shards, wait=3600.0)
        assert all_free(*workers)


async def test_workers_of_unequal_slots_have_shards_of_one_size(url: str) -> None:
    async with serving(url, {}, {"slots": 1024}) as (small, large), Mesh(url) as m:
        await knows(m, small, large)
        assert sorted(s.num_envs for s in await opened(m, 12)) == [6, 6]
        assert (small.table.free, large.table.free) == (2, 1018)


async def test_of_two_clients_that_each_hold_what_the_other_needs_the_first_to_give_up_lets_the_other_go_on(
    url: str,
) -> None:
    async with serving(url, {}, {}) as (one, two), connect(url) as raw, Mesh(url) as m:
        await ask(raw, two, "has", form="vector", num_envs=6)
        await knows(m, one, two)
        opening = asyncio.create_task(opened(m, 12, shards=2, wait=1.0))
        await until(lambda: one.sizes == [6] and two.waiting_count() == 1, "it has one half and waits for the other")
        needs = asyncio.create_task(ask(raw, one, "needs", form="vector", num_envs=6, park_s=30.0))
        await until(lambda: one.waiting_count() == 1, "the other client waits for what it has")
        with pytest.raises(MeshFull, match="no room for 12"):
            await opening
        assert (await needs)["session"] == "needs"
        await until(lambda: (one.sizes, two.sizes) == ([6], [6]), "the other has both")
        assert one.waiting_count() == two.waiting_count() == 0


async def test_who_gives_up_takes_nothing_from_who_goes_on_and_keeps_nothing(url: str) -> None:
    async with serving(url, {}, {}) as workers, Mesh(url) as one, Mesh(url) as two:
        for worker in workers:
            worker.gate.clear()
        openings = [asyncio.create_task(opened(mesh, 9, shards=2, wait=0.5)) for mesh in (one, two)]
        await until(lambda: sum(worker.waiting_count() for worker in workers) > 0, "one of them waits")
        with pytest.raises(MeshFull, match="no room for 9"):
            await next(asyncio.as_completed(openings))
        for worker in workers:
            worker.gate.set()
        results = await asyncio.gather(*openings, return_exceptions=True)
        # Which of them was first may differ by worker: then both have given up.
        kept = [result for result in results if isinstance(result, list)]
        assert len(kept) <= 1
        await until(lambda: sum(sum(worker.sizes) for worker in workers) == 9 * len(kept), "only what is kept is held")
        for sessions in kept:
            await closed(sessions)
        await until(lambda: all_free(*workers), "nothing is held for ever")
        assert sum(worker.waiting_count() for worker in workers) == 0


# ---------------------------------------------------------------- what changes meanwhile


async def test_a_shard_goes_elsewhere_when_the_worker_it_was_meant_for_is_full(url: str) -> None:
    async with serving(url, {}, {}) as (one, two), Mesh(url) as m:
        await knows(m, one, two)
        take(m, one, "s1", 8)  # the plan is for both
        sessions = await opened(m, 8, shards=2)
        assert [session.grant.worker for session in sessions] == [two.id, two.id]


async def test_a_shard_is_cut_again_when_only_several_workers_together_have_room(url: str) -> None:
    for attempt in range(5):
        async with serving(url, {}, {}, {}) as workers, connect(url) as raw, Mesh(url) as m:
            await knows(m, *workers)
            opens = await opens_at(raw, *workers)
            # 12 of 24 are planned as 4, 4, 4; by then one worker is full and the others have 6 each.
            for worker, num_envs in zip(workers, (8, 2, 2), strict=True):
                take(m, worker, "taken", num_envs)
            sessions = await opened(m, 12)
            await raw.flush()
            assert len(sessions) == 4
            assert sum(worker.table.free for worker in workers) == 0
            firsts = [s.first_env_id for s in sessions]
            assert firsts == [sum(s.num_envs for s in sessions[:n]) for n in range(4)], "global order all the same"
            assert sum(s.num_envs for s in sessions) == 12
            if all(open_.believed_free for open_ in opens if open_.session != "taken"):
                break
            # It was parked for a moment: another shard was granted already, and its worker had said so before it did.
            assert attempt < 4, "rather than parked"


async def test_a_parked_shard_is_cut_when_several_workers_come_to_have_room_for_it(url: str) -> None:
    async with serving(url, {}, {}) as (one, two), connect(url) as raw, Mesh(url) as m:
        await ask(raw, one, "s1", form="vector", num_envs=8)
        for session in ("s2", "s3"):
            await ask(raw, two, session, form="vector", num_envs=4)
        await knows(m, one, two)
        opening = asyncio.create_task(opened(m, 6, shards=None))
        await until(lambda: one.waiting_count() + two.waiting_count() > 0, "it waits")
        await close(raw, two, "s2")
        async with Serving(url, slots=2) as three:
            sessions = await opening
            assert sum(session.num_envs for session in sessions) == 6
            assert {session.grant.worker for session in sessions} <= {two.id, three.id}
            assert (one.table.free, two.table.free, three.table.free) == (0, 0, 0)


async def test_a_worker_that_is_killed_between_plan_and_grant_is_replaced_by_others(server: EmbeddedServer) -> None:
    url = server.url
    with WorkerProcess(url, {"counter": "tests.mesh.envs:Counter"}, slots=8) as dying:
        async with serving(url, {}, {}) as (one, two), Mesh(url) as m:
            registry = context_of(m).registry
            await until(lambda: len(registry.directory.entries("env")) == 3, "all are known")
            dying.freeze()  # it is asked, and does not answer any more
            opening = asyncio.create_task(opened(m, 12))
            await until(lambda: len(context_of(m)) == 2, "the others have granted")
            dying.kill()
            sessions = await opening
            assert sum(session.num_envs for session in sessions) == 12
            assert {session.grant.worker for session in sessions} == {one.id, two.id}
            assert one.table.free + two.table.free == 4


# ---------------------------------------------------------------- what workers offer


@pytest.mark.parametrize(
    ("offers", "asked", "says", "helps"),
    [
        (
            Vectors(autoreset_modes=["NextStep"]),
            {"autoreset_mode": "SameStep"},
            "it has NextStep",
            'pass autoreset_mode="NextStep", or',
        ),
        (Vectors(seedings=["implementation"]), {}, "it has implementation", 'pass seeding="implementation", or'),
        (Vectors(pool=False), {"form": "pool"}, "pools", "; start a worker"),
    ],
)
async def test_what_nobody_offers_is_refused_before_anything_is_sent(
    url: str, offers: Vectors, asked: dict[str, Any], says: str, helps: str
) -> None:
    async with serving(url, {"vectors": offers}, {"vectors": offers}) as workers, Mesh(url) as m:
        with pytest.raises(UsageError, match=says) as caught:
            await opened(m, 4, **asked)
        assert set(caught.value.details["lacks"]) == {worker.id for worker in workers}
        assert all(worker.id in caught.value.message for worker in workers)
        assert helps in caught.value.message
        assert all(worker.opens == [] for worker in workers)


async def test_only_workers_that_offer_what_is_asked_for_are_candidates(url: str) -> None:
    less = {"vectors": Vectors(autoreset_modes=["NextStep"], pool=False)}
    async with serving(url, less, {}, less) as (one, two, three), Mesh(url) as m:
        (session,) = await opened(m, 8, autoreset_mode="SameStep")
        assert session.grant.worker == two.id
        await session.close()
        (session,) = await opened(m, 8, form="pool")
        assert session.grant.worker == two.id
        await session.close()
        assert one.opens == three.opens == []
        await until(lambda: all_free(two), "all are free")
        assert len(await opened(m, 6)) == 3


async def test_a_worker_refuses_what_it_does_not_offer(url: str) -> None:
    async with serving(url, {"vectors": Vectors(seedings=["gymnasium"])}) as (worker,), connect(url) as raw:
        refusal = from_wire((await ask(raw, worker, "s1", form="vector", seeding="derived"))["error"])
        assert isinstance(refusal, UsageError)
        assert "seeding derived (it has gymnasium)" in refusal.message
        assert all_free(worker)


async def test_names_and_numbers_that_cannot_be_are_refused(url: str) -> None:
    async with serving(url, {}) as (worker,), Mesh(url) as m:
        for num_envs, shards in ((0, None), (4, 5), (4, 0)):
            with pytest.raises(UsageError):
                await opened(m, num_envs, shards)
        with pytest.raises(UnknownName, match="counter"):
            await open_shards(
                context_of(m), "countr", None, None, 5.0, num_envs=4, shards=None, on_loss="raise", form="vector"
            )
        assert worker.opens == []

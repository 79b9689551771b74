from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from meshrl.errors import UsageError, from_wire
from meshrl.protocol import session as session_module
from meshrl.wire.messages import Vectors
from tests.mesh.conftest import until
from tests.mesh.envs import Counter
from tests.unit.worker.conftest import Bare


def code(answer: Any) -> str:
    return from_wire(answer["error"]).code


async def test_a_name_that_is_not_served_is_refused_with_one_that_is_meant(bare: Any) -> None:
    worker: Bare = bare(Counter)
    answer = await worker.replies.to(worker.open(name="envs"))
    assert code(answer) == "unknown_name"
    assert "did you mean env?" in answer["error"]["message"]
    answer = await worker.replies.to(worker.open(name="something"))
    assert "it serves env" in answer["error"]["message"]
    assert code(await worker.replies.to(worker.open(kind="agent"))) == "unknown_name"
    assert code(await worker.replies.to(worker.open(kwargs={"b": 1}))) == "kwargs_not_allowed"
    assert len(worker.table) == 0


async def test_a_worker_busier_than_believed_says_so_once_and_parks_then(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=1)
    await worker.opened("s1")
    answer = await worker.replies.to(worker.open("s2", believed_free=1, park_s=60.0))
    assert answer["bounced"] is True
    waits = worker.open("s2", park_s=60.0)
    assert worker.admission.waiting_count() == 1
    assert worker.admission.is_parked(("anon", "s2"))
    worker.close("s1")
    assert (await worker.replies.to(waits))["session"] == "s2"
    worker.admission.stop()


async def test_who_was_lost_elsewhere_is_served_before_who_came_first(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=1)
    await worker.opened("s1")
    first, resumed = worker.open("s2", user="ann", park_s=60.0), worker.open("lost", user="bob", epoch=2, park_s=60.0)
    worker.close("s1")
    assert (await worker.replies.to(resumed))["session"] == "lost"
    assert first not in dict(worker.replies.sent)
    lost = worker.table.get(("bob", "lost"))
    assert lost is not None
    worker.execution.end(lost, "closed")
    assert (await worker.replies.to(first))["session"] == "s2"
    worker.admission.stop()


async def test_a_constructor_that_raises_frees_its_slot_for_the_next_who_waits(bare: Any) -> None:
    go, made = threading.Event(), list[int]()

    def make() -> Counter:
        made.append(1)
        if len(made) == 1:
            go.wait(30.0)
            raise SystemExit(3)
        return Counter()

    worker: Bare = bare(make, slots=1)
    first, second = worker.open("s1"), worker.open("s2", park_s=60.0)
    go.set()
    answer = await worker.replies.to(first)
    assert code(answer) == "env_error"
    assert answer["error"]["details"]["type"] == "SystemExit"
    assert (await worker.replies.to(second))["session"] == "s2"
    worker.admission.stop()


async def test_an_open_closed_during_its_construction_leaves_nothing(bare: Any) -> None:
    go = threading.Event()

    def make() -> Counter:
        go.wait(30.0)
        return Counter()

    worker: Bare = bare(make)
    opened = worker.open()
    answer = await worker.replies.to(worker.close())
    assert answer["existed"] is True
    go.set()
    await worker.emptied()
    assert [to for to, _ in worker.replies.sent if to == opened] == []


async def test_an_open_given_up_while_the_epoch_before_ends_is_not_granted(bare: Any) -> None:
    go = threading.Event()

    class Closes(Counter):
        def close(self) -> None:
            go.wait(30.0)

    worker: Bare = bare(Closes)
    await worker.opened(epoch=1)
    again = worker.open(epoch=2)
    assert (await worker.replies.to(worker.close(epoch=2)))["existed"] is True
    assert (await worker.replies.to(worker.close(epoch=2)))["existed"] is False
    go.set()
    await worker.emptied()
    assert [to for to, _ in worker.replies.sent if to == again] == []


async def test_an_open_of_a_higher_epoch_is_granted_once_the_one_before_has_ended(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=1)
    await worker.opened(epoch=1)
    assert (await worker.replies.to(worker.open(epoch=2)))["epoch"] == 2
    assert code(await worker.replies.to(worker.open(epoch=1))) == "wrong_epoch"


async def test_parked_opens_are_granted_when_the_kept_answers_shrink(
    bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_CACHED_BYTES", 1000)
    worker: Bare = bare(Counter)
    lane = (await worker.opened("s1")).lane
    assert lane is not None
    lane.receive(1, "", time.monotonic())
    worker.table.answered(lane, b"x" * 1000)
    waits = worker.open("s2", park_s=60.0)
    await asyncio.sleep(0)
    assert worker.admission.waiting_count() == 1
    lane.receive(2, "", time.monotonic())
    worker.table.answered(lane, b"x")
    assert (await worker.replies.to(waits))["session"] == "s2"
    assert worker.admission.waiting_count() == 0
    worker.admission.stop()


async def test_a_parking_time_that_is_over_is_answered_full_with_a_ticket(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=1)
    await worker.opened("s1")
    answer = await worker.replies.to(worker.open("s2", park_s=0.001))
    assert answer["ticket"]
    assert "bounced" not in answer
    answer = await worker.replies.to(worker.open("s3"))
    assert "ticket" not in answer
    worker.admission.stop()


async def test_a_drain_sends_those_who_wait_elsewhere(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=1)
    await worker.opened("s1")
    waits = worker.open("s2", park_s=60.0)
    worker.admission.drain(time.monotonic() + 5.0)
    assert code(await worker.replies.to(waits)) == "worker_draining"
    assert code(await worker.replies.to(worker.open("s3"))) == "worker_draining"
    assert (await worker.replies.to(worker.open("s1")))["session"] == "s1", "who has a session keeps it"
    worker.admission.stop()


# ---------------------------------------------------------------- many sub-environments


def with_vectors(worker: Bare, vectors: Vectors | None = None) -> Bare:
    """The worker, with an env that can be a vector."""
    said = worker.admission.served["env"].model_copy(update={"vectors": vectors or Vectors()})
    worker.admission.served = {"env": said}
    return worker


async def test_a_vector_takes_a_slot_for_each_sub_environment_and_gives_them_back(bare: Any) -> None:
    worker: Bare = with_vectors(bare(Counter, slots=16))
    answer = await worker.replies.to(worker.open("s1", form="vector", num_envs=10))
    assert answer["load"] == {"slots": 16, "free": 6}
    assert (await worker.opened("s2", form="pool", num_envs=6)).num_envs == 6
    assert (await worker.replies.to(worker.open("s3")))["load"]["free"] == 0
    worker.close("s1")
    worker.close("s2")
    await worker.emptied()
    assert worker.table.free == 16


async def test_a_single_env_has_one_sub_environment(bare: Any) -> None:
    worker: Bare = with_vectors(bare(Counter, slots=16))
    answer = await worker.replies.to(worker.open(num_envs=2))
    assert code(answer) == "malformed_message"
    assert (await worker.opened("s2", form="vector")).num_envs == 1


async def test_more_sub_environments_than_slots_are_refused_with_both_numbers(bare: Any) -> None:
    worker: Bare = with_vectors(bare(Counter, slots=16))
    answer = await worker.replies.to(worker.open(form="vector", num_envs=17, park_s=60.0))
    refusal = from_wire(answer["error"])
    assert isinstance(refusal, UsageError)
    assert "17 sub-environments" in refusal.message
    assert "16 slots" in refusal.message
    assert (refusal.details["num_envs"], refusal.details["slots"]) == (17, 16)
    assert worker.admission.waiting_count() == 0


@pytest.mark.parametrize(
    ("vectors", "fields", "says"),
    [
        (None, {"form": "vector"}, "vectors of any kind"),
        (None, {"form": "pool"}, "vectors of any kind"),
        (Vectors(pool=False), {"form": "pool"}, "pools"),
        (Vectors(seedings=["gymnasium"]), {"form": "pool", "seeding": "derived"}, "seeding derived"),
        (Vectors(autoreset_modes=["NextStep"]), {"form": "vector", "autoreset_mode": "SameStep"}, "it has NextStep"),
    ],
)
async def test_vectors_that_the_worker_does_not_offer_are_refused(
    bare: Any, vectors: Vectors | None, fields: dict[str, Any], says: str
) -> None:
    worker: Bare = bare(Counter)
    if vectors is not None:
        with_vectors(worker, vectors)
    answer = await worker.replies.to(worker.open(**fields))
    assert code(answer) == "usage"
    assert says in answer["error"]["message"]
    assert (await worker.opened("s2")).num_envs == 1, "single envs it has"


async def test_a_pool_needs_no_autoreset_mode_of_a_vectors(bare: Any) -> None:
    worker: Bare = with_vectors(bare(Counter), Vectors(autoreset_modes=["Disabled"]))
    assert (await worker.opened(form="pool", num_envs=2)).num_envs == 2


async def test_an_open_that_waits_for_many_slots_is_not_overtaken_by_one_that_would_fit(bare: Any) -> None:
    worker: Bare = with_vectors(bare(Counter, slots=4))
    for session in ("s1", "s2", "s3"):
        await worker.opened(session)
    big = worker.open("big", form="vector", num_envs=3, park_s=60.0)
    small = worker.open("small", user="bob", park_s=60.0)
    assert worker.admission.waiting_count() == 2
    worker.close("s1")
    await until(lambda: worker.table.free == 2, "one slot less than it needs")
    assert worker.admission.waiting_count() == 2
    worker.close("s2")
    assert (await worker.replies.to(big))["load"]["free"] == 0
    assert worker.admission.waiting_count() == 1
    worker.close("s3")
    assert (await worker.replies.to(small))["session"] == "small"
    worker.admission.stop()


async def test_freed_slots_admit_as_many_as_fit(bare: Any) -> None:
    worker: Bare = with_vectors(bare(Counter, slots=4))
    await worker.opened("s1", form="vector", num_envs=4)
    first = worker.open("first", form="vector", num_envs=2, park_s=60.0)
    second = worker.open("second", park_s=60.0)
    third = worker.open("third", form="vector", num_envs=2, park_s=60.0)
    worker.close("s1")
    assert (await worker.replies.to(first))["session"] == "first"
    assert (await worker.replies.to(second))["session"] == "second"
    assert (worker.table.free, worker.admission.is_parked(("anon", "third"))) == (1, True)
    worker.close("second")
    assert (await worker.replies.to(third))["session"] == "third"
    worker.admission.stop()


@pytest.mark.parametrize("how", ["gives up", "is over"])
async def test_when_a_big_open_goes_those_behind_it_get_what_it_kept_from_them(bare: Any, how: str) -> None:
    worker: Bare = with_vectors(bare(Counter, slots=4))
    await worker.opened("s1")
    big = worker.open("big", form="vector", num_envs=4, park_s=60.0 if how == "gives up" else 0.05)
    small = worker.open("small", park_s=60.0)
    assert worker.admission.waiting_count() == 2
    if how == "gives up":
        worker.close("big")
    else:
        assert (await worker.replies.to(big))["ticket"]
    assert (await worker.replies.to(small))["session"] == "small"
    worker.admission.stop()


async def test_a_client_that_believes_in_slots_which_others_wait_for_is_sent_on(bare: Any) -> None:
    worker: Bare = with_vectors(bare(Counter, slots=4))
    await worker.opened("s1")
    worker.open("big", form="vector", num_envs=4, park_s=60.0)
    answer = await worker.replies.to(worker.open("s2", believed_free=1, park_s=60.0))
    assert answer["bounced"] is True
    assert answer["load"] == {"slots": 4, "free": 3, "waiting": 1}
    worker.admission.stop()


# ---------------------------------------------------------------- shares


async def test_an_open_beyond_its_users_share_waits_and_others_pass_it(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=8, max_slots_per_user=2)
    await worker.opened("s1")
    await worker.opened("s2")
    third = worker.open("s3", park_s=60.0)
    assert worker.admission.is_parked(("anon", "s3"))
    assert worker.admission.waiting_count() == 0, "it is in nobody's way"
    granted = await worker.replies.to(worker.open("b1", user="bob", believed_free=6))
    assert granted["session"] == "b1"
    assert granted["load"] == {"slots": 8, "free": 1}, "what is left of bob's share"
    worker.close("s1")
    assert (await worker.replies.to(third))["session"] == "s3"
    worker.admission.stop()


async def test_an_answer_full_says_that_it_is_for_the_share_and_what_the_user_has_of_it(bare: Any) -> None:
    worker: Bare = bare(Counter, slots=8, max_slots_per_user=1)
    await worker.opened("s1")
    for park_s in (0.0, 0.001):
        answer = await worker.replies.to(worker.open("s2", park_s=park_s))
        assert (answer["share"], answer["held"]) == (1, 1)
        assert answer["load"]["free"] == 0, "for this user"
        assert ("ticket" in answer) is (park_s > 0)
    bounced = await worker.replies.to(worker.open("s3", believed_free=7, park_s=60.0))
    assert (bounced["bounced"], bounced["share"]) == (True, 1)
    worker.admission.stop()
    full: Bare = bare(Counter, slots=1, max_slots_per_user=1)
    await full.opened("s1")
    answer = await full.replies.to(full.open("b1", user="bob"))
    assert "share" not in answer, "bob has nothing: the worker is full"


async def test_more_than_a_share_at_once_is_refused_with_both_numbers(bare: Any) -> None:
    worker: Bare = with_vectors(bare(Counter, slots=16, max_slots_per_user=4))
    bounced = await worker.replies.to(worker.open(form="vector", num_envs=8, believed_free=16))
    assert bounced["load"]["free"] == 4, "so that its client asks others for the rest"
    answer = await worker.replies.to(worker.open(form="vector", num_envs=8, park_s=60.0))
    refusal = from_wire(answer["error"])
    assert isinstance(refusal, UsageError)
    assert "at most 4 of its slots, not 8" in refusal.message
    assert (refusal.details["num_envs"], refusal.details["share"]) == (8, 4)
    assert (await worker.opened("s2", form="vector", num_envs=4)).num_envs == 4


async def test_a_user_who_gives_up_its_first_wish_gets_the_next(bare: Any) -> None:
    worker: Bare = with_vectors(bare(Counter, slots=16, max_slots_per_user=4))
    await worker.opened("s1", form="vector", num_envs=2)
    big = worker.open("big", form="vector", num_envs=3, park_s=60.0)
    small = worker.open("small", park_s=60.0)
    assert worker.admission.is_parked(("anon", "small"))
    assert (await worker.replies.to(worker.close("big")))["existed"]
    assert (await worker.replies.to(small))["session"] == "small"
    assert [to for to, _ in worker.replies.sent if to == big] == []
    worker.admission.stop()

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from meshrl.errors import MalformedMessage, MeshFull, UsageError, from_wire
from meshrl.wire.codec import unpack
from meshrl.worker import acts as acts_module
from meshrl.worker.acts import Acts
from meshrl.worker.threads import Threads


class Asker:
    """A policy's queue, and what it answered."""

    def __init__(self, agent: Any) -> None:
        threads = Threads("test")
        threads.loop = asyncio.get_running_loop()
        self.answers: dict[str, Any] = {}
        self.order: list[str] = []
        self._more = asyncio.Event()
        self.acts = Acts("policy", agent, worker="w1", threads=threads, send=self._sent)

    def _sent(self, reply: str, packed: bytes) -> None:
        self.answers[reply] = unpack(packed)
        self.order.append(reply)
        self._more.set()

    def ask(self, *numbers: int, **fields: Any) -> None:
        for number in numbers:
            self.acts.take(f"r{number}", {"obs": number, **fields})

    async def answered(self, count: int) -> list[Any]:
        async with asyncio.timeout(30.0):
            while len(self.order) < count:
                self._more.clear()
                await self._more.wait()
        return [self.answers[reply].get("action") for reply in self.order]

    def error(self, number: int) -> Exception:
        return from_wire(self.answers[f"r{number}"]["error"])


class Batches:
    """Adds one, in batches; what is in ``bad`` it raises for."""

    def __init__(self, bad: Callable[[], BaseException] = ValueError) -> None:
        self.bad = bad
        self.sizes: list[int] = []

    def act(self, obs: int) -> int:
        raise AssertionError("requests are answered by act_batch")

    def act_batch(self, observations: list[int], offered: list[dict[str, Any]]) -> list[int]:
        self.sizes.append(len(observations))
        if 13 in observations:
            raise self.bad()
        return [obs + 1 for obs in observations]


class AsyncBatches(Batches):
    async def act_batch(  # type: ignore[override]
        self, observations: list[int], offered: list[dict[str, Any]]
    ) -> list[int]:
        await asyncio.sleep(0)
        return super().act_batch(observations, offered)


async def test_what_arrives_in_one_turn_is_one_batch_and_a_long_queue_several() -> None:
    policy = Batches()
    asker = Asker(policy)
    asker.ask(*range(600, 1200))
    await asker.answered(600)
    assert policy.sizes == [256, 256, 88]


@pytest.mark.parametrize("policy", [Batches, AsyncBatches])
async def test_a_bad_observation_fails_alone(policy: type[Batches]) -> None:
    asker = Asker(policy())
    asker.ask(12, 13, 14)
    assert await asker.answered(3) == [13, None, 15]
    assert asker.error(13).__class__.__name__ == "AgentError"
    assert len(asker.acts) == 0


@pytest.mark.parametrize("policy", [Batches, AsyncBatches])
async def test_a_mesh_error_is_told_as_itself(policy: type[Batches]) -> None:
    asker = Asker(policy(lambda: UsageError("not that one")))
    asker.ask(12, 13)
    await asker.answered(2)
    assert type(asker.error(13)) is UsageError
    asker.ask(13)
    await asker.answered(3)
    assert type(asker.error(13)) is UsageError


@pytest.mark.parametrize("policy", [Batches, AsyncBatches])
@pytest.mark.parametrize("raised", [asyncio.CancelledError, SystemExit])
async def test_whatever_escapes_a_policy_its_queue_goes_on(
    policy: type[Batches], raised: Callable[[], BaseException]
) -> None:
    asker = Asker(policy(raised))
    asker.ask(13)
    await asker.answered(1)
    assert raised.__name__ in str(asker.error(13))
    asker.ask(1)
    assert (await asker.answered(2))[-1] == 2


@pytest.mark.parametrize("given", [[1], [1, 2, 3], None, 7])
async def test_a_batch_of_a_wrong_length_is_an_error_for_each(given: Any) -> None:
    class Wrong(Batches):
        def act_batch(self, observations: list[int], offered: list[dict[str, Any]]) -> Any:
            return given if len(observations) > 1 or given != [1] else [5, 5]

    asker = Asker(Wrong())
    asker.ask(1, 2)
    assert await asker.answered(2) == [None, None]
    asker.ask(3)
    assert (await asker.answered(3))[-1] is None


async def test_without_act_batch_each_is_answered_as_it_finishes() -> None:
    go = threading.Event()

    def second_waits(obs: int) -> int:
        if obs == 2:
            go.wait(30.0)
        return obs

    asker = Asker(second_waits)
    asker.ask(1, 2, 3)
    assert await asker.answered(1) == [1]
    go.set()
    assert await asker.answered(3) == [1, 2, 3]


async def test_a_request_that_waits_or_is_under_way_is_not_taken_twice_but_afterwards_it_is() -> None:
    go, seen = threading.Event(), list[int]()

    def slow(obs: int) -> int:
        seen.append(obs)
        go.wait(30.0)
        return obs

    asker = Asker(slow)
    asker.ask(1)
    await asyncio.sleep(0)  # its turn has begun
    asker.ask(2, 1, 2, 1)
    assert len(asker.acts) == 2
    go.set()
    assert await asker.answered(2) == [1, 2]
    asker.ask(1)
    assert await asker.answered(3) == [1, 2, 1]
    assert seen == [1, 2, 1]


async def test_a_queue_that_is_full_refuses_with_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acts_module, "MAX_WAITING", 3)
    go = asyncio.Event()

    async def waits(obs: int) -> int:
        await go.wait()
        return obs

    asker = Asker(waits)
    asker.ask(1, 2, 3)
    with pytest.raises(MeshFull, match="more workers") as caught:
        asker.ask(4)
    assert caught.value.details["waiting"] == 3
    asker.ask(2)  # known already
    go.set()
    await asker.answered(3)
    asker.ask(4)
    assert (await asker.answered(4))[-1] == 4


async def test_an_action_that_cannot_travel_or_is_too_large_is_an_error_for_its_asker_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acts_module, "MAX_MESSAGE_BYTES", 1000)
    asker = Asker(lambda obs: {1: object(), 2: b"x" * 2000}.get(obs, obs))
    asker.ask(1, 2, 3)
    assert await asker.answered(3) == [None, None, 3]
    assert "object" in str(asker.error(1))
    assert asker.error(2).__class__.__name__ == "MessageTooLarge"


async def test_a_fast_policy_is_run_inline() -> None:
    where: list[int] = []

    def fast(obs: int) -> int:
        where.append(threading.get_ident())
        return obs

    asker = Asker(fast)
    for number in range(1, 2000):
        asker.ask(number)
        await asker.answered(number)
        if where[-1] == threading.get_ident():
            return
    raise AssertionError("it stayed on its thread")


async def test_a_policy_is_offered_what_its_signature_names() -> None:
    given: list[dict[str, Any]] = []

    def named(obs: int, *, seed: int | None, step: int) -> int:
        given.append({"seed": seed, "step": step})
        return obs

    asker = Asker(named)
    asker.ask(1, seed=5, info={"a": 1})
    await asker.answered(1)
    assert given == [{"seed": 5, "step": 0}]
    with pytest.raises(MalformedMessage, match="obs"):
        asker.acts.take("r2", {})
    with pytest.raises(MalformedMessage, match="deterministic"):
        asker.ask(3, deterministic="yes")
    assert len(asker.acts) == 0, "what was refused does not wait"


async def test_a_queue_that_is_stopped_answers_nothing_more() -> None:
    async def waits(obs: int) -> int:
        await asyncio.get_running_loop().create_future()
        return obs

    asker = Asker(waits)
    asker.ask(1, 2)
    await asyncio.sleep(0)
    asker.acts.stop()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asker.order == []
    assert len(asker.acts) == 0

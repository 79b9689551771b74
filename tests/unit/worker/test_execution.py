from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from meshrl.errors import from_wire
from meshrl.protocol.pace import FAST_STEPS, SLOW_S
from meshrl.protocol.session import State
from meshrl.worker import execution as execution_module
from tests.mesh.envs import Breaks, Counter, Waits
from tests.unit.worker.conftest import Bare


def code(answer: Any) -> str:
    return from_wire(answer["error"]).code


async def test_a_request_runs_once_and_its_answer_can_be_had_again(bare: Any) -> None:
    worker: Bare = bare(Counter)
    await worker.opened()
    await worker.replies.to(worker.ask("reset", 1))
    first = await worker.replies.to(worker.ask("step", 2, action=7))
    assert (first["obs"], first["reward"]) == (1, 7.0)
    assert await worker.replies.to(worker.ask("step", 2, action=7)) == first
    assert code(await worker.replies.to(worker.ask("step", 1, action=7))) == "stale_request"
    assert code(await worker.replies.to(worker.ask("step", 4, action=7))) == "sequence_gap"
    assert (await worker.replies.to(worker.ask("step", 3, action=0)))["obs"] == 2


async def test_what_is_refused_leaves_the_env_untouched(bare: Any) -> None:
    worker: Bare = bare(Counter)
    await worker.opened()
    assert code(await worker.replies.to(worker.ask("step", 1, action=0))) == "reset_needed"
    await worker.replies.to(worker.ask("reset", 2))
    assert code(await worker.replies.to(worker.ask("step", 3))) == "malformed_message"
    assert code(await worker.replies.to(worker.ask("dance", 4))) == "malformed_message"
    state = (await worker.replies.to(worker.ask("state", 5)))["state"]
    assert (state["steps"], state["episode"]) == (0, 1)


@pytest.mark.parametrize("at", ["reset", "step", "exit"])
async def test_an_env_that_raises_ends_its_session_and_says_to_open_another(bare: Any, at: str) -> None:
    worker: Bare = bare(lambda: Breaks(at))
    await worker.opened()
    first = await worker.replies.to(worker.ask("reset", 1))
    answer = first if at == "reset" else await worker.replies.to(worker.ask("step", 2, action=0))
    assert code(answer) == "env_error"
    assert "open a new one" in answer["error"]["message"]
    await worker.emptied()
    again = await worker.replies.to(worker.ask("step", 9, action=0))
    assert code(again) == "session_unknown"
    assert "open a new session" in again["error"]["message"]


@pytest.mark.parametrize("raised", [asyncio.CancelledError, SystemExit])
async def test_an_env_that_is_stepped_inline_may_raise_anything(bare: Any, raised: type[BaseException]) -> None:
    class Raises(Counter):
        def step(self, action: int) -> Any:
            if action:
                raise raised
            return super().step(action)

    worker: Bare = bare(Raises)
    session = await worker.opened()
    await worker.replies.to(worker.ask("reset", 1))
    session.held.held.pace.inline = True
    await worker.replies.to(worker.ask("step", 2, action=0))
    answer = await worker.replies.to(worker.ask("step", 3, action=1))
    assert answer["error"]["details"]["type"] == raised.__name__
    await worker.emptied()


async def test_resets_that_are_fast_earn_the_loop_and_one_slow_one_loses_it(bare: Any) -> None:
    threads = []

    class Tells(Counter):
        def reset(self, **kwargs: Any) -> Any:
            threads.append(threading.get_ident())
            return super().reset(**kwargs)

    worker: Bare = bare(Tells)
    session = await worker.opened()
    paces = session.held.paces
    await worker.replies.to(worker.ask("reset", 1))
    for _ in range(FAST_STEPS):
        paces["reset"].took(0.0)
    await worker.replies.to(worker.ask("reset", 2))
    paces["reset"].took(2 * SLOW_S)
    await worker.replies.to(worker.ask("reset", 3))
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [False, True, False]
    assert not paces["step"].inline


async def test_a_coroutine_cancelled_before_its_first_turn_is_closed_once(bare: Any) -> None:
    Waits.closed = Waits.cancelled = 0
    worker: Bare = bare(Waits)
    await worker.opened()
    await worker.replies.to(worker.ask("reset", 1))
    worker.ask("step", 2, action="wait")
    worker.close()  # in the same turn of the loop
    await worker.emptied()
    assert (Waits.closed, Waits.cancelled) == (1, 0)


async def test_a_coroutine_that_waits_is_cancelled_by_a_close(bare: Any) -> None:
    Waits.closed = Waits.cancelled = 0
    worker: Bare = bare(Waits)
    session = await worker.opened()
    await worker.replies.to(worker.ask("reset", 1))
    worker.ask("step", 2, action="wait")
    await session.held.held.env.under_way.wait()
    worker.close()
    await worker.emptied()
    assert (Waits.closed, Waits.cancelled) == (1, 1)


async def test_a_coroutine_that_answers_in_spite_of_a_cancellation_is_closed_once(bare: Any) -> None:
    Waits.closed = Waits.cancelled = 0
    worker: Bare = bare(Waits)
    session = await worker.opened()
    await worker.replies.to(worker.ask("reset", 1))
    worker.ask("step", 2, action="stubborn")
    env = session.held.held.env
    await env.under_way.wait()
    worker.close()
    await asyncio.sleep(0)
    assert session.state is State.ENDING
    env.let_go.set()
    await worker.emptied()
    assert Waits.closed == 1


async def test_a_coroutine_close_that_hangs_frees_its_slot_in_the_end(
    bare: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(execution_module, "CLOSE_S", 0.01)

    class Hangs(Counter):
        async def close(self) -> None:  # type: ignore[override]
            await asyncio.get_running_loop().create_future()

    worker: Bare = bare(Hangs)
    await worker.opened()
    worker.close()
    await worker.emptied()
    assert any("TimeoutError" in record.getMessage() for record in caplog.records)


async def test_an_answer_that_is_too_large_or_cannot_travel_is_an_error_and_the_session_goes_on(
    bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Counter):
        def step(self, action: int) -> Any:
            return (np.zeros(5000) if action == 1 else object()), 0.0, False, False, {}

    monkeypatch.setattr(execution_module, "MAX_MESSAGE_BYTES", 10_000)
    worker: Bare = bare(Odd)
    await worker.opened()
    await worker.replies.to(worker.ask("reset", 1))
    assert code(await worker.replies.to(worker.ask("step", 2, action=1))) == "message_too_large"
    assert code(await worker.replies.to(worker.ask("step", 3, action=2))) == "unencodable_value"
    assert (await worker.replies.to(worker.ask("reset", 4)))["obs"] == 0

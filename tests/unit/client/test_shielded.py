from __future__ import annotations

import asyncio

import anyio
import pytest

from meshrl.client.shielded import shielded


async def turns(count: int, ran: list[int]) -> str:
    for turn in range(count):
        await asyncio.sleep(0)
        ran.append(turn)
    return "value"


async def test_it_gives_the_value_or_the_error_of_the_work() -> None:
    async def fails() -> None:
        raise ValueError("no")

    assert await shielded(turns(3, [])) == "value"
    with pytest.raises(ValueError, match="no"):
        await shielded(fails())


async def test_work_is_finished_in_a_cancelled_scope_and_the_scope_ends_cancelled() -> None:
    ran: list[int] = []
    after = False
    with anyio.CancelScope() as scope:
        scope.cancel()
        await shielded(turns(20, ran))
        after = True
    assert scope.cancelled_caught
    assert not after
    assert len(ran) == 20


async def test_work_is_finished_however_often_its_caller_is_cancelled() -> None:
    ran: list[int] = []
    caller = asyncio.create_task(shielded(turns(20, ran)))
    while not caller.done():
        await asyncio.sleep(0)
        caller.cancel()
    assert caller.cancelled()
    assert len(ran) == 20

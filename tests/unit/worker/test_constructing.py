"""Sub-environments are constructed at once where that takes long, in their order, and only while they are wanted."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
from gymnasium import spaces

from meshrl.errors import EnvError, SessionUnknown
from meshrl.worker import constructing
from meshrl.worker.constructing import WIDTH, construct_all
from meshrl.worker.threads import Threads

BOTH = pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])


class Made(gymnasium.Env[Any, Any]):
    action_space = spaces.Discrete(2)

    def __init__(self, number: int, size: int = 3, render_mode: str | None = None) -> None:
        self.number = number
        self.observation_space = spaces.Discrete(size)
        self.render_mode = render_mode


class Site:
    """Constructs, and notes what is closed again."""

    def __init__(self, make: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
        monkeypatch.setattr(constructing, "SLOW_S", -1.0 if slow else float("inf"))
        self.threads = Threads("site")
        self.threads.loop = asyncio.get_running_loop()
        self.made = 0
        self.closed: list[Any] = []
        self.wanted = True
        self._make = make
        self._numbers = itertools.count()

    async def construct(self, count: int) -> list[Any]:
        return await self.threads.call(
            lambda: construct_all(
                "env", count, self._one, check=self._check, let_go=self.closed.append, threads=self.threads
            )
        )

    def _one(self) -> Any:
        made = self._make(next(self._numbers))
        self.made += 1
        return made

    def _check(self) -> None:
        if not self.wanted:
            raise SessionUnknown("it is over")


@BOTH
@pytest.mark.parametrize("count", [1, 2, 3, 50])
async def test_as_many_are_made_as_were_asked_for(monkeypatch: pytest.MonkeyPatch, slow: bool, count: int) -> None:
    site = Site(Made, monkeypatch, slow)
    envs = await site.construct(count)
    assert envs[0].number == 0
    assert sorted(env.number for env in envs) == list(range(count))
    assert site.closed == []


async def test_slow_ones_are_made_at_once_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(WIDTH)

    def make(number: int) -> Made:
        if number:
            barrier.wait(30.0)  # one after another, it breaks
        return Made(number)

    assert len(await Site(make, monkeypatch, slow=True).construct(1 + 2 * WIDTH)) == 1 + 2 * WIDTH


async def test_those_that_draw_are_made_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def make(number: int) -> Made:
        threads.add(threading.get_ident())
        return Made(number, render_mode="rgb_array")

    await Site(make, monkeypatch, slow=True).construct(20)
    assert len(threads) == 1


@BOTH
async def test_of_different_spaces_none_is_kept(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    site = Site(lambda number: Made(number, 3 + (number == 5)), monkeypatch, slow)
    with pytest.raises(EnvError, match="different spaces"):
        await site.construct(40)
    assert len(site.closed) == site.made < 40


@BOTH
async def test_where_one_raises_the_others_are_closed(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    def make(number: int) -> Made:
        if number == 5:
            raise OSError("no port is free")
        return Made(number)

    site = Site(make, monkeypatch, slow)
    with pytest.raises(OSError, match="no port"):
        await site.construct(40)
    assert len(site.closed) == site.made < 40


@BOTH
async def test_none_is_made_any_more_once_nobody_wants_them(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    def make(number: int) -> Made:
        if number == 3:
            site.wanted = False
        return Made(number)

    site = Site(make, monkeypatch, slow)
    with pytest.raises(SessionUnknown):
        await site.construct(100)
    assert 4 <= site.made <= 3 + WIDTH
    assert len(site.closed) == site.made

"""Constructing: the sub-environments of one session, several at once where their constructor is slow (R6).

The first is made alone: its spaces are the reference, and the time it took says whether the others are worth threads.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from meshrl.errors import EnvError
from meshrl.worker.drawing import draws
from meshrl.worker.threads import Threads

# A constructor that took longer is called on several threads at once.
SLOW_S = 0.050
# On so many: constructors read files and start processes, of which more at once only stand in each other's way.
WIDTH = 8


def construct_all(
    name: str,
    count: int,
    make: Callable[[], Any],
    *,
    check: Callable[[], None],
    let_go: Callable[[Any], None],
    threads: Threads,
) -> list[Any]:
    """``count`` envs with equal spaces; to be called on a thread.

    Args:
        name: as served.
        count: how many, at least 1.
        make: makes one; envs that draw are made one after another.
        check: raises when they are not needed any more; called before each is made.
        let_go: closes one, when the others cannot be made.
        threads: where others are made meanwhile.

    Raises:
        EnvError: their spaces differ.
        Exception: whatever ``make`` or ``check`` raised first. Those that were made are closed by then.
    """
    envs: list[Any] = []
    try:
        check()
        began = time.monotonic()
        envs.append(make())
        many = count > 2 and time.monotonic() - began > SLOW_S and not draws(envs[0])
        if not many:
            for _ in range(1, count):
                check()
                envs.append(make())
                _check_equal(name, envs[0], envs[-1])
            return envs
    except BaseException:
        for env in envs:
            let_go(env)
        raise
    return _at_once(name, count, envs[0], make, check, let_go, threads)


def _at_once(
    name: str,
    count: int,
    first: Any,
    make: Callable[[], Any],
    check: Callable[[], None],
    let_go: Callable[[Any], None],
    threads: Threads,
) -> list[Any]:
    made: dict[int, Any] = {0: first}
    raised: list[BaseException] = []
    numbers = itertools.count(1)  # to take the next one is atomic
    ended = threading.Semaphore(0)
    width = min(count - 1, WIDTH)

    def work() -> None:
        try:
            while not raised and (number := next(numbers)) < count:
                check()
                made[number] = make()
                _check_equal(name, first, made[number])
        except BaseException as exc:  # noqa: BLE001  # raised below
            raised.append(exc)
        finally:
            ended.release()

    for _ in range(width - 1):
        threads.submit(work)
    work()
    for _ in range(width):
        ended.acquire()
    if raised:
        for env in made.values():
            let_go(env)
        raise raised[0]
    return [made[number] for number in range(count)]


def _check_equal(name: str, first: Any, other: Any) -> None:
    """Whether a sub-environment has the spaces of the first, as a batch of them needs.

    Raises:
        EnvError: it has others.
    """
    if other.observation_space != first.observation_space or other.action_space != first.action_space:
        raise EnvError(
            f"{name}: its constructor gives envs of different spaces, which no vector can hold: "
            f"{other.observation_space}, {other.action_space} after {first.observation_space}, {first.action_space}",
            op="constructor",
        )

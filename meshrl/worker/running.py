"""Running a program that stays: an event loop, and the end that SIGTERM and Ctrl-C bring."""

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

# Of a program whose worker was condemned: it is to be started again ("temporary failure" in sysexits.h).
CONDEMNED_CODE = 75

# Objects more than there were, of those that can be in cycles, before Python's collector looks at the newest; its own
# number is some sessions' worth.
COLLECT_AFTER = 10_000


def end_condemned() -> NoReturn:
    """The last resort of a program whose condemned worker does not end."""
    os._exit(CONDEMNED_CODE)


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on uvloop where it exists."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.run(main)
    result: T = uvloop.run(main)
    return result


def spare_what_stays() -> None:
    """Keep Python's collector from looking again and again at what was imported and made so far.

    For programs that do nothing but serve, once they do: a quarter of the time in which thousands of sessions come was
    the collector's.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])


@dataclass
class Leaving:
    """What the first SIGTERM does in place of an end at once.

    Attributes:
        begin: has ``main`` end by itself before long; None as long as there is nothing to leave.
    """

    begin: Callable[[], None] | None = None


async def until_stopped(main: Coroutine[Any, Any, None], leaving: Leaving | None = None) -> None:
    """Run ``main`` until it ends, or until SIGTERM or Ctrl-C, which cancel it; then its ``finally`` blocks run.

    Only the first of these counts: in a terminal, Ctrl-C often arrives twice (from it and from a program around this
    one), and what happens at the end is bounded in time anyway.

    Args:
        main: what to run.
        leaving: what the first SIGTERM does instead; another, or Ctrl-C, cancels ``main`` then.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(main)
    stopped = left = False

    def stop() -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            task.cancel()

    def terminate() -> None:
        nonlocal left
        if stopped or left or leaving is None or leaving.begin is None:
            stop()
        else:
            left = True
            leaving.begin()

    with contextlib.ExitStack() as handlers:
        for name, handle in ((signal.SIGTERM, terminate), (signal.SIGINT, stop)):
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C alone, as KeyboardInterrupt
                loop.add_signal_handler(name, handle)
                handlers.callback(loop.remove_signal_handler, name)
        try:
            await task
        except asyncio.CancelledError:
            if not stopped:
                raise

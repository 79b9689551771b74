"""Strict recording: no answer leaves before all that it tells is stored.

It is as with ``record="full"``, but that what an answer tells is made a chunk at once, and the answer waits for the
server's word on it. Where that does not come, the session ends with ``NotRecorded``: its learner has seen nothing that
is not on record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from meshrl.protocol.stored import Told
from meshrl.protocol.transcript import Transcript

# So long an answer is withheld, while the recorder goes on trying.
STORED_S = 30.0


class Strict:
    """Withholds the answers of one session; the event loop's.

    Args:
        transcript: of the session.
        nudge: has the recorder look whose turn it is.

    Attributes:
        withheld: how many answers are, at this moment: their env has done what it was asked.
    """

    def __init__(self, transcript: Transcript, nudge: Callable[[], None]) -> None:
        self._transcript = transcript
        self._nudge = nudge
        self.withheld = 0

    def __call__(self, then: Told) -> None:
        """Call ``then`` when all that was noted so far is stored: with None, or with why it is not."""
        loop = asyncio.get_running_loop()
        waiting: list[Told] = [then]
        self.withheld += 1

        def told(why: str | None) -> None:
            late.cancel()
            while waiting:
                self.withheld -= 1
                waiting.pop()(why)

        late = loop.call_later(STORED_S, told, f"it was not stored within {STORED_S:g} s")
        self._transcript.settle()
        self._transcript.when_stored(partial(_on, loop, told))
        self._nudge()


def _on(loop: asyncio.AbstractEventLoop, told: Told, why: str | None) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(told, why)

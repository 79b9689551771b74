"""The thread that watches the processes of envs, whatever comes while it looks."""

from __future__ import annotations

import select
import socket
import sys
import time
from typing import Any

import pytest

from meshrl.worker.child import Child
from meshrl.worker.children import BORN_S, Children, Family
from meshrl.worker.isolation import Deadlines
from meshrl.worker.limits import Limits

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked there")

DEADLINES, LIMITS = Deadlines(60.0, 60.0), Limits()
AT_MOST = 30


def test_a_child_that_is_born_in_the_turn_in_which_it_was_ordered_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may order while the thread looks, and a fork takes less time than a busy machine leaves it waiting."""
    take_fresh, ordered = Family._take_fresh, list[Child]()

    def waiting(family: Family) -> int:
        """Bytes of news that nobody has read."""
        if not select.select([family._control], [], [], 0)[0]:
            return 0
        return len(family._control.recv(4096, socket.MSG_PEEK))

    def while_it_looks(family: Family, poll: Any) -> None:
        take_fresh(family, poll)
        news = waiting(family)
        if news and len(ordered) < AT_MOST:
            ordered.append(family.fork(DEADLINES, LIMITS))
            deadline = time.monotonic() + BORN_S
            while waiting(family) == news and time.monotonic() < deadline:
                time.sleep(0.001)

    children = Children(DEADLINES, LIMITS)
    born = [children.fork()]
    try:
        monkeypatch.setattr(Family, "_take_fresh", while_it_looks)
        born += [children.fork() for _ in range(AT_MOST)]
        assert all(child.pid for child in born)
        family = children._family
        assert family is not None
        assert family.is_alive()
        assert all(child.born.wait(BORN_S) and child.pid for child in ordered)
    finally:
        monkeypatch.undo()
        for child in (*born, *ordered):
            child.end()
        children.stop()

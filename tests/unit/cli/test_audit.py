"""What ``meshrl audit`` shows of what clients sent."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from meshrl.cli.audit import Entry, Found, show
from meshrl.wire.audited import Audited

WHO = {"n": 1, "worker": "e1", "user": "UANN", "session": "s1", "epoch": 1, "kind": "env"}


def entry(login: str | None = None, **facts: Any) -> Entry:
    said = Audited.model_validate({**WHO, "event": "opened", "name": "cartpole", **facts})
    return Entry(seq=1, at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), login=login, said=said)


def shown(*entries: Entry, lost: dict[str, int] | None = None) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    show(console, Found(list(entries), lost or {}))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "facts", [{"name": "\x1b[2Jx"}, {"kwargs": {"\x1b]0;x\x07": 1}}, {"render_mode": "\x1b[31m"}, {"type": "\x9b2J"}]
)
def test_what_clients_sent_moves_no_cursor(facts: dict[str, Any]) -> None:
    text = shown(entry(**facts))
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "\\x" in text


def test_a_line_says_who_what_and_how_it_ended() -> None:
    pool: dict[str, Any] = {"form": "pool", "num_envs": 4}
    text = shown(
        entry("red/ann", kwargs={"size": 5}, render_mode="rgb_array"),
        entry(event="ended", reason="ended", code="env_error", type="ValueError", lasted_s=1.25, **pool),
        lost={"e1": 3},
    )
    assert "red/ann" in text
    assert "cartpole, render_mode=rgb_array, size=5" in text
    assert "UANN" in text
    assert "cartpole, a pool of 4: ended env_error ValueError after 1.2 s" in text
    assert "3 entries of worker e1 between these were lost" in text

"""What workers seal for one another: nobody else can write it, nor put it where it does not belong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from meshrl.errors import MalformedMessage, UsageError
from meshrl.wire.codec import pack
from meshrl.wire.messages import Open
from meshrl.worker.hosted import HostedEnv
from meshrl.worker.origins import outliving
from meshrl.worker.sealing import StateKey
from meshrl.worker.sub_envs import SubEnvs
from meshrl.worker.threads import Threads

KEY, OTHER = StateKey(b"k" * 32), StateKey(b"o" * 32)
SEALED = KEY.seal(b"pong", b"state")


class Emulated(gymnasium.Env[Any, Any]):
    """An env in a process of its own, whose states native code parses there."""

    observation_space = action_space = gymnasium.spaces.Discrete(2)
    resumable = True

    def __init__(self, kind: bytes | None = b"pong") -> None:
        self.state = b"state"
        self._kind = kind

    def outliving(self) -> tuple[Callable[[], bytes], Callable[[bytes], None], bytes | None]:
        return lambda: self.state, self._put, self._kind

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, {}

    def _put(self, state: bytes) -> None:
        self.state = state


def test_what_was_sealed_is_opened_by_any_worker_with_the_key() -> None:
    assert StateKey(b"k" * 32).open(b"pong", SEALED) == b"state"
    assert KEY.open(b"pong", KEY.seal(b"pong", b"")) == b""


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"state",
        SEALED[:-1],
        SEALED[:31],
        SEALED + b"\0",
        bytes([SEALED[0] ^ 1]) + SEALED[1:],
        SEALED[:-1] + bytes([SEALED[-1] ^ 128]),
        bytes(32) + b"state",
        OTHER.seal(b"pong", b"state"),
        KEY.seal(b"breakout", b"state"),
        KEY.seal(b"pon", b"gstate"),
        KEY.seal(b"pongs", b"tate"),
        bytearray(SEALED),
        SEALED.hex(),
        None,
        5,
        [SEALED],
    ],
)
def test_nothing_else_is_opened(bad: object) -> None:
    env = Emulated()
    kept = outliving(env, KEY)
    assert kept is not None
    with pytest.raises(MalformedMessage):
        kept.put(bad)  # type: ignore[arg-type]  # whatever a client sends
    assert env.state == b"state", "it was not touched"


def test_what_native_code_parses_is_told_under_a_key_alone() -> None:
    one, other = Emulated(), Emulated()
    one.state = b"another"
    assert outliving(one) is None
    kept, put = outliving(one, KEY), outliving(other, KEY)
    assert kept is not None
    assert put is not None
    assert kept.get() != b"another"
    put.put(kept.get())
    assert other.state == b"another"


@pytest.mark.parametrize(
    ("state", "taken"),
    [(SEALED, True), (OTHER.seal(b"pong", b"forged"), False), (b"forged", False)],
    ids=["sealed", "sealed otherwise", "not sealed"],
)
def test_a_replay_brings_back_what_a_worker_sealed_and_nothing_else(state: bytes, taken: bool) -> None:
    def single() -> None:
        journal = [["reset", pack({"state": state, "last_seed": 1})]]
        HostedEnv(
            env,
            name="env",
            session="s1",
            worker="w1",
            allow=(),
            threads=Threads("test"),
            resumable=True,
            state_key=KEY,
        ).run("replay", {"journal": journal})

    def many() -> None:
        open_ = Open(name="env", session="s1", form="vector", digests="all")
        SubEnvs([env], open_, KEY).reset_from(0, {"state": state}, None)

    for replay in (single, many):
        env = Emulated()
        env.state = b"fresh"
        with nullcontext() if taken else pytest.raises(MalformedMessage):
            replay()
        assert env.state == (b"state" if taken else b"fresh")


def test_what_this_package_parses_itself_needs_none() -> None:
    for key in (None, KEY):
        kept = outliving(Emulated(None), key)
        assert kept is not None
        assert kept.get() == b"state"


def test_a_key_is_told_apart_and_not_told() -> None:
    assert KEY.id == StateKey(b"k" * 32).id != OTHER.id
    assert "kkk" not in repr(KEY)


def test_a_key_is_all_of_a_file_but_for_the_white_space_around_it(tmp_path: Path) -> None:
    file = tmp_path / "state.key"
    file.write_text("k" * 32 + "\n")
    assert StateKey.read(str(file)).id == KEY.id


@pytest.mark.parametrize("text", ["", "k" * 31, "k" * 31 + "\n" * 9, "k" * 4097])
def test_what_is_no_key_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "state.key"
    with pytest.raises(UsageError, match="cannot be read"):
        StateKey.read(file)
    file.write_text(text)
    with pytest.raises(UsageError, match=r"32|more than"):
        StateKey.read(file)

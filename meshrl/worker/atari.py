"""ALE: what outlives a reset of an Atari env, which is the state of its emulator, and of its own generator (R8).

The emulator's, with a generator for sticky actions, goes on through resets. The env's generator draws frame skips, and
how often ``AtariPreprocessing`` does nothing at first. Sound is more than that, and in no state.

ALE parses a state in native code, which raises what it happens to (``SystemError``, what ``std::string`` says) or takes
what no emulator has written. So no client's bytes may get there: see :mod:`~meshrl.worker.sealing`.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def is_atari(bare: Any) -> bool:
    """Whether it is ALE's own env, not one derived from it, and tells no sound."""
    cls = type(bare)
    return (cls.__module__, cls.__qualname__) == ("ale_py.env", "AtariEnv") and not getattr(bare, "sound_obs", False)


def kind_of(bare: Any) -> bytes | None:
    """Which states can be put into it: those of its game, mode, difficulty and version; None if these are not known."""
    try:
        return json.dumps(["ale", version("ale-py"), bare._game, bare._game_mode, bare._game_difficulty]).encode()  # noqa: SLF001  # it tells them nowhere else
    except (PackageNotFoundError, AttributeError):
        return None


def state_of(bare: Any) -> bytes:
    """The emulator's, with its generator: about 14 KB."""
    # As pickling has it: before ALE 0.12, serialize() took these bytes for a text, and these were in a tuple.
    state = bare.ale.cloneState(include_rng=True).__getstate__()
    return bytes(state[0] if isinstance(state, tuple) else state)


def put_state(bare: Any, state: bytes) -> None:
    """Give it to the emulator; only what :func:`state_of` gave may get here."""
    import ale_py  # noqa: PLC0415  # it is there, since the env is

    bare.ale.restoreState(ale_py.ALEState(state))

"""Origins: what of an env outlives its resets, so that a fresh one that is given it goes on as this one would (R8).

A reset with a seed needs nothing more. One without goes on with the env's generator, and whether that is all that
outlives it nobody can see from outside. It is known of Gymnasium's own envs that are listed here; any other says so
itself, in its ``metadata["outlives_reset"]``::

    "generator"    np_random, and nothing else
    "state"        what get_state() gives, and set_state(state) takes: bytes, or any value that travels
    "nothing"      every reset begins from scratch
    "unknown"      it cannot be resumed at all, not even from a reset with a seed
    (absent)       only a reset with a seed is an origin

ALE's states are parsed by native code. They are told, sealed, by workers that have a key for it (see
:mod:`~meshrl.worker.sealing`); by others only resets with a seed are origins.

What is around the env has to forget its episodes in a reset by itself, as Gymnasium's ``TimeLimit`` does: one wrapper
that is not known to, and only resets with a seed are origins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium
import numpy as np

from meshrl.errors import MalformedMessage
from meshrl.wire.codec import pack, unpack
from meshrl.worker import generators
from meshrl.worker.atari import is_atari, kind_of, put_state, state_of
from meshrl.worker.sealing import StateKey

KEY = "outlives_reset"
# Gymnasium's own, by module: a test compares each with itself, going on in a fresh env from its generator's state.
_BY_GENERATOR = (
    "gymnasium.envs.classic_control.",
    "gymnasium.envs.toy_text.",
    "gymnasium.envs.box2d.lunar_lander",
    "gymnasium.envs.mujoco.",
)
_FORGETFUL = frozenset(
    {
        "TimeLimit",
        "OrderEnforcing",
        "PassiveEnvChecker",
        "FrameStackObservation",
        "RecordEpisodeStatistics",
        "FlattenObservation",
        "RescaleAction",
        "ClipAction",
        "DtypeObservation",
        "FilterObservation",
        "GrayscaleObservation",
        "ResizeObservation",
        "ReshapeObservation",
        "RescaleObservation",
        "TimeAwareObservation",
        "AtariPreprocessing",
        "AddRenderObservation",
        "DiscretizeObservation",
        "DiscretizeAction",
    }
)


class Outliving(NamedTuple):
    """What outlives an env's resets.

    Attributes:
        get: gives it, packed; to be called right before a reset.
        put: gives it to a fresh env, right before a reset.
        native: of what native code parses, which kind of state it is: it has to be sealed before it is told.
    """

    get: Callable[[], bytes]
    put: Callable[[bytes], None]
    native: bytes | None = None


@runtime_checkable
class Elsewhere(Protocol):
    """An env in a process of its own, where alone can be seen what outlives it."""

    resumable: bool

    def outliving(self) -> tuple[Callable[[], bytes], Callable[[bytes], None], bytes | None] | None:
        """The parts of an :class:`Outliving` that is not sealed; None where what outlives its resets is not known."""


def outliving(env: Any, key: StateKey | None = None) -> Outliving | None:
    """What outlives the resets of ``env``, as clients may keep it; None where that is not known.

    Args:
        env: as it was made.
        key: with which what native code parses is sealed; without one it counts as not known.
    """
    kept = unsealed(env)
    if kept is None or kept.native is None:
        return kept
    return None if key is None else _sealed(kept, key, kept.native)


def unsealed(env: Any) -> Outliving | None:
    """The same, whoever parses it: for workers alone."""
    if isinstance(env, Elsewhere):
        there = env.outliving()
        return None if there is None else Outliving(*there)
    bare = getattr(env, "unwrapped", env)
    said = said_by(env)
    if not _forgets(env, bare):
        return None
    if said == "state":
        # Packed before the reset: an env may give what it goes on writing to.
        return Outliving(lambda: pack(bare.get_state()), lambda state: bare.set_state(unpack(state)))
    if said == "nothing":
        return Outliving(_nothing, _put_nothing)
    module = f"{type(bare).__module__}."
    if said == "generator" or (said is None and module.startswith(_BY_GENERATOR)):
        return _generator_of(bare)
    if said is None and is_atari(bare):
        return _emulator_of(bare)
    return None


def said_by(env: Any) -> object:
    """What an env says of itself."""
    metadata = getattr(getattr(env, "unwrapped", env), "metadata", None)
    return metadata.get(KEY) if isinstance(metadata, dict) else None


def resumable(env: Any) -> bool:
    """Whether it does not say that it cannot be."""
    if isinstance(env, Elsewhere):
        return env.resumable
    return said_by(env) != "unknown"


def _forgets(env: Any, bare: Any) -> bool:
    """Whether every wrapper forgets its episodes in a reset."""
    while env is not bare:
        cls = type(env)
        known = cls.__module__.startswith("gymnasium.wrappers.") and cls.__name__ in _FORGETFUL
        if not known or not isinstance(env, gymnasium.Wrapper):
            return False
        env = env.env
    return True


def _nothing() -> bytes:
    return b""


def _put_nothing(state: bytes) -> None:
    if state != b"":
        raise MalformedMessage("an env that nothing outlives was given something")


def _sealed(kept: Outliving, key: StateKey, kind: bytes) -> Outliving:
    get, put = kept.get, kept.put
    return kept._replace(get=lambda: key.seal(kind, get()), put=lambda state: put(key.open(kind, state)))


def _emulator_of(bare: Any) -> Outliving | None:
    """Of an ALE env: its generator's state, and its emulator's."""
    generator, kind = _generator_of(bare), kind_of(bare)
    if generator is None or kind is None:
        return None

    def put(state: bytes) -> None:
        generator.put(state[: generators.PACKED.size])
        put_state(bare, state[generators.PACKED.size :])

    return Outliving(lambda: generator.get() + state_of(bare), put, kind)


def _generator_of(bare: Any) -> Outliving | None:
    """Of an env whose generator is the one that Gymnasium's seeding makes."""
    if not isinstance(getattr(bare, "np_random", None), np.random.Generator):
        return None

    def put(packed: Any) -> None:
        bare.np_random = generators.unpacked(packed)

    is_pcg64 = type(bare.np_random.bit_generator) is np.random.PCG64
    return Outliving(generators.packer(bare), put) if is_pcg64 else None

"""Vector implementations: envs that step many copies of themselves in one call, where the operator asks for them (R6).

    name        made by                                   seeds
    gymnasium   ``gymnasium.make_vec`` with the env's      one generator for all: reset's seed
                own vector entry point
    envpool     ``envpool.make_gymnasium``                 seed + i, at construction: a seeded reset makes it anew

Either takes one seed: of a list of seeds nothing but ``seed + i`` can be followed, and any other is refused. Their
actions are one array, so spaces of other forms (Dict, Tuple, Text) are refused where they are described.

What they cannot do (other autoreset modes, masks, attributes of sub-environments, lanes of their own, options of a
reset where it is EnvPool) their worker advertises, and refuses.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from meshrl.errors import (
    InvalidName,
    InvalidSeed,
    MalformedMessage,
    NotAllowed,
    ResetNeeded,
    UnsupportedSpace,
    UsageError,
)
from meshrl.protocol.pace import BatchPace
from meshrl.protocol.seeds import check_seed
from meshrl.wire.batches import form_of
from meshrl.wire.frames import Frame
from meshrl.wire.merged_infos import pack_merged
from meshrl.wire.messages import AUTORESET_MODES, Open, Vectors
from meshrl.worker.calls import Calls
from meshrl.worker.drawing import alone, draws
from meshrl.worker.factories import Factory, is_gymnasium_id
from meshrl.worker.recorded_vector import RecordedVector
from meshrl.worker.recording import Recording
from meshrl.worker.threads import Threads

IMPLEMENTATIONS = ("meshrl", "gymnasium", "envpool")
# EnvPool keeps seeds in signed 32-bit integers.
SEEDS_BELOW = 1 << 31
# A drawn seed; seed + i has to be below that.
DRAWN_BITS = 30
# An array of frames has the shape (n, height, width, channels).
FRAMES_NDIM = 4


def describe_implementation(name: str, factory: Factory, implementation: str) -> Vectors:
    """What vectors of ``name`` can do that are hosted so.

    Raises:
        InvalidName: there is no such implementation of it.
        UnsupportedSpace: a batch of its actions is not one array.
    """
    if implementation == "meshrl":
        return Vectors()
    if implementation not in IMPLEMENTATIONS:
        raise InvalidName(
            f"{name}: there is no vector implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
        )
    vector = make_implementation(factory, implementation, 1, {}, None)
    try:
        mode = autoreset_mode_of(vector) if implementation == "gymnasium" else "NextStep"
        space = vector.single_action_space
    finally:
        vector.close()
    if form_of(space) != "array":
        raise UnsupportedSpace(
            f"{name}: the vector implementation {implementation!r} has actions of {type(space).__name__}, which are "
            'not one array; host its vectors with vectors="meshrl"',
            space=repr(space)[:200],
        )
    return Vectors(
        implementation=implementation,
        autoreset_modes=[known for known in AUTORESET_MODES if known == mode],
        seedings=["implementation"] if implementation == "gymnasium" else ["gymnasium", "implementation"],
        reset_mask=False,
        options=implementation != "envpool",
        one_seed=True,
        seeds_below=SEEDS_BELOW if implementation == "envpool" else None,
        attributes=False,
        pool=False,
    )


def make_implementation(
    factory: Factory,
    implementation: str,
    num_envs: int,
    kwargs: Mapping[str, Any],
    render_mode: str | None,
    seed: int = 0,
) -> VectorEnv[Any, Any, Any]:
    """A new vector env.

    Raises:
        InvalidName: the env has none, or its package is not installed.
        UsageError: a render mode, and it is EnvPool.
    """
    source = factory.source
    if not isinstance(source, str) or not is_gymnasium_id(source):
        raise InvalidName(f"{source!r}: only envs that are served by their Gymnasium id have vector implementations")
    merged = {**factory.kwargs, **kwargs}
    if implementation == "envpool":
        try:
            import envpool  # noqa: PLC0415  # an optional extra
        except ImportError as exc:
            raise InvalidName("EnvPool is not installed; pip install 'meshrl[envpool]'") from exc
        if render_mode is not None:
            # EnvPool itself can: render gives a frame of its first sub-environment unless it is told which to draw.
            raise UsageError(
                f"{source}: vectors that EnvPool hosts are not rendered; lease them without a render_mode",
                render_mode=render_mode,
            )
        try:
            made: VectorEnv[Any, Any, Any] = envpool.make_gymnasium(source, num_envs=num_envs, seed=seed, **merged)
        except AssertionError as exc:  # of an id that it does not know
            raise InvalidName(f"EnvPool does not make {source}: {exc}") from exc
        return made
    if render_mode is not None:
        merged["render_mode"] = render_mode
    try:
        return gymnasium.make_vec(source, num_envs, vectorization_mode="vector_entry_point", **merged)
    except gymnasium.error.Error as exc:
        raise InvalidName(f"{source} has no vector implementation of its own: {exc}") from exc


def autoreset_mode_of(vector: Any) -> str:
    """The autoreset mode that a vector env declares; Gymnasium's default if it declares none."""
    mode = (getattr(vector, "metadata", None) or {}).get("autoreset_mode", "NextStep")
    return str(getattr(mode, "value", mode))


class HostedImplementation:
    """A vector implementation under one session.

    Args:
        make: makes it; gets a seed.
        open_: what was asked for.
        seeded_at_construction: a seeded reset makes it anew, and no reset takes options: EnvPool.
        threads: where what takes its time runs.

    Attributes:
        vector: the vector env.
        pace: where to step it.
        coroutine: False.
        draws: whether it runs alone; see :mod:`~meshrl.worker.drawing`.
        recorded: is told what it does; None where nobody records it.
    """

    coroutine = False

    def __init__(
        self,
        make: Callable[[int], VectorEnv[Any, Any, Any]],
        open_: Open,
        *,
        seeded_at_construction: bool,
        threads: Threads,
    ) -> None:
        self.name = open_.name
        self.pace = BatchPace(open_.num_envs)
        # A first reset without a seed is that of one drawn here: EnvPool has a fixed one otherwise.
        self.vector = make(secrets.randbits(DRAWN_BITS))
        self.draws = draws(self.vector)
        self._make = make
        self._count = open_.num_envs
        self._first = open_.first_env_id
        self._seeded_at_construction = seeded_at_construction
        self._was_reset = False
        self._calls = Calls(threads)
        self.recorded: RecordedVector | None = None

    @property
    def recording(self) -> Recording | None:
        """Of what is done; None where nobody records it."""
        return None if self.recorded is None else self.recorded.recording

    def __repr__(self) -> str:
        return f"<HostedImplementation of {self._count} {self.name}>"

    def run(self, op: str, body: Frame) -> Frame:
        """Carry out one op; gives the reply's own fields.

        Raises:
            MeshError: the request is refused and nothing was touched.
            Exception: whatever the implementation raises; the session is over then.
        """
        known = {"step": self._step, "reset": self._reset, "render": self._render}.get(op)
        if known is None:
            raise NotAllowed(
                f"{self.name}: a vector implementation has no {op}; its sub-environments cannot be reached"
            )
        return alone(known)(body) if self.draws else known(body)

    async def run_async(self, op: str, body: Frame) -> Frame:
        """The same as :meth:`run`."""
        return self.run(op, body)

    async def close(self, seconds: float) -> None:
        """Close it."""
        await self._calls.close(alone(self.vector.close) if self.draws else self.vector.close, seconds)

    def _step(self, body: Frame) -> Frame:
        self._need_reset("step")
        actions = body.get("actions")
        if not isinstance(actions, np.ndarray) or not actions.ndim or len(actions) != self._count:
            raise MalformedMessage(f"the actions of {self._count} sub-environments are an array of as many")
        obs, rewards, terminations, truncations, infos = self.vector.step(actions)
        frame = {"obs": obs, "rewards": rewards, "terminations": terminations, "truncations": truncations}
        if self.recorded is not None:
            self.recorded.stepped(body, frame, infos)
        if infos:
            frame["infos"] = pack_merged(self._global(infos), self._count)
        return frame

    def _need_reset(self, op: str) -> None:
        if not self._was_reset:
            raise ResetNeeded(f"{self.name}: {op} before the first reset; call reset once")

    def _reset(self, body: Frame) -> Frame:
        if body.get("mask") is not None:
            raise UsageError(f"{self.name}: this vector implementation resets all of its sub-environments or none")
        options, seeds = body.get("options"), body.get("seeds")
        if options is not None and not isinstance(options, dict):
            raise MalformedMessage(f"reset options are a map or nothing, not {type(options).__name__}")
        if options and self._seeded_at_construction:
            raise UsageError(f"{self.name}: this vector implementation takes no reset options")
        if seeds is not None and (not isinstance(seeds, list) or len(seeds) != self._count):
            raise MalformedMessage(f"the seeds of {self._count} sub-environments are a list of as many, or nothing")
        seed = given = self._seed(seeds)
        if self._seeded_at_construction and seed is not None:
            self.vector.close()
            self.vector = self._make(seed)
            seed = None
        if self._seeded_at_construction:
            obs, infos = self.vector.reset()
        else:
            obs, infos = self.vector.reset(seed=seed, options=options)
        self._was_reset = True
        if self.recorded is not None:
            self.recorded.was_reset(obs, infos, given, options)
        frame: Frame = {"obs": obs}
        if infos:
            frame["infos"] = pack_merged(self._global(infos), self._count)
        return frame

    def _seed(self, seeds: list[Any] | None) -> int | None:
        """The one seed that those of all sub-environments come from.

        Raises:
            InvalidSeed: they do not come from one, or it is too large.
        """
        if not seeds or all(seed is None for seed in seeds):
            return None
        checked = [None if seed is None else check_seed(seed) for seed in seeds]
        first = checked[0]
        if first is None or checked != list(range(first, first + self._count)):
            raise InvalidSeed(
                f"{self.name}: a vector implementation takes seeds that are consecutive (seed + i) or none at all; "
                "give reset one seed"
            )
        if self._seeded_at_construction and first + self._count > SEEDS_BELOW:
            raise InvalidSeed(f"{self.name}: EnvPool keeps seeds below {SEEDS_BELOW}; give a smaller one", seed=first)
        return first

    def _render(self, _body: Frame) -> Frame:
        self._need_reset("render")
        frames: Any = self.vector.render()
        # One array may hold a frame of each (n, height, width, channels), or be a single picture of them all.
        if isinstance(frames, (list, tuple)) or (isinstance(frames, np.ndarray) and frames.ndim == FRAMES_NDIM):
            frames = list(frames)
        if not isinstance(frames, list) or len(frames) != self._count:
            raise UsageError(
                f"{self.name}: render gave {_shape_of(frames)}, not a frame of each of {self._count} sub-environments; "
                "lease it with another render_mode, or have it hosted by an implementation that renders each"
            )
        return {"frames": frames}

    def _global(self, infos: dict[str, Any]) -> dict[str, Any]:
        """Infos whose ``env_id`` (EnvPool has one) counts over all shards."""
        if not self._first:
            return infos
        return {
            key: value + self._first
            if key == "env_id" and isinstance(value, np.ndarray)
            else self._global(value)
            if isinstance(value, dict)
            else value
            for key, value in infos.items()
        }


def _shape_of(frames: Any) -> str:
    if isinstance(frames, np.ndarray):
        return f"an array of shape {frames.shape}"
    return f"{len(frames)} frames" if isinstance(frames, list) else f"{type(frames).__name__}"

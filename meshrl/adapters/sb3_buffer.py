"""Stable-Baselines3's replay buffers, filled from experience. Needs the extra ``meshrl[sb3]``.

What a ``ReplayBuffer`` or ``DictReplayBuffer`` holds afterwards is what its own ``add`` would have put there, one call
a row, and is written in one operation a column: these classes' arrays are public. A class with an ``add`` of its own
(``HerReplayBuffer``, yours) is given row after row, at some 15 µs each.

As SB3's own collection has it:

    - ``dones`` are both flags; where the buffer handles timeouts, ``timeouts`` are truncations without a termination.
      Where an episode ended without a flag, or is cut, that is a timeout and no done: its next observation counts.
    - Actions of a bounded Box are scaled to -1 to 1, as its policies have them.
    - Pictures are transposed where the buffer has channels first and the env has them last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

try:
    from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
    from stable_baselines3.common.preprocessing import is_image_space
    from stable_baselines3.common.vec_env import VecTransposeImage
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        f"meshrl.adapters.sb3_buffer needs Stable-Baselines3 ({exc}): pip install 'meshrl[sb3]'", name=exc.name
    ) from exc

from meshrl.adapters.buffers import array_of, laid
from meshrl.client.gathering import Experience
from meshrl.errors import UsageError

Array = NDArray[Any]


def envs_of(buffer: ReplayBuffer) -> int:
    """For how many envs it was made."""
    return int(buffer.n_envs)


def put(buffer: ReplayBuffer, batch: Experience) -> None:
    """Put a batch into it; see :func:`meshrl.adapters.buffers.put`.

    Raises:
        UsageError: it does not take it.
    """
    if not isinstance(buffer, ReplayBuffer):
        raise UsageError(f"a {type(buffer).__name__} is no replay buffer: it takes no transitions of other policies")
    if buffer.optimize_memory_usage:
        raise UsageError(
            "a buffer with optimize_memory_usage has no next observations of their own, so that episodes that were cut "
            "off would run into one another; make it without"
        )
    order, unflagged = laid(batch, envs_of(buffer))
    if not len(order):
        return
    dones = batch.terminations | batch.truncations
    timeouts = unflagged.copy()
    if buffer.handle_timeout_termination:
        timeouts |= batch.truncations & ~batch.terminations
    obs, next_obs = (_observations(buffer, one) for one in (batch.observations, batch.next_observations))
    actions = _actions(buffer, array_of(batch.actions, "actions"))
    if type(buffer).add in {ReplayBuffer.add, DictReplayBuffer.add}:
        _write(buffer, order, (obs, next_obs, actions, batch.rewards, dones, timeouts))
        return
    if unflagged.any() and not buffer.handle_timeout_termination:
        raise UsageError(
            f"{type(buffer).__name__}.add is told of an episode that was cut off only with handle_timeout_termination"
        )
    for row in order:
        infos = [{"TimeLimit.truncated": bool(timeouts[one])} for one in row]
        ended = (dones | unflagged)[row]
        buffer.add(_picked(obs, row), _picked(next_obs, row), actions[row], batch.rewards[row], ended, infos)


def _picked(values: Any, rows: Array) -> Any:
    return {key: part[rows] for key, part in values.items()} if isinstance(values, dict) else values[rows]


def _write(buffer: ReplayBuffer, order: Array, columns: tuple[Any, ...]) -> None:
    """Write rows, the oldest that are there first."""
    size, behind = buffer.buffer_size, buffer.pos + len(order)
    kept = order[-size:]
    at = np.arange(behind - len(kept), behind) % size
    names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    for name, values in zip(names, columns, strict=True):
        target = getattr(buffer, name)
        if isinstance(values, dict):
            for key, part in values.items():
                target[key][at] = part[kept]
        else:
            target[at] = values[kept]
    buffer.full = buffer.full or behind >= size
    buffer.pos = behind % size


def _observations(buffer: ReplayBuffer, values: object) -> Any:
    space = buffer.observation_space
    if not isinstance(space, spaces.Dict):
        return _fitting(array_of(values, "observations"), space, buffer.obs_shape, buffer.observations.dtype, "")
    if not isinstance(values, dict) or values.keys() != space.spaces.keys():
        told = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise UsageError(f"the buffer has observations of {sorted(space.spaces)}, and the env of {told}")
    return {
        key: _fitting(array_of(part, "observations"), space[key], buffer.obs_shape[key], target.dtype, f"[{key!r}]")
        for (key, target), part in ((one, values[one[0]]) for one in buffer.observations.items())
    }


def _fitting(values: Array, space: Any, shape: tuple[int, ...], dtype: Any, where: str) -> Array:
    """Values in the shape that the buffer has them in."""
    wanted = (len(values), *shape)
    if values.shape != wanted and isinstance(space, spaces.Discrete):
        values = values.reshape(wanted)  # it has an axis more
    elif values.shape != wanted and values.ndim == 4 and is_image_space(space):
        values = VecTransposeImage.transpose_image(values)
    if values.shape != wanted or not np.can_cast(values.dtype, dtype, "same_kind"):
        raise UsageError(
            f"the buffer has observations{where} of shape {shape} and {np.dtype(dtype)}, and the env of shape "
            f"{values.shape[1:]} and {values.dtype}"
        )
    return values


def _actions(buffer: ReplayBuffer, actions: Array) -> Array:
    space = buffer.action_space
    if actions.shape[1:] != (space.shape or ()) or not np.can_cast(actions.dtype, buffer.actions.dtype, "same_kind"):
        raise UsageError(
            f"the buffer has actions of {space}, and the env of shape {actions.shape[1:]}, {actions.dtype}"
        )
    if isinstance(space, spaces.Box) and space.is_bounded():
        actions = 2.0 * ((actions - space.low) / (space.high - space.low)) - 1.0  # stable_baselines3's scale_action
    return actions.reshape(len(actions), buffer.action_dim)

"""tianshou's replay buffers, prioritised ones too, filled from experience. Needs the extra ``meshrl[tianshou]``.

A ``ReplayBuffer`` or ``PrioritizedReplayBuffer`` takes a batch at once, by its ``update``; new transitions have the
highest priority that there was. Those of several envs (``PrioritizedVectorReplayBuffer``) know only ``add``, and get
one row after another, at 90 (of one env) to 250 µs (of eight) each.

``truncated`` are the env's, and true where an episode ended without a flag or is cut, so that no return is summed
across that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from tianshou.data import Batch, ReplayBuffer, ReplayBufferManager
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        f"meshrl.adapters.tianshou_buffer needs tianshou ({exc}): pip install 'meshrl[tianshou]'", name=exc.name
    ) from exc

from meshrl.adapters.buffers import array_of, laid
from meshrl.client.gathering import Experience
from meshrl.errors import UsageError


def envs_of(buffer: ReplayBuffer) -> int:
    """For how many envs it was made."""
    return int(buffer.buffer_num) if isinstance(buffer, ReplayBufferManager) else 1


def put(buffer: ReplayBuffer, batch: Experience) -> None:
    """Put a batch into it; see :func:`meshrl.adapters.buffers.put`.

    Raises:
        UsageError: it does not take it.
    """
    if not isinstance(buffer, ReplayBuffer):
        raise UsageError(f"a {type(buffer).__name__} is no replay buffer")
    for option in ("ignore_obs_next", "save_only_last_obs"):
        if buffer.options[option]:
            raise UsageError(f"a buffer with {option} does not keep the last observations of episodes; make it without")
    order, unflagged = laid(batch, envs_of(buffer))
    if not len(order):
        return
    columns = {
        "obs": _values(batch.observations, "observations"),
        "act": _values(batch.actions, "actions"),
        "rew": batch.rewards,
        "terminated": batch.terminations,
        "truncated": batch.truncations | unflagged,
        "done": batch.terminations | batch.truncations | unflagged,
        "obs_next": _values(batch.next_observations, "observations"),
    }
    if isinstance(buffer, ReplayBufferManager):
        every = Batch(columns)
        for row in order:
            buffer.add(every[row])
        return
    kept = np.arange(len(batch))[-buffer.maxsize :]
    buffer.update(ReplayBuffer.from_data(**{name: values[kept] for name, values in columns.items()}))


def _values(values: object, what: str) -> Any:
    if isinstance(values, dict):
        return Batch({key: _values(part, what) for key, part in values.items()})
    return array_of(values, what)

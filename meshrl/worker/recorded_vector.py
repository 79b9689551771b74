"""What a vector implementation tells, for its recording: which of its rows are resets shows in what it told before.

Nothing of it can be run again in an env of its own, as its sub-environments share what they draw from: it is recorded
with observations, or not at all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meshrl.protocol.noted import Info
from meshrl.protocol.values import own
from meshrl.wire.frames import Frame
from meshrl.wire.info_forms import is_by_env
from meshrl.worker.recording import Recording


class RecordedVector:
    """Tells a recording what a vector implementation did.

    Args:
        recording: of the session.
        count: of its sub-environments.
        mode: its autoreset mode.
    """

    def __init__(self, recording: Recording, count: int, mode: str) -> None:
        self.recording = recording
        self._count = count
        self._mode = mode
        self._over = np.zeros(count, np.bool_)  # whose next step is a reset

    def was_reset(self, obs: Any, infos: dict[str, Any], seed: int | None, options: Info | None) -> None:
        """All of them were."""
        for i in range(self._count):
            self.recording.began(i, None if seed is None else seed + i, options)
        self.recording.was_reset(np.arange(self._count), own(obs), row_infos(infos, self._count))
        self._over[:] = False

    def stepped(self, body: Frame, frame: Frame, infos: dict[str, Any]) -> None:
        """A step is about to be answered."""
        self.recording.acted(body)
        own_frame = {name: own(frame[name]) for name in ("obs", "rewards", "terminations", "truncations")}
        for name, dtype in (("rewards", np.float64), ("terminations", np.bool_), ("truncations", np.bool_)):
            own_frame[name] = own_frame[name].astype(dtype, copy=False)
        ended = own_frame["terminations"] | own_frame["truncations"]
        told = row_infos(infos, self._count)
        if self._mode == "SameStep":
            finals = [(i, _taken(info, "final_obs", "final_info")) for i, info in told if ended[i]]
            told = [one for one in sorted([*finals, *told], key=_row) if one[1]]
            begun = ended
        else:
            begun, self._over = self._over, ended if self._mode == "NextStep" else self._over
        for i in np.flatnonzero(begun).tolist():
            self.recording.began(i, None, None)
        self.recording.told(None, own(body["actions"]), own_frame, told)


def row_infos(infos: dict[str, Any], count: int) -> list[tuple[int, Info]]:
    """What infos that an implementation has merged say of each sub-environment, as far as they say something of it."""
    rows: list[Info] = [{} for _ in range(count)]
    for key, value in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue  # a mask
        mask = infos.get(f"_{key}")
        said = range(count) if mask is None else np.flatnonzero(mask).tolist()
        if isinstance(value, dict):
            inner = dict(row_infos(value, count))
            for i in said:
                if i in inner or mask is not None:
                    rows[i][key] = inner.get(i, {})
        else:
            by_env = is_by_env(value, count)
            for i in said:
                rows[i][key] = own(value[i] if by_env else value)
    return [(i, info) for i, info in enumerate(rows) if info]


def _taken(info: Info, *names: str) -> Info:
    """Some of it, which it has no more."""
    return {name: info.pop(name) for name in names if name in info}


def _row(one: tuple[int, Info]) -> int:
    return one[0]

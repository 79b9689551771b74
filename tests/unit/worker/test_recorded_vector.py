"""What a vector implementation tells is recorded as what it means, of whatever dtype it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from meshrl.protocol.joined import joined
from meshrl.worker.recorded_vector import RecordedVector
from meshrl.worker.recording import Recording


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int32, np.int64])
def test_flags_may_be_numbers(dtype: Any) -> None:
    recording = Recording((spaces.Box(-1, 1, (2,)), spaces.Discrete(3)), [None] * 4, "full")
    recorded = RecordedVector(recording, 4, "Disabled")
    frame = {
        "obs": np.zeros((4, 2), np.float32),
        "rewards": np.arange(4, dtype=np.float32),
        "terminations": np.array([1, 0, 0, 0], dtype),
        "truncations": np.array([0, 1, 0, 1], dtype),
    }
    recorded.stepped({"actions": np.arange(4) % 3}, frame, {})
    told = joined(recording.transcript, recording.transcript.taken(1 << 62))
    assert told.rewards.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert told.terminations.tolist() == [True, False, False, False]
    assert told.truncations.tolist() == [False, True, False, True]

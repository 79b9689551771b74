"""What a lost session is opened again with."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from meshrl.client.recovery import Recovery
from meshrl.wire.codec import Codec, unpack
from meshrl.wire.kept import kept, whole


def test_the_last_answer_is_kept_as_it_was_told_whatever_its_user_makes_of_it() -> None:
    recovery = Recovery(cast("Any", None), "env", "lab", None, {}, 30.0, resumes=False)
    obs = np.ones((300, 300), np.uint8)
    own = bytearray(Codec().pack_batch({"seq": 1, "obs": obs}))  # as a large one arrives
    frame = unpack(own)
    recovery.note("step", b"", kept(cast("bytes", own), None), frame, 0.0)
    frame["obs"][...] = 0
    assert np.array_equal(unpack(whole(recovery.told))["obs"], obs)

"""What ``--json`` prints is JSON, whatever an env tells or a client asks for."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np

from meshrl.cli.plain import plain


def test_values_that_json_has_not_are_told_in_words() -> None:
    value = {
        "a": np.arange(2),
        "b": (1, None, b"x"),
        3: {"c": np.float64(0.5)},
        "at": datetime(2026, 1, 2, tzinfo=UTC),
        "nan": [float("nan"), np.float32(np.inf)],
    }
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "a": [0, 1],
        "b": [1, None, "b'x'"],
        "3": {"c": 0.5},
        "at": "2026-01-02T00:00:00+00:00",
        "nan": ["nan", "inf"],
    }

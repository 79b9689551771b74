from __future__ import annotations

from typing import Any

import pytest

from meshrl.worker.fingerprint import fingerprint_of
from tests.mesh.resumed_envs import Tuned, TunedOtherwise

SAME: dict[str, Any] = {"env": Tuned(), "spec": None, "versions": {"numpy": "2.0"}, "arguments": {"gain": 1}}


def test_it_is_the_same_of_the_same() -> None:
    assert fingerprint_of(**SAME) == fingerprint_of(**{**SAME, "env": Tuned()})
    assert fingerprint_of(**{**SAME, "versions": {"numpy": "2.0", "meshrl": "9"}}) == fingerprint_of(**SAME)


@pytest.mark.parametrize(
    "other",
    [
        {"env": TunedOtherwise()},
        {"spec": "{}"},
        {"versions": {"numpy": "2.1"}},
        {"arguments": {"gain": 2}},
        {"sealed_by": "0f"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_it_is_another_where_anything_is_that_behaviour_depends_on(other: dict[str, Any]) -> None:
    assert fingerprint_of(**{**SAME, **other}) != fingerprint_of(**SAME)

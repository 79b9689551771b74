"""What a worker's vectors lack is named, and what to pass instead."""

from __future__ import annotations

import pytest

from meshrl.protocol.offers import lacking, remedy
from meshrl.wire.messages import AutoresetName, Form, Seeding, Vectors


@pytest.mark.parametrize(
    ("vectors", "form", "mode", "seeding", "text"),
    [
        (Vectors(), "vector", "SameStep", "derived", ""),
        (Vectors(seedings=["implementation"]), "vector", "NextStep", "gymnasium", 'seeding="implementation"'),
        (
            Vectors(seedings=["implementation"], autoreset_modes=["NextStep"]),
            "vector",
            "SameStep",
            "gymnasium",
            'autoreset_mode="NextStep" and seeding="implementation"',
        ),
        (Vectors(pool=False), "pool", "NextStep", "gymnasium", ""),
        (Vectors(seedings=[]), "vector", "NextStep", "derived", ""),
        (None, "vector", "NextStep", "gymnasium", ""),
    ],
)
def test_what_to_pass_instead_is_written_as_it_is_passed(
    vectors: Vectors | None, form: Form, mode: AutoresetName, seeding: Seeding, text: str
) -> None:
    assert remedy(vectors, form, mode, seeding) == text


@pytest.mark.parametrize(
    ("vectors", "form", "mode", "seeding", "lacks"),
    [
        (None, "single", "SameStep", "derived", ""),
        (None, "vector", "NextStep", "gymnasium", "single envs only"),
        (Vectors(), "vector", "Disabled", "derived", ""),
        (Vectors(), "pool", "NextStep", "derived", ""),
        (Vectors(pool=False), "pool", "SameStep", "gymnasium", "pools"),
        (Vectors(pool=False), "vector", "SameStep", "gymnasium", ""),
        (Vectors(autoreset_modes=["NextStep", "Disabled"]), "vector", "SameStep", "gymnasium", "NextStep, Disabled"),
        (Vectors(autoreset_modes=["NextStep"]), "pool", "Disabled", "gymnasium", ""),
        (Vectors(seedings=["gymnasium"]), "vector", "NextStep", "derived", "seeding derived (it has gymnasium)"),
        (Vectors(seedings=[]), "pool", "NextStep", "derived", "(it has none)"),
    ],
)
def test_what_a_worker_lacks_is_named_with_what_it_has(
    vectors: Vectors | None, form: Form, mode: AutoresetName, seeding: Seeding, lacks: str
) -> None:
    said = lacking(vectors, form, mode, seeding)
    assert bool(said) is bool(lacks)
    assert lacks in said

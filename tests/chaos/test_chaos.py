"""Ten learners on four workers, under a schedule of faults: each sees what it would see alone, to the bit.

``make chaos`` is the long form, some ten minutes; otherwise it is a short one. ``CHAOS_SEED`` is the schedule's seed.
"""

from __future__ import annotations

import os
import sys

import pytest

from tests.chaos.model import Broken
from tests.chaos.quotas import LONG, SHORT
from tests.chaos.run import run

SEED = int(os.environ.get("CHAOS_SEED", "1"))
QUOTAS = LONG if os.environ.get("MESHRL_CHAOS") == "long" else SHORT
# For the start and the end.
MARGIN_S = 120.0

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="stops processes and looks for it in /proc"),
    # Box2D is made by SWIG, and ends the interpreter where its warnings are errors.
    pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning"),
]


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  # shown by `make chaos`


@pytest.mark.timeout(QUOTAS.limit_s + MARGIN_S)
async def test_whatever_happens_to_workers_server_and_network_every_learner_sees_what_it_would_see_alone() -> None:
    say(f"\nCHAOS_SEED={SEED}")
    report = await run(SEED, QUOTAS, say)
    say(f"\n{report.table()}\n\n{report.as_json()}")
    assert not report.errors
    assert report.unmet() == []
    assert {kind.value: report.broken[kind] for kind in Broken} == {kind.value: 0 for kind in Broken}

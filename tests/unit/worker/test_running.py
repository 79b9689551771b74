"""Programs that stay."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
from meshrl.worker.running import COLLECT_AFTER, spare_what_stays

class Cyclic:
    def __init__(self):
        self.me = self
        self.told = told
    def __del__(self):
        self.told.append("gone")

told = []
Cyclic()  # garbage at that moment
spare_what_stays()
assert told == ["gone"], "what is kept for good holds no garbage"
assert gc.get_freeze_count() > 1000, gc.get_freeze_count()
assert gc.get_threshold()[0] == COLLECT_AFTER, gc.get_threshold()
for _ in range(2 * COLLECT_AFTER):
    Cyclic()
assert len(told) > COLLECT_AFTER, "what comes later is collected"
"""


def test_what_stays_is_spared_and_what_comes_later_is_collected() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)

"""The report of a run: what was reached of its quotas, and what was broken."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.learners import Learner
from tests.chaos.model import Broken
from tests.chaos.policies import HAS_BOX2D
from tests.chaos.quotas import Quotas
from tests.chaos.resumes import Resumes
from tests.chaos.schedule import Kind


@dataclass(eq=False)
class Report:
    """Of a run; what it has counted so far.

    Attributes:
        seed: of its schedule and its learners.
        quotas: that it is to reach.
        learners: their own counts.
        resumes: what their clients have said.
        counted: faults that took effect, by kind.
        tried: all of them.
        broken: how often which promise was.
        errors: whatever else went wrong, as texts.
        workers: that were started.
        seconds: that it took.
    """

    seed: int
    quotas: Quotas
    learners: Sequence[Learner]
    resumes: Resumes
    counted: Counter[Kind] = field(default_factory=Counter)
    tried: Counter[Kind] = field(default_factory=Counter)
    broken: Counter[Broken] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    workers: int = 0
    seconds: float = 0.0

    @property
    def episodes(self) -> int:
        """That all learners have finished."""
        return sum(learner.expected.episodes for learner in self.learners)

    def rows(self) -> list[tuple[str, int, int]]:
        """What, how often, and how often it is to be at the least."""
        quotas = self.quotas
        of_each: Counter[str] = Counter()
        for learner in self.learners:
            of_each[learner.name] += learner.expected.episodes
        fewest = min(learner.expected.episodes for learner in self.learners)
        return [
            ("episodes", self.episodes, quotas.episodes),
            *((f"episodes of {name}", count, quotas.episodes_of_each) for name, count in of_each.items()),
            ("episodes of the learner that has fewest", fewest, quotas.episodes_by_each),
            ("sessions resumed while a step was in flight", self.resumes.in_flight, quotas.resumed),
            ("sessions moved before their worker left", self.resumes.moved, quotas.moved),
            *((kind.value, self.counted[kind], quotas.faults[kind]) for kind in Kind),
        ]

    def unmet(self) -> list[str]:
        """What of the quotas is not reached yet."""
        return [f"{what}: {count} of {least}" for what, count, least in self.rows() if count < least]

    def progress(self) -> str:
        """One line."""
        resumes = self.resumes
        left = "; ".join(self.unmet()) or "all quotas are reached"
        return f"{self.seconds:4.0f} s  {self.episodes} episodes, {resumes.in_flight} resumed in flight. Left: {left}"

    def table(self) -> str:
        """For people."""
        lines = [f"chaos: seed {self.seed}, {self.seconds:.0f} s, {self.workers} workers started"]
        if not HAS_BOX2D:
            lines.append("Box2D is not installed: CartPole stands in for LunarLander")
        lines += ["", f"{'learner':32}{'episodes':>9}{'transitions':>13}{'cancelled':>11}{'slowest, s':>12}"]
        for name, form, episodes, transitions, settled, slowest_s in (learner.told() for learner in self.learners):
            lines.append(f"{name + ', ' + form:32}{episodes:9,}{transitions:13,}{settled:11,}{slowest_s:12.1f}")
        lines += ["", f"{'what':46}{'count':>7}{'at least':>10}"]
        lines += [f"{what:46}{count:7,}{least:10,}" for what, count, least in self.rows()]
        lines.append(f"{'sessions resumed with nothing in flight':46}{self.resumes.idle:7,}")
        lines.append(f"{'replays lost on the way':46}{len(self.resumes.replays_lost):7,}")
        reasons = ", ".join(f"{why} {count}" for why, count in sorted(self.resumes.reasons.items()))
        lines.append(f"lost by: {reasons or 'nobody'}; resumed within {self._resumed_within()}")
        lines += ["", f"{'transitions':46}{'count':>7}{'at most':>10}"]
        lines += [f"{kind.value:46}{self.broken[kind]:7,}{0:10,}" for kind in Broken]
        return "\n".join([*lines, *(f"ERROR {error}" for error in self.errors)])

    def _resumed_within(self) -> str:
        took = sorted(self.resumes.seconds)
        if not took:
            return "no time"
        p50, p99 = (took[math.ceil(len(took) * share) - 1] for share in (0.5, 0.99))
        return f"{p50:.2f} s (p50), {p99:.2f} s (p99), {took[-1]:.2f} s (longest)"

    def as_json(self) -> str:
        """For programs: one line."""
        told: dict[str, Any] = {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "box2d": HAS_BOX2D,
            "learners": [learner.told()._asdict() for learner in self.learners],
            "counts": {what: {"count": count, "least": least} for what, count, least in self.rows()},
            "tried": {kind.value: count for kind, count in self.tried.items()},
            "resumed_idle": self.resumes.idle,
            "replays_lost": len(self.resumes.replays_lost),
            "lost_by": self.resumes.reasons,
            "broken": {kind.value: self.broken[kind] for kind in Broken},
            "errors": self.errors,
            "workers": self.workers,
        }
        return json.dumps(told)

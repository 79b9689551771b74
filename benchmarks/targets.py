"""The targets, as a table: what each is made of, and whether a run meets it."""
# ruff: noqa: RUF001  # the signs of the table that they come from

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks import estimates
from benchmarks.estimates import Estimate, Values

Series = Mapping[str, Mapping[str, Values]]
"""By turn (``system/work``) and quantity (``rate``, ``p50_us``, ...): a value a round."""


@dataclass(frozen=True)
class Part:
    """One comparison of a target's row.

    Attributes:
        what: of what to what, in a table's cell.
        ours: turns; the best of them is taken, and named where there are several.
        theirs: turns of which the best is what ours is compared with; none where the figure stands alone.
        quantity: of each turn.
        sense: whether the figure must be at least or at most ``bound``.
        bound: the target.
        how: ours over theirs, or ours less theirs.
        unit: of the figure; empty for a ratio.
    """

    what: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    quantity: str
    sense: Literal[">=", "<="]
    bound: float
    how: Literal["ratio", "difference", "itself"] = "ratio"
    unit: str = ""


@dataclass(frozen=True)
class Target:
    """A row of the issue's table.

    Attributes:
        work: in its words.
        target: the same.
        parts: what is compared.
        scale: the setting of the run that says how much was measured, and what the row has in mind.
    """

    work: str
    target: str
    parts: tuple[Part, ...]
    scale: tuple[str, int] | None = None

    def measured_at(self, settings: Mapping[str, Any]) -> str:
        """What a run did in place of what the row says; empty where it did just that."""
        if self.scale is None or settings[self.scale[0]] == self.scale[1]:
            return ""
        return f"of {settings[self.scale[0]]:,} where the target says {self.scale[1]:,}"


@dataclass(frozen=True)
class Verdict:
    """What became of one part in a run.

    Attributes:
        part: which.
        status: ``met``, ``missed`` or ``not measured``.
        close: whether the interval holds the bound, so that another run may say otherwise.
        estimate: None where it was not measured.
        ours: the turn that was taken.
        theirs: the same of what it was compared with.
        reason: why it was not measured.
    """

    part: Part
    status: Literal["met", "missed", "not measured"]
    close: bool = False
    estimate: Estimate | None = None
    ours: str = ""
    theirs: str = ""
    reason: str = ""


# Quantities of which less is better.
LESS = frozenset({"p50_us", "p99_s", "taken_s"})


def _ours(*works: str) -> tuple[str, ...]:
    return tuple(f"meshrl/{work}" for work in works)


def _sessions(name: str, work: str) -> tuple[Part, ...]:
    best = ("openenv_best/sessions", "openenv/sessions")
    return (
        Part(f"{name}: that succeed", _ours(work), (), "succeeded", ">=", 1.0, how="itself"),
        Part(f"{name}: rate over OpenEnv's", _ours(work), best, "rate", ">=", 2.0),
        Part(f"{name}: p99 over OpenEnv's", _ours(work), best, "p99_s", "<=", 0.5),
    )


BATCHED = ("vector4096_1", "vector4096_2")
TWO = ("two2048_1", "two2048_2")
CLIENTS16 = ("clients16_one_mesh", "clients16_meshes")
SLEEP64 = ("sleep64_vector", "sleep64_halves", "sleep64_apart", "sleep64_pool")

TARGETS = (
    Target(
        "CartPole, one env, one client, p50",
        "at most OpenEnv's best case; at most echo + 60 µs",
        (
            Part("p50 over OpenEnv's best case", _ours("single"), ("openenv_best/single",), "p50_us", "<=", 1.0),
            Part("p50 less the echo's", _ours("single"), _ours("echo"), "p50_us", "<=", 60.0, "difference", "µs"),
        ),
    ),
    Target(
        "CartPole, 16 clients, unbatched",
        "at least 1.5 × OpenEnv's best case, 4 × its usual one",
        (
            Part("over OpenEnv's best case", _ours(*CLIENTS16), ("openenv_best/clients16",), "rate", ">=", 1.5),
            Part("over OpenEnv's usual one", _ours(*CLIENTS16), ("openenv/clients16",), "rate", ">=", 4.0),
        ),
    ),
    Target(
        "CartPole, 64 sub-environments in Python",
        "at least 3 × AsyncVectorEnv on the same machine",
        (
            Part(
                "over AsyncVectorEnv",
                _ours("vector64_1", "vector64_2"),
                ("gymnasium_async/vector64",),
                "rate",
                ">=",
                3.0,
            ),
        ),
    ),
    Target(
        "CartPole, a pool of 256 in Python, one half stepping while the other is decided",
        "at least 0.85 × local SyncVectorEnv",
        (
            Part(
                "over SyncVectorEnv",
                _ours("pool256_1", "pool256_2"),
                ("gymnasium_sync/vector256",),
                "rate",
                ">=",
                0.85,
            ),
        ),
    ),
    Target(
        "CartPole's vector implementation, 4,096; the same as two vectors of 2,048 stepped at once",
        "at least 0.3 × local alone; 0.4",
        (
            Part("4,096 over local", _ours(*BATCHED), ("gymnasium_vector/vector4096",), "rate", ">=", 0.3),
            Part("two of 2,048 over local", _ours(*TWO), ("gymnasium_vector/vector4096",), "rate", ">=", 0.4),
        ),
    ),
    Target(
        "84×84×4 uint8, one env",
        "at least 2 × dm_env_rpc",
        (Part("over dm_env_rpc", _ours("image"), ("dm_env_rpc/image",), "rate", ">=", 2.0),),
    ),
    Target(
        "84×84×4 uint8, 32 a message",
        "at least 0.7 × the MB/s of a bare request-reply of that size",
        (Part("MB/s over the echo's", _ours("image32"), _ours("echo_image32"), "mb_per_s", ">=", 0.7),),
    ),
    Target(
        "env of 1 ms a step (sleeping), 16 a worker, 4 workers",
        "at least 0.9 × the same threads without the bus",
        (Part("over the threads", _ours(*SLEEP64), _ours("threads"), "rate", ">=", 0.9),),
    ),
    Target(
        "64 envs, 10 ms mean, lognormal σ = 1, recv 16",
        "at least 3 × lockstep",
        (Part("pool over lockstep", _ours("lognormal_pool"), _ours("lognormal_vector"), "rate", ">=", 3.0),),
    ),
    Target(
        "2,048 sessions at once: open, reset, one 1 s step (coroutine env, as in OpenEnv's protocol); one `Mesh`, and "
        "2,048 connections",
        "all succeed; at least 2 × OpenEnv's rate, p99 under half",
        (*_sessions("one Mesh", "sessions_one_mesh"), *_sessions("a Mesh each", "sessions_meshes")),
        scale=("sessions", 2048),
    ),
    Target(
        "two learners with equal sessions, one asking twice as fast as it can be served",
        "the other loses at most 10 %",
        (Part("kept of its rate alone", _ours("fair"), (), "kept", ">=", 0.9, how="itself"),),
    ),
    Target(
        "SB3 PPO, 100,000 steps, 8 CartPoles",
        "at most 1.25 × the wall time on DummyVecEnv",
        (Part("wall time over DummyVecEnv's", ("sb3/ppo_mesh",), ("sb3/ppo_dummy",), "taken_s", "<=", 1.25),),
        scale=("ppo_steps", 100_000),
    ),
)


def judge(part: Part, series: Series, reasons: Mapping[str, str]) -> Verdict:
    """What a run says of ``part``.

    Args:
        part: of a target.
        series: the run's figures.
        reasons: by turn, why it has no figures.
    """
    ours, theirs = _best(part.ours, part.quantity, series), _best(part.theirs, part.quantity, series)
    missing = [turns for turns, found in ((part.ours, ours), (part.theirs, theirs)) if turns and not found]
    if missing:
        reason = "; ".join(f"{turn}: {reasons.get(turn, 'not asked for')}" for turn in missing[0])
        return Verdict(part, "not measured", reason=reason)
    mine = series[ours][part.quantity]
    try:
        if part.how == "itself":
            figure = estimates.estimate(mine)
        else:
            combine = estimates.ratio if part.how == "ratio" else estimates.difference
            figure = combine(mine, series[theirs][part.quantity])
    except ValueError:
        return Verdict(part, "not measured", ours=ours, theirs=theirs, reason="no round has both sides")
    met = figure.value >= part.bound if part.sense == ">=" else figure.value <= part.bound
    close = figure.low < part.bound < figure.high
    return Verdict(part, "met" if met else "missed", close, figure, ours, theirs)


def judged(series: Series, reasons: Mapping[str, str]) -> list[tuple[Target, list[Verdict]]]:
    """Every target with the verdicts on its parts."""
    return [(target, [judge(part, series, reasons) for part in target.parts]) for target in TARGETS]


def as_json(judgements: Sequence[tuple[Target, list[Verdict]]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For the results' file; ``settings`` are the run's."""
    return [
        {
            "work": target.work,
            "target": target.target,
            "measured_at": target.measured_at(settings),
            "parts": [
                {
                    "what": verdict.part.what,
                    "sense": verdict.part.sense,
                    "bound": verdict.part.bound,
                    "unit": verdict.part.unit,
                    "status": verdict.status,
                    "close": verdict.close,
                    "estimate": verdict.estimate and verdict.estimate.as_dict(),
                    "ours": verdict.ours,
                    "theirs": verdict.theirs,
                    "reason": verdict.reason,
                }
                for verdict in verdicts
            ],
        }
        for target, verdicts in judgements
    ]


def _best(turns: Sequence[str], quantity: str, series: Series) -> str:
    """The turn with the best median, empty where none has any."""
    medians = {
        turn: estimates.median(series[turn][quantity])
        for turn in turns
        if estimates.present(series.get(turn, {}).get(quantity, ()))
    }
    if not medians:
        return ""
    choose = min if quantity in LESS else max
    return choose(medians, key=lambda turn: medians[turn])

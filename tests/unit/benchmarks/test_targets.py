"""The table of targets: its rows, its arithmetic and its verdicts."""

from itertools import pairwise

import pytest

from benchmarks import targets
from benchmarks.targets import TARGETS, Part, Series, judge
from benchmarks.works import GROUPS, LONG, known, plan

# ruff: noqa: RUF001  # as the table has it
ROWS = {
    "CartPole, one env, one client, p50": "at most OpenEnv's best case; at most echo + 60 µs",
    "CartPole, 16 clients, unbatched": "at least 1.5 × OpenEnv's best case, 4 × its usual one",
    "CartPole, 64 sub-environments in Python": "at least 3 × AsyncVectorEnv on the same machine",
    "CartPole, a pool of 256 in Python, one half stepping while the other is decided": (
        "at least 0.85 × local SyncVectorEnv"
    ),
    "CartPole's vector implementation, 4,096; the same as two vectors of 2,048 stepped at once": (
        "at least 0.3 × local alone; 0.4"
    ),
    "84×84×4 uint8, one env": "at least 2 × dm_env_rpc",
    "84×84×4 uint8, 32 a message": "at least 0.7 × the MB/s of a bare request-reply of that size",
    "env of 1 ms a step (sleeping), 16 a worker, 4 workers": "at least 0.9 × the same threads without the bus",
    "64 envs, 10 ms mean, lognormal σ = 1, recv 16": "at least 3 × lockstep",
    "2,048 sessions at once: open, reset, one 1 s step (coroutine env, as in OpenEnv's protocol); one `Mesh`, and "
    "2,048 connections": "all succeed; at least 2 × OpenEnv's rate, p99 under half",
    "two learners with equal sessions, one asking twice as fast as it can be served": "the other loses at most 10 %",
    "SB3 PPO, 100,000 steps, 8 CartPoles": "at most 1.25 × the wall time on DummyVecEnv",
}
BOUNDS = [
    ("<=", 1.0), ("<=", 60.0), (">=", 1.5), (">=", 4.0), (">=", 3.0), (">=", 0.85), (">=", 0.3), (">=", 0.4),
    (">=", 2.0), (">=", 0.7), (">=", 0.9), (">=", 3.0), (">=", 1.0), (">=", 2.0), ("<=", 0.5), (">=", 1.0),
    (">=", 2.0), ("<=", 0.5), (">=", 0.9), ("<=", 1.25),
]  # fmt: skip
FASTER = Part("faster", ("meshrl/a", "meshrl/b"), ("peer/a",), "rate", ">=", 2.0)
LATENCY = Part("quicker", ("meshrl/a", "meshrl/b"), ("peer/a",), "p50_us", "<=", 1.0)
OVER = Part("over", ("meshrl/a",), ("peer/a",), "p50_us", "<=", 60.0, "difference", "µs")
KEPT = Part("kept", ("meshrl/a",), (), "kept", ">=", 0.9, "itself")


def series(quantity: str, **values: list[float | None]) -> Series:
    names = {"ours_a": "meshrl/a", "ours_b": "meshrl/b", "theirs": "peer/a"}
    return {names[name]: {quantity: of_it} for name, of_it in values.items()}


def test_every_row_of_the_table_is_there_in_its_words() -> None:
    assert {target.work: target.target for target in TARGETS} == ROWS


def test_every_bound_of_the_table_is_judged() -> None:
    assert [(part.sense, part.bound) for target in TARGETS for part in target.parts] == BOUNDS


def test_every_turn_that_a_target_needs_is_measured() -> None:
    measured = {turn.key for of_it in (*GROUPS.values(), *LONG.values()) for turn in of_it}
    needed = {turn for target in TARGETS for part in target.parts for turn in (*part.ours, *part.theirs)}
    assert needed <= measured


@pytest.mark.parametrize(("ours", "status"), [(21.0, "met"), (20.0, "met"), (19.0, "missed")])
def test_at_least_is_met_from_the_bound_on(ours: float, status: str) -> None:
    assert judge(FASTER, series("rate", ours_a=[ours] * 3, theirs=[10.0] * 3), {}).status == status


@pytest.mark.parametrize(("ours", "status"), [(9.0, "met"), (10.0, "met"), (11.0, "missed")])
def test_at_most_is_met_up_to_the_bound(ours: float, status: str) -> None:
    assert judge(LATENCY, series("p50_us", ours_a=[ours] * 3, theirs=[10.0] * 3), {}).status == status


def test_a_difference_is_judged_in_its_unit() -> None:
    verdict = judge(OVER, series("p50_us", ours_a=[150.0, 170.0, 160.0], theirs=[100.0, 100.0, 100.0]), {})
    assert verdict.estimate is not None
    assert (verdict.status, verdict.estimate.value) == ("met", 60.0)


def test_a_figure_that_stands_alone_is_judged_by_itself() -> None:
    assert judge(KEPT, series("kept", ours_a=[0.95, 0.93, 0.97]), {}).status == "met"


def test_the_better_of_our_ways_is_taken_and_named() -> None:
    verdict = judge(FASTER, series("rate", ours_a=[10.0] * 3, ours_b=[30.0] * 3, theirs=[10.0] * 3), {})
    assert (verdict.ours, verdict.status) == ("meshrl/b", "met")


def test_of_latencies_the_lower_is_the_better() -> None:
    verdict = judge(LATENCY, series("p50_us", ours_a=[10.0] * 3, ours_b=[30.0] * 3, theirs=[10.0] * 3), {})
    assert verdict.ours == "meshrl/a"


def test_an_interval_that_holds_the_bound_is_said() -> None:
    wide = judge(FASTER, series("rate", ours_a=[10.0, 21.0, 50.0], theirs=[10.0] * 3), {})
    narrow = judge(FASTER, series("rate", ours_a=[21.0] * 3, theirs=[10.0] * 3), {})
    assert (wide.status, wide.close, narrow.close) == ("met", True, False)


def test_what_cannot_be_measured_says_why() -> None:
    verdict = judge(FASTER, series("rate", ours_a=[1.0]), {"peer/a": "it is not installable here"})
    assert (verdict.status, verdict.reason) == ("not measured", "peer/a: it is not installable here")


def test_sides_that_were_never_measured_in_one_round_are_not_compared() -> None:
    verdict = judge(FASTER, series("rate", ours_a=[1.0, None], theirs=[None, 1.0]), {})
    assert verdict.status == "not measured"


def test_a_run_without_figures_judges_every_row() -> None:
    assert {verdict.status for _, verdicts in targets.judged({}, {}) for verdict in verdicts} == {"not measured"}


def test_each_round_has_every_turn_once_and_compared_ones_together() -> None:
    for turns in plan(5, [], GROUPS):
        assert sorted(turn.key for turn in turns) == sorted(turn.key for of_it in GROUPS.values() for turn in of_it)
        groups = [next(group for group, of_it in GROUPS.items() if turn in of_it) for turn in turns]
        assert sum(a != b for a, b in pairwise(groups)) == len(GROUPS) - 1


def test_rounds_differ_in_their_order() -> None:
    orders = {tuple(turn.key for turn in turns) for turns in plan(5, [], GROUPS)}
    assert len(orders) == 5


def test_a_choice_of_works_and_systems_is_measured_alone() -> None:
    chosen = {turn.key for turn in plan(1, ["openenv"], GROUPS)[0]}
    assert chosen == {"openenv/single", "openenv/clients16", "openenv/image", "openenv/vector64"}
    assert {"openenv", "single", "vector64", "meshrl/echo", "sb3"} <= known()

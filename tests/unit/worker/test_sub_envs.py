"""Sub-environments one by one, without a worker: autoreset, seeds, and who it was that raised (R6, R7)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meshrl.errors import InvalidSeed, ResetNeeded
from meshrl.protocol.seeds import derive
from meshrl.wire.messages import AutoresetName, Open, Seeding
from meshrl.worker.attributes import is_wrapped
from meshrl.worker.outcomes import Outcome, Outcomes, flags_of, rewards_of
from meshrl.worker.sub_envs import Crashed, SubEnvs

ENDS, CUT, RAISES, EXITS, SHORT = 1, 2, 3, 4, 5


class Script(gymnasium.Env[Any, Any]):
    """Its action says what happens; the observation is the number of its step, the info the same dict each time."""

    observation_space = spaces.Discrete(1000)
    action_space = spaces.Discrete(10)

    def __init__(self, empty: bool = False) -> None:
        self.empty = empty
        self.n = 0
        self.seeds: list[int | None] = []
        self.options: list[Any] = []
        self.fails = False
        self.info: dict[str, Any] = {"n": 0, "array": np.zeros(1, np.int64), "deep": {"n": 0}}

    def _told(self) -> dict[str, Any]:
        if self.empty:
            return {}
        self.info["n"] = self.info["deep"]["n"] = self.n
        self.info["array"][:] = self.n
        return self.info

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        if self.fails:
            raise OSError("no map")
        self.seeds.append(seed)
        self.options.append(options)
        self.n = 100 * len(self.seeds)
        return self.n, self._told()

    def step(self, action: int) -> Any:
        if action == RAISES:
            raise RuntimeError("diverged")
        if action == EXITS:
            raise SystemExit(3)
        self.n += 1
        result = self.n, float(action), action == ENDS, action == CUT, self._told()
        return result[:4] if action == SHORT else result


class Async(Script):
    async def reset(self, **kwargs: Any) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return Script.reset(self, **kwargs)

    async def step(self, action: int) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return Script.step(self, action)


Step = Callable[[SubEnvs, Sequence[int], Sequence[Any]], Outcomes]


def together(subs: SubEnvs, ids: Sequence[int], actions: Sequence[Any]) -> Outcomes:
    return subs.step_all(ids, actions)


def one_by_one(subs: SubEnvs, ids: Sequence[int], actions: Sequence[Any]) -> Outcomes:
    return Outcomes.of(subs.step_one(i, action) for i, action in zip(ids, actions, strict=True))


def awaited(subs: SubEnvs, ids: Sequence[int], actions: Sequence[Any]) -> Outcomes:
    async def all_of_them() -> list[Outcome]:
        return [await subs.step_one_async(i, action) for i, action in zip(ids, actions, strict=True)]

    return Outcomes.of(asyncio.run(all_of_them()))


WAYS = pytest.mark.parametrize("step", [together, one_by_one, awaited])


def made(
    step: Step = together,
    mode: AutoresetName = "NextStep",
    count: int = 3,
    *,
    pool: bool = False,
    seeding: Seeding = "gymnasium",
    first: int = 0,
    empty: bool = False,
    reset: bool = True,
) -> tuple[SubEnvs, list[Script]]:
    envs = [(Async if step is awaited else Script)(empty) for _ in range(count)]
    open_ = Open(
        session="s",
        name="env",
        form="pool" if pool else "vector",
        num_envs=count,
        first_env_id=first,
        seeding=seeding,
        autoreset_mode="NextStep" if pool else mode,
    )
    subs = SubEnvs(envs, open_)
    for i in range(count) if reset else ():
        reset_one(step, subs, i, None if seeding == "gymnasium" else 5)
    return subs, envs


def reset_one(step: Step, subs: SubEnvs, i: int, seed: int | None, options: Any = None) -> Outcome:
    if step is awaited:
        return asyncio.run(subs.reset_one_async(i, seed, options))
    return subs.reset_one(i, seed, options)


# --------------------------------------------------------------------------- autoreset


@WAYS
def test_in_next_step_an_ended_env_is_reset_by_the_step_after(step: Step) -> None:
    subs, envs = made(step)
    out = step(subs, [0, 1, 2], [ENDS, 0, CUT])
    assert (out.obs, out.rewards) == ([101, 101, 101], [1.0, 0.0, 2.0])
    assert (out.terminated, out.truncated) == ([True, False, False], [False, False, True])
    assert subs.ended == [True, False, True]
    assert [len(env.seeds) for env in envs] == [1, 1, 1], "untouched until then"
    out = step(subs, [0, 1, 2], [7, 7, 7])
    assert (out.obs, out.rewards) == ([200, 102, 200], [0.0, 7.0, 0.0])
    assert (out.terminated, out.truncated) == ([False] * 3, [False] * 3)
    assert subs.ended == [False] * 3


@WAYS
@pytest.mark.parametrize("pool", [False, True])
def test_in_same_step_and_in_pools_it_is_reset_at_once_and_both_are_shown(step: Step, pool: bool) -> None:
    subs, _ = made(step, "SameStep", pool=pool)
    out = step(subs, [2, 0], [ENDS, 0])
    assert (out.obs, out.terminated) == ([200, 101], [True, False])
    assert [(k, sorted(info)) for k, info in out.infos] == [
        (0, ["final_info", "final_obs"]),
        (0, ["array", "deep", "n"]),
        (1, ["array", "deep", "n"]),
    ]
    assert subs.ended == [False] * 3


@WAYS
def test_the_final_info_is_that_of_the_end_whatever_the_reset_does_to_the_dict(step: Step) -> None:
    subs, _ = made(step, "SameStep")
    (_, final), (_, reset) = step(subs, [1], [ENDS]).infos
    assert (final["final_obs"], reset["n"]) == (101, 200)
    assert final["final_info"]["n"] == final["final_info"]["deep"]["n"] == 101
    assert final["final_info"]["array"].tolist() == [101]


@WAYS
def test_disabled_leaves_an_ended_env_alone_and_refuses_its_next_step(step: Step) -> None:
    subs, _ = made(step, "Disabled", first=10)
    step(subs, [0, 1, 2], [ENDS, 0, CUT])
    subs.check_step([1])
    with pytest.raises(ResetNeeded, match="10, 12") as caught:
        subs.check_step([0, 1, 2])
    assert caught.value.details["env_ids"] == [10, 12]
    reset_one(step, subs, 0, None)
    with pytest.raises(ResetNeeded, match="environments 12 "):
        subs.check_step([0, 2])
    subs.check_step([0])


@WAYS
def test_empty_infos_are_left_out(step: Step) -> None:
    subs, _ = made(step, "SameStep", empty=True)
    assert step(subs, [0, 1], [0, 0]).infos == []
    assert step(subs, [0, 1], [0, ENDS]).infos == [(1, {"final_obs": 102, "final_info": {}})]


# --------------------------------------------------------------------------- checks and seeds


def test_a_step_before_the_first_reset_names_who_needs_one() -> None:
    subs, _ = made(first=4, reset=False)
    subs.reset_one(1, None, None)
    with pytest.raises(ResetNeeded, match="4, 6") as caught:
        subs.check_step(range(3))
    assert caught.value.details["env_ids"] == [4, 6]
    subs.check_step([1])
    with pytest.raises(ResetNeeded) as caught:
        subs.check_all_reset([0])
    assert caught.value.details["env_ids"] == [6]
    subs.check_all_reset([0, 2])


def test_an_error_of_many_names_some() -> None:
    subs, _ = made(count=20, reset=False)
    with pytest.raises(ResetNeeded, match="0, 1, 2, 3, 4, 5, 6, 7 and 12 more"):
        subs.check_step(range(20))


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True, [1]])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    subs, _ = made()
    with pytest.raises(InvalidSeed):
        subs.check_seed(seed)
    with pytest.raises(InvalidSeed):
        subs.check_seeds([1, seed, None])
    for wrong in ([1, 2], 3, "abc"):
        with pytest.raises(InvalidSeed):
            subs.check_seeds(wrong)
    assert list(subs.check_seeds(None)) == [None] * 3
    assert subs.check_seed(None) is None


@WAYS
def test_a_first_reset_without_a_seed_draws_one_and_later_ones_go_on(step: Step) -> None:
    subs, envs = made(step, "SameStep")
    assert all(type(env.seeds[0]) is int and env.seeds[0] < 2**31 for env in envs)
    step(subs, [0, 1], [ENDS, 0])
    reset_one(step, subs, 1, None, {"a": 1})
    reset_one(step, subs, 2, 77)
    assert [env.seeds[1:] for env in envs] == [[None], [None], [77]]
    assert envs[1].options == [None, {"a": 1}]


@WAYS
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_derived_seeds_are_of_the_root_the_global_env_id_and_the_episode(step: Step, mode: AutoresetName) -> None:
    subs, envs = made(step, mode, seeding="derived", first=10)
    step(subs, [0, 1, 2], [ENDS, 0, 0])
    step(subs, [0, 1, 2], [0, 0, 0])
    reset_one(step, subs, 2, None)
    assert [env.seeds for env in envs] == [
        [derive(5, 10, 0), derive(5, 10, 1)],
        [derive(5, 11, 0)],
        [derive(5, 12, 0), derive(5, 12, 1)],
    ]
    reset_one(step, subs, 0, 6)
    assert envs[0].seeds[-1] == derive(6, 10, 0)


# --------------------------------------------------------------------------- who raised


@WAYS
@pytest.mark.parametrize(("action", "error"), [(RAISES, RuntimeError), (EXITS, SystemExit)])
def test_a_step_that_raises_is_known_by_its_global_index(step: Step, action: int, error: type) -> None:
    subs, _ = made(step, first=10)
    with pytest.raises(Crashed) as caught:
        step(subs, [2, 0, 1], [0, action, action])
    assert caught.value.env_id == 10
    assert isinstance(caught.value.__cause__, error)


def test_a_result_of_another_length_is_known_by_its_global_index() -> None:
    subs, _ = made(first=10)
    with pytest.raises(Crashed) as caught:
        subs.step_all([2, 0, 1], [0, SHORT, 0])
    assert (caught.value.env_id, type(caught.value.__cause__)) == (10, ValueError)


@WAYS
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_an_autoreset_that_raises_is_known_by_its_global_index(step: Step, mode: AutoresetName) -> None:
    subs, envs = made(step, mode, first=10)
    envs[1].fails = True
    if mode == "NextStep":
        step(subs, [0, 1], [0, ENDS])
    with pytest.raises(Crashed) as caught:
        step(subs, [0, 1], [0, ENDS])
    assert (caught.value.env_id, type(caught.value.__cause__)) == (11, OSError)
    with pytest.raises(Crashed) as caught:
        reset_one(step, subs, 1, 3)
    assert caught.value.env_id == 11


# --------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "values", [[1, 2.5, True], [np.float32(1.5), 2], [float("nan"), -0.0], [np.array(3.0), 1.0], [10**20, 1]]
)
def test_rewards_are_cast_as_assignment_casts_them(values: list[Any]) -> None:
    expected = np.zeros(len(values))
    for k, value in enumerate(values):
        expected[k] = value
    column = rewards_of(values)
    assert column.dtype == np.float64
    assert column.tobytes() == expected.tobytes()


def test_rewards_of_one_element_each_are_taken_and_texts_are_not() -> None:
    assert rewards_of([1.0, 2.0]).flags.writeable
    with pytest.raises((TypeError, ValueError)):
        rewards_of([1.0, "much"])
    with pytest.raises((TypeError, ValueError)):
        rewards_of([None, {}])


@pytest.mark.parametrize("values", [[True, False], [np.True_, 0], [1, 0.0], [np.array(True), False]])
def test_flags_are_cast_as_assignment_casts_them(values: list[Any]) -> None:
    column = flags_of(values)
    assert column.dtype == np.bool_
    assert column.tolist() == [True, False]


def test_wrappers_are_found_by_their_class_and_their_bases() -> None:
    env = gymnasium.wrappers.TimeLimit(gymnasium.wrappers.OrderEnforcing(Script()), 5)
    assert is_wrapped(env, "gymnasium.wrappers.common:TimeLimit")
    assert is_wrapped(env, "gymnasium.wrappers.common:OrderEnforcing")
    assert is_wrapped(env, "gymnasium.core:Wrapper")
    assert not is_wrapped(env, "gymnasium.wrappers.common:Autoreset")
    assert not is_wrapped(Script(), "gymnasium.core:Wrapper")

"""The model notices what it is there for: a transition that is lost, repeated or another's, by name."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from tests.chaos.model import Autoreset, Broken, Expected, Mismatch, Twin, batched

Step = tuple[Any, Any, bool, bool, dict[str, Any]]
ACTIONS = (0, 1, 1, 0, 1, 0, 0)


def make() -> Any:
    return gymnasium.make("CartPole-v1")


def single(among: list[Twin] | None = None) -> Expected:
    return Expected(make, 1, Autoreset.NONE, [] if among is None else among)


class Remote:
    """Stands for a remote env; what is done wrong is done here."""

    def __init__(self, seed: int = 3) -> None:
        self.env = make()
        self.reset: tuple[Any, dict[str, Any]] = self.env.reset(seed=seed)
        self.told: list[Step] = []

    def step(self, action: int) -> Step:
        told: Step = self.env.step(action)
        self.told.append(told)
        return told


def played(expected: Expected, remote: Remote, actions: tuple[int, ...] = ACTIONS) -> None:
    """All is well so far."""
    expected.twins[0].reset(3)
    expected.check_reset(remote.reset)
    for action in actions:
        expected.twins[0].step(action)
        expected.check_step(remote.step(action))


def noticed(expected: Expected, came: Step, action: int) -> Broken:
    expected.twins[0].step(action)
    with pytest.raises(Mismatch) as caught:
        expected.check_step(came)
    assert str(caught.value).startswith(caught.value.broken.value)
    return caught.value.broken


def test_what_is_due_passes_to_the_end_of_an_episode_and_beyond() -> None:
    expected, remote = single(), Remote()
    played(expected, remote, (1,) * 8)
    for _ in range(2):
        while not expected.twins[0].ended:
            expected.twins[0].step(1)
            expected.check_step(remote.step(1))
        expected.twins[0].reset()
        expected.check_reset(remote.env.reset())
    assert expected.episodes == 2


def test_an_answer_that_is_told_again_is_repeated() -> None:
    expected, remote = single(), Remote()
    played(expected, remote)
    assert noticed(expected, remote.told[-1], 1) is Broken.REPEATED


def test_an_action_that_is_executed_twice_is_repeated() -> None:
    expected, remote = single(), Remote()
    played(expected, remote)
    remote.step(1)
    assert noticed(expected, remote.step(1), 1) is Broken.REPEATED


def test_an_action_that_was_executed_twice_before_is_found_as_well() -> None:
    expected, remote = single(), Remote()
    played(expected, remote)
    remote.step(ACTIONS[-1])  # nobody saw it
    assert noticed(expected, remote.step(1), 1) is Broken.REPEATED


def test_an_action_that_was_never_executed_is_lost() -> None:
    expected, remote = single(), Remote()
    played(expected, remote)
    expected.twins[0].step(0)  # its answer was made up, say
    assert noticed(expected, remote.step(1), 1) is Broken.LOST


def test_an_episode_that_is_cut_short_is_lost() -> None:
    expected, remote = single(), Remote()
    played(expected, remote)
    obs = remote.told[-1][0]
    assert noticed(expected, (obs, 0.0, False, True, {"session_lost": {"reason": "worker_lost"}}), 1) is Broken.LOST


def test_the_transition_of_another_learner_is_misattributed() -> None:
    among: list[Twin] = []
    expected, other, remote = single(among), single(among), Remote()
    played(expected, remote)
    other.twins[0].reset(99)
    assert noticed(expected, (*other.twins[0].step(1)[:4], {}), 1) is Broken.MISATTRIBUTED


@pytest.mark.parametrize("at", range(5))
def test_any_value_that_is_another_by_one_bit_or_its_type_is_noticed(at: int) -> None:
    expected, remote = single(), Remote()
    played(expected, remote)
    told = list(remote.step(1))
    told[at] = [np.nextafter(told[0], np.float32(9)), 1, 0, np.False_, {"a": 1}][at]
    assert noticed(expected, tuple(told), 1) is Broken.OTHER


def test_a_first_observation_of_another_seed_is_noticed() -> None:
    expected = single()
    expected.twins[0].reset(3)
    with pytest.raises(Mismatch):
        expected.check_reset(Remote(4).reset)


# --------------------------------------------------------------------------- batches


def vector(autoreset: Autoreset) -> Expected:
    expected = Expected(lambda: gymnasium.make("FrozenLake-v1"), 3, autoreset, [])
    for i, twin in enumerate(expected.twins):
        twin.reset(7 + i)
    return expected


@pytest.mark.parametrize("autoreset", [Autoreset.NEXT_STEP, Autoreset.SAME_STEP])
def test_rows_are_put_together_as_gymnasiums_vectors_do(autoreset: Autoreset) -> None:
    mode = gymnasium.vector.AutoresetMode[autoreset.name]
    local = gymnasium.make_vec("FrozenLake-v1", 3, "sync", vector_kwargs={"autoreset_mode": mode})
    expected = vector(autoreset)
    obs, infos = local.reset(seed=7)
    none = np.zeros(3, np.bool_)
    expected.check_batch((obs, np.zeros(3), none, none, infos), range(3))
    rng = np.random.default_rng(1)
    for _ in range(200):
        actions = rng.integers(4, size=3)
        for twin, action in zip(expected.twins, actions, strict=True):
            twin.step(action)
        expected.check_batch(local.step(actions), range(3))
    assert expected.episodes > 10
    local.close()


def batch() -> tuple[Expected, list[Any]]:
    """The next of three CartPoles, as it is due."""
    expected = Expected(make, 3, Autoreset.SAME_STEP, [])
    for i, twin in enumerate(expected.twins):
        twin.reset(7 + i)
        twin.step(1)
        twin.step(0)
    return expected, list(batched(expected.twins[0].env.observation_space, [twin.told for twin in expected.twins]))


def test_rows_that_are_swapped_are_misattributed() -> None:
    expected, came = batch()
    came[0] = came[0][[1, 0, 2]]
    with pytest.raises(Mismatch) as caught:
        expected.check_batch(came, range(3))
    assert caught.value.broken is Broken.MISATTRIBUTED


def test_a_row_that_is_told_again_is_repeated() -> None:
    expected, came = batch()
    for twin in expected.twins:
        twin.step(1)
    due = batched(expected.twins[0].env.observation_space, [twin.told for twin in expected.twins])
    due[0][2] = came[0][2]
    with pytest.raises(Mismatch, match="env_id 2") as caught:
        expected.check_batch(due, range(3))
    assert caught.value.broken is Broken.REPEATED


def test_an_info_of_another_row_is_noticed() -> None:
    expected = vector(Autoreset.SAME_STEP)
    for twin in expected.twins:
        twin.step(1)
    came = batched(expected.twins[0].env.observation_space, [twin.told for twin in expected.twins])
    came[4]["_prob"][1] = False
    with pytest.raises(Mismatch, match="_prob"):
        expected.check_batch(came, range(3))


def test_a_lane_whose_episode_was_cut_short_is_lost() -> None:
    expected, came = batch()
    came[4] = {"session_lost": {"reason": np.array(["worker_lost"])}}
    with pytest.raises(Mismatch) as caught:
        expected.check_batch(came, range(3))
    assert caught.value.broken is Broken.LOST

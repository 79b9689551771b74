from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshrl.wire.messages import SessionState
from meshrl.worker.episode import Episode


def told(episode: Episode) -> SessionState:
    return SessionState.model_validate(episode.state(session="s1", worker="w1", name="counter"))


def test_an_episode_counts_its_steps_and_a_session_all_of_them() -> None:
    episode = Episode()
    assert (told(episode).phase, told(episode).episode) == ("new", 0)
    for steps in (2, 3):
        episode.began()
        for _ in range(steps):
            episode.stepped()
            episode.rewarded(0.5)
        episode.ended()
    state = told(episode)
    assert (state.phase, state.episode, state.steps, state.total_steps) == ("ended", 2, 3, 5)
    assert state.episode_return == 1.5


@pytest.mark.parametrize("reward", [1, True, np.float32(1), np.int64(1), np.array(1.0)])
def test_whatever_float_takes_is_summed(reward: Any) -> None:
    episode = Episode()
    episode.began()
    episode.rewarded(reward)
    episode.rewarded(1)
    assert told(episode).episode_return == 2.0
    assert type(told(episode).episode_return) is float


class _Refuses:
    def __float__(self) -> float:
        raise RuntimeError("never")


@pytest.mark.parametrize("reward", [None, "much", 10**400, np.ones(1), np.ones(2), [1.0], {}, 1j, _Refuses()])
def test_anything_else_leaves_no_return_until_the_next_episode(reward: Any) -> None:
    episode = Episode()
    episode.began()
    episode.rewarded(reward)
    episode.rewarded(1.0)
    assert told(episode).episode_return is None
    episode.began()
    assert told(episode).episode_return == 0.0

"""A server that is away for too long: what synchronous code is told, and how it gets what was under way."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

import meshrl
from meshrl.bus.embedded import EmbeddedServer
from meshrl.errors import MeshUnreachable, StepUnsettled
from tests.mesh.being_away import away, mesh_of, patiently

__all__ = ["away"]


def test_step_of_an_env_is_settled(away: EmbeddedServer) -> None:
    local = gymnasium.make("CartPole-v1")
    with meshrl.make("CartPole-v1", mesh=mesh_of(away)) as env:
        assert np.array_equal(env.reset(seed=3)[0], local.reset(seed=3)[0])
        away.kill()
        with pytest.raises(MeshUnreachable):
            env.step(1)
        with pytest.raises(StepUnsettled):
            env.step(1)
        away.restart()
        for ours, theirs in ((patiently(env.settle), local.step(1)), (env.step(0), local.step(0))):
            assert np.array_equal(ours[0], theirs[0])
            assert ours[1:] == theirs[1:]


def test_first_reset_of_a_vector_is_settled_and_the_next_goes_on_with_its_generators(away: EmbeddedServer) -> None:
    local = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
    with meshrl.make_vec("CartPole-v1", 2, mesh=mesh_of(away)) as envs:
        away.kill()
        with pytest.raises(MeshUnreachable):
            envs.reset(seed=3)
        away.restart()
        observations, infos = patiently(envs.settle)
        assert np.array_equal(observations, local.reset(seed=3)[0])
        assert infos == {}
        assert envs.np_random_seed == 3
        assert np.array_equal(envs.reset()[0], local.reset()[0])


def test_reset_that_waits_for_an_unsettled_step_leaves_that_to_be_settled(away: EmbeddedServer) -> None:
    local = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
    with meshrl.make_vec("CartPole-v1", 2, mesh=mesh_of(away)) as envs:
        envs.reset(seed=3)
        local.reset(seed=3)
        away.kill()
        for call in (lambda: envs.step(np.array([0, 1])), envs.reset):
            with pytest.raises(MeshUnreachable):
                call()
        away.restart()
        ours, theirs = patiently(envs.settle), local.step(np.array([0, 1]))
        for one, other in zip(ours[:4], theirs[:4], strict=True):
            assert np.array_equal(one, other)
        assert np.array_equal(envs.reset(seed=4)[0], local.reset(seed=4)[0])

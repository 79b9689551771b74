"""What ends, breaks, is refused, interrupted, pickled, forked or left open."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from meshrl import errors
from meshrl.adapters.sb3 import MeshVecEnv
from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.being_away import away, mesh_of, patiently
from tests.mesh.envs import Nested
from tests.mesh.test_vector_parity import different

__all__ = ["away"]

ZEROS = np.zeros(2, np.int64)


class Gate:
    """Two named pipes: the env says when it is inside its step, the test when it may go on."""

    def __init__(self, directory: Path) -> None:
        self.options = {name: str(directory / name) for name in ("entered", "gate")}
        for pipe in self.options.values():
            os.mkfifo(pipe)

    def entered(self) -> None:
        Path(self.options["entered"]).read_text()

    def open(self) -> None:
        with Path(self.options["gate"]).open("w"):
            pass


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def gated(mesh: dict[str, Any], gate: Gate) -> VecEnv:
    """Two of which the first waits at the gate when its action is 1."""
    venv: VecEnv = MeshVecEnv("Gated", 2, mesh=mesh)
    venv.set_options([gate.options, {}])
    venv.reset()
    return venv


def interrupt(call: Callable[[], Any], gate: Gate) -> None:
    """A call that Ctrl-C interrupts while the env waits at the gate."""
    main = threading.get_ident()

    def strike() -> None:
        gate.entered()
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=strike)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        call()
    thread.join()


# ---------------------------------------------------------------- refused


def test_a_name_that_nobody_serves_is_answered_with_those_like_it(mesh: dict[str, Any]) -> None:
    with pytest.raises(errors.UnknownName, match="CartPole-v1") as caught:
        MeshVecEnv("CartPool-v1", 2, mesh=mesh)
    assert "CartPole-v1" in caught.value.details["near"]


def test_short_names_are_found(mesh: dict[str, Any]) -> None:
    venv: VecEnv = MeshVecEnv("cartpole", 2, mesh=mesh)
    assert venv.reset().shape == (2, 4)
    venv.close()


def test_a_constructor_that_raises_tells_its_traceback(mesh: dict[str, Any]) -> None:
    with pytest.raises(errors.EnvError, match="no simulator here") as caught:
        MeshVecEnv("Breaks", 2, mesh=mesh, env_kwargs={"at": "constructor"})
    assert "RuntimeError: no simulator here" in str(caught.value.remote_traceback)


@pytest.mark.parametrize(("at", "says"), [("reset", "the map is missing"), ("step", "the simulator diverged")])
def test_an_env_that_raises_tells_its_traceback(mesh: dict[str, Any], at: str, says: str) -> None:
    venv: VecEnv = MeshVecEnv("Breaks", 2, mesh=mesh, env_kwargs={"at": at})
    if at == "step":
        venv.reset()
    with pytest.raises(errors.EnvError, match=says) as caught:
        venv.reset() if at == "reset" else venv.step(ZEROS)
    assert f"RuntimeError: {says}" in str(caught.value.remote_traceback)
    with pytest.raises(errors.SessionLost):
        venv.reset()
    venv.close()


def test_kwargs_that_the_operator_does_not_allow_are_refused(guarded: dict[str, Any]) -> None:
    with pytest.raises(errors.KwargsNotAllowed):
        MeshVecEnv("CartPole-v1", 2, mesh=guarded, env_kwargs={"sutton_barto_reward": True})


def test_kwargs_reach_the_constructor(mesh: dict[str, Any]) -> None:
    venv: VecEnv = MeshVecEnv("CartPole-v1", 2, mesh=mesh, env_kwargs={"sutton_barto_reward": True})
    venv.reset()
    assert venv.step(ZEROS)[1].tolist() == [0.0, 0.0]
    venv.close()


def test_what_sb3_cannot_take_is_refused_and_frees_its_slots(guarded: dict[str, Any]) -> None:
    for _ in range(2):  # of two slots
        with pytest.raises(NotImplementedError) as here:
            MeshVecEnv("Nested", 2, mesh=guarded)
        with pytest.raises(errors.UnsupportedSpace, match="Text"):
            MeshVecEnv("Coroutine", 2, mesh=guarded)
    with pytest.raises(NotImplementedError) as local:
        DummyVecEnv([Nested])
    assert str(here.value) == str(local.value)
    venv: VecEnv = MeshVecEnv("CartPole-v1", 2, mesh=guarded)
    venv.close()


def test_vector_implementations_are_refused(hosted: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError, match=r"CartPole-v1.*one by one.*meshrl serve --vectors meshrl") as refused:
        MeshVecEnv("CartPole-v1", 2, mesh=hosted)
    assert "pass " not in refused.value.message, "it has no such arguments"


@pytest.mark.parametrize(
    "actions",
    [
        np.array([0, 2]),
        np.array([0, -1]),
        np.array([0]),
        np.zeros((2, 1), np.int64),
        np.array([0.5, 1.0]),
        [0, [1]],
        None,
    ],
    ids=repr,
)
def test_a_wrong_action_is_refused_before_anything_is_sent(mesh: dict[str, Any], actions: Any) -> None:
    venv: VecEnv = MeshVecEnv("CartPole-v1", 2, mesh=mesh)
    venv.seed(1)
    venv.reset()
    with pytest.raises(errors.InvalidAction) as caught:
        venv.step(actions)
    if isinstance(actions, np.ndarray) and actions.shape == (2,) and actions.dtype.kind == "i":
        assert caught.value.details["env_id"] == 1
    again: VecEnv = MeshVecEnv("CartPole-v1", 2, mesh=mesh)
    again.seed(1)
    again.reset()
    assert not different(venv.step(ZEROS), again.step(ZEROS), "nothing was stepped")
    for one in (venv, again):
        one.close()


def test_calls_out_of_turn_have_errors_of_their_own(mesh: dict[str, Any]) -> None:
    venv: VecEnv = MeshVecEnv("Counter", 2, mesh=mesh)
    with pytest.raises(errors.ResetNeeded):
        venv.step(ZEROS)
    with pytest.raises(errors.NothingUnderWay):
        venv.step_wait()
    with pytest.raises(errors.NothingUnsettled):
        venv.settle()
    venv.reset()
    venv.step_async(ZEROS)
    for call in (lambda: venv.step_async(ZEROS), lambda: venv.get_attr("limit"), lambda: venv.env_method("doubled", 1)):
        with pytest.raises(errors.ConcurrentStep):
            call()
    assert venv.step_wait()[0].tolist() == [1, 1]
    venv.step_async(ZEROS)
    assert venv.reset().tolist() == [0, 0]  # drops what is under way
    assert venv.step(ZEROS)[0].tolist() == [1, 1]
    venv.seed(-5)
    with pytest.raises(errors.InvalidSeed):
        venv.reset()
    venv.close()
    venv.close()
    with pytest.raises(errors.SessionClosed):
        venv.reset()
    with pytest.raises(errors.SessionClosed):
        venv.get_attr("limit")


# ---------------------------------------------------------------- interrupted


def test_after_ctrl_c_a_step_is_settled_and_counted_once(mesh: dict[str, Any], gate: Gate) -> None:
    venv = gated(mesh, gate)
    venv.step(ZEROS)
    interrupt(lambda: venv.step(np.array([1, 0])), gate)
    with pytest.raises(errors.StepUnsettled):
        venv.step(ZEROS)
    gate.open()
    observations, rewards, dones, infos = venv.settle()
    assert observations.tolist() == [2, 2]
    assert (rewards.dtype, dones.tolist()) == (np.float32, [False, False])
    assert infos == [{"TimeLimit.truncated": False}] * 2
    assert venv.step(ZEROS)[0].tolist() == [3, 3]
    venv.close()


def test_step_that_found_the_server_away_is_settled_as_sb3_has_it(away: EmbeddedServer) -> None:
    local = DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
    venv = MeshVecEnv("CartPole-v1", 2, mesh=mesh_of(away))
    for envs in (venv, local):
        envs.seed(3)
        envs.reset()
    away.kill()
    with pytest.raises(errors.MeshUnreachable):
        venv.step(ZEROS)
    away.restart()
    assert not different(patiently(venv.settle), local.step(ZEROS))
    assert not different(venv.step(ZEROS), local.step(ZEROS))
    venv.close()


def test_after_ctrl_c_reset_drops_the_step(mesh: dict[str, Any], gate: Gate) -> None:
    venv = gated(mesh, gate)
    interrupt(lambda: venv.step(np.array([1, 0])), gate)
    gate.open()
    assert venv.reset().tolist() == [0, 0]
    assert venv.step(ZEROS)[0].tolist() == [1, 1]
    venv.close()


def test_after_ctrl_c_a_reset_is_settled_with_its_seeds_used_once(mesh: dict[str, Any], gate: Gate) -> None:
    venv: VecEnv = MeshVecEnv("GatedReset", 1, mesh=mesh)
    venv.seed(5)
    venv.set_options(gate.options)
    interrupt(venv.reset, gate)
    gate.open()
    assert venv.settle().tolist() == [1]
    assert venv.reset_infos == [{"seed": 5, "waited": True}]
    assert venv.reset().tolist() == [2]
    assert venv.reset_infos == [{"seed": None, "waited": False}]
    venv.close()


def test_after_ctrl_c_a_reset_with_options_of_their_own_begins_again(mesh: dict[str, Any], gate: Gate) -> None:
    venv: VecEnv = MeshVecEnv("GatedReset", 2, mesh=mesh)
    venv.reset()
    venv.seed(5)
    venv.set_options([gate.options, {}])
    interrupt(venv.reset, gate)

    def let_in_twice() -> None:
        gate.open()
        gate.entered()
        gate.open()

    thread = threading.Thread(target=let_in_twice)
    thread.start()
    assert venv.settle().tolist() == [3, 2]
    thread.join()
    assert venv.reset_infos == [{"seed": 5, "waited": True}, {"seed": 6, "waited": False}]
    venv.close()


# ---------------------------------------------------------------- pickled, forked, left open


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda venv: pickle.loads(pickle.dumps(venv))], ids=["copy", "pickle"]
)
def test_a_copy_leases_envs_of_its_own(mesh: dict[str, Any], again: Any) -> None:
    venv: VecEnv = MeshVecEnv("CartPole-v1", 2, mesh=mesh, shards=2)
    venv.seed(3)
    first = venv.reset()
    other = again(venv)
    assert [other.num_envs, len(other.shards)] == [2, 2]
    other.seed(3)
    assert np.array_equal(other.reset(), first)
    other.step(ZEROS)
    venv.step(ZEROS)
    for one in (venv, other):
        one.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_has_envs_of_its_own_from_its_first_reset_on(mesh: dict[str, Any]) -> None:
    venv: VecEnv = MeshVecEnv("Counter", 2, mesh=mesh)
    venv.reset()
    venv.step(ZEROS)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.raises(errors.ResetNeeded):
                venv.step(ZEROS)
            venv.reset()
            assert venv.step(ZEROS)[0].tolist() == [1, 1]
            venv.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert venv.step(ZEROS)[0].tolist() == [2, 2]
    venv.close()


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_that_was_left_open_warns_and_frees_its_slots(guarded: dict[str, Any], wrapped: bool) -> None:
    def drop() -> None:
        venv: Any = MeshVecEnv("Counter", 2, mesh=guarded)
        venv.reset()
        if wrapped:
            venv = VecMonitor(venv)
        del venv
        gc.collect()

    for _ in range(2):
        with pytest.warns(ResourceWarning, match="unclosed <MeshVecEnv of 2 Counter"):
            drop()
    venv: VecEnv = MeshVecEnv("Counter", 2, mesh=guarded)
    assert venv.reset().tolist() == [0, 0]
    venv.close()


def test_functions_are_told_that_names_are_wanted() -> None:
    with pytest.raises(errors.UsageError) as refused:
        make_vec_env("CartPole-v1", 2, vec_env_cls=MeshVecEnv)
    assert refused.value.message == (
        'MeshVecEnv takes the name of a served env, not functions: MeshVecEnv("CartPole-v1", 8)'
    )
    with pytest.raises(errors.UsageError, match="num_envs is at least 1, not 0"):
        MeshVecEnv("CartPole-v1", 0)


def test_a_mesh_may_be_its_url_and_it_waits_for_as_long_as_it_is_told(
    mesh: dict[str, Any], guarded: dict[str, Any]
) -> None:
    count: Any = np.int64(2)
    venv: VecEnv = MeshVecEnv("Counter", count, mesh=mesh["url"])
    assert repr(venv).startswith("<MeshVecEnv of 2 Counter: ")
    venv.close()
    venv = MeshVecEnv("Counter", 2, mesh=guarded)
    with pytest.raises(errors.MeshFull, match=r"within 0\.1 s"):
        MeshVecEnv("Counter", 2, mesh=guarded, wait=0.1)
    venv.close()

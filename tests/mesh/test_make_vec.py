"""``meshrl.make_vec``: beside a SyncVectorEnv, under Gymnasium's wrappers, made again, interrupted, dropped, closed."""

import asyncio
import contextlib
import copy
import gc
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import vector as wrappers

import meshrl
from meshrl import errors
from meshrl.adapters.call import Call
from meshrl.adapters.gymnasium import MeshEnv
from meshrl.adapters.held import Held
from meshrl.adapters.spec import own_metadata
from meshrl.adapters.vector import MeshVectorEnv
from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.test_make import Gate, in_a_fork, portals, run_python
from tests.mesh.worker_process import WorkerProcess

ENVS = "tests.mesh.made_envs"
MODES = list(AutoresetMode)

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"),
    # From 3.12 on, Python warns of what these tests show to work.
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as server:
        yield server


@pytest.fixture(scope="module")
def mesh(server: EmbeddedServer) -> Iterator[dict[str, Any]]:
    served = {name: name for name in ("CartPole-v1", "FrozenLake-v1", "Pendulum-v1")}
    ours = {name: f"{ENVS}:{name}" for name in ("Counter", "Gated", "Framed")}
    told: dict[str, Any] = {"allow_kwargs": ["*"], "allow": ["*"]}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(server.url, served | ours, wait=False, **told)) for _ in range(2)]
        for worker in workers:
            worker.wait_advertised()
        yield {"url": server.url}


@pytest.fixture
def single(server: EmbeddedServer) -> Iterator[dict[str, Any]]:
    """Two slots, and a lease that outlives every test: only who closes makes room."""
    with WorkerProcess(server.url, {"Counter": f"{ENVS}:Counter"}, slots=2, lease_s=3600.0, namespace="single"):
        yield {"url": server.url, "namespace": "single"}


@pytest.fixture
def counters(mesh: dict[str, Any]) -> Iterator[MeshVectorEnv]:
    with meshrl.make_vec("Counter", 2, mesh=mesh) as envs:
        yield envs


def count_from_their_own_reset(envs: Any) -> bool:
    observations, infos = envs.reset(seed=1)
    steps = [envs.step([0, 1])[0].tolist() for _ in range(3)]
    return observations.tolist() == [0, 0] and infos == {} and steps == [[1, 1], [2, 2], [3, 3]]


def sessions(envs: MeshVectorEnv) -> set[str]:
    return {session.grant.session for session in envs._held.remote._sessions}


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal to the bit: types, dtypes and shapes too."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if theirs.dtype == object:
            assert_same(ours.tolist(), theirs.tolist())
        else:
            np.testing.assert_array_equal(ours, theirs)
    else:
        assert ours == theirs


# ---------------------------------------------------------------- beside a SyncVectorEnv


def local(name: str, num_envs: int, mode: AutoresetMode = AutoresetMode.NEXT_STEP, **kwargs: Any) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: gymnasium.make(name, **kwargs)] * num_envs, autoreset_mode=mode)


def assert_steps_same(ours: VectorEnv, theirs: VectorEnv, steps: int, seed: int = 7) -> None:
    """The same resets, steps and, where nothing resets by itself, masked resets of both."""
    assert_same(ours.reset(seed=seed), theirs.reset(seed=seed))
    theirs.action_space.seed(seed)
    ends = 0
    for _ in range(steps):
        actions = theirs.action_space.sample()
        stepped = ours.step(actions), theirs.step(actions)
        assert_same(*map(without_time, stepped))
        ended = stepped[1][2] | stepped[1][3]
        ends += int(ended.sum())
        if ended.any() and ours.metadata["autoreset_mode"] is AutoresetMode.DISABLED:
            assert_same(*(envs.reset(options={"reset_mask": ended.copy()}) for envs in (ours, theirs)))
    assert ends


def without_time(step: Any) -> Any:
    """What RecordEpisodeStatistics measured is each one's own."""
    infos = step[4]
    for info in infos if isinstance(infos, list) else [infos]:
        info.get("episode", {}).pop("t", None)
        info.get("episode", {}).pop("_t", None)
    return step


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_cartpole_is_that_of_a_sync_vector_env_in_each_mode(
    mesh: dict[str, Any], mode: AutoresetMode, shards: int
) -> None:
    theirs = local("CartPole-v1", 5, mode)
    with meshrl.make_vec("cartpole", 5, mesh=mesh, autoreset_mode=mode.value, shards=shards) as ours:
        assert len(ours.shards) == shards
        assert_steps_same(ours, theirs, 200)


def test_its_spaces_and_facts_are_those_of_a_sync_vector_env(mesh: dict[str, Any]) -> None:
    theirs = local("CartPole-v1", 3, render_mode="rgb_array")
    with meshrl.make_vec("CartPole-v1", 3, mesh=mesh, render_mode="rgb_array") as ours:
        assert isinstance(ours, VectorEnv)
        for name in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert (ours.num_envs, ours.render_mode, ours.closed) == (3, "rgb_array", False)
        assert ours.unwrapped is ours
        assert ours.autoreset_mode is ours.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        assert ours.metadata == own_metadata(theirs.metadata, vector=True)
        assert ours.metadata["render_modes"] == ["rgb_array"]
        assert ours.remote_spec is not None
        assert ours.remote_spec.id == "CartPole-v1"
        ours.reset(seed=1)
        theirs.reset(seed=1)
        assert_same(ours.render(), theirs.render())
    assert ours.closed


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "RecordEpisodeStatistics": wrappers.RecordEpisodeStatistics,
    "NormalizeObservation": wrappers.NormalizeObservation,
    "NormalizeReward": wrappers.NormalizeReward,
    "DictInfoToList": wrappers.DictInfoToList,
    "FlattenObservation": wrappers.FlattenObservation,
    "ClipReward": lambda envs: wrappers.ClipReward(envs, 0.0, 0.5),
    "DtypeObservation": lambda envs: wrappers.DtypeObservation(envs, np.float64),
    "VectorizeTransformObservation": lambda envs: wrappers.VectorizeTransformObservation(
        envs, gymnasium.wrappers.TransformObservation, func=lambda obs: obs * 2, observation_space=None
    ),
    "all that trainers use": lambda envs: wrappers.DictInfoToList(
        wrappers.NormalizeReward(wrappers.NormalizeObservation(wrappers.RecordEpisodeStatistics(envs)))
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gymnasiums_wrappers_give_what_they_give_around_a_sync_vector_env(mesh: dict[str, Any], wrapper: str) -> None:
    wrap = WRAPPERS[wrapper]
    ours, theirs = wrap(meshrl.make_vec("CartPole-v1", 4, mesh=mesh)), wrap(local("CartPole-v1", 4))
    assert ours.observation_space == theirs.observation_space
    assert_steps_same(ours, theirs, 60)
    ours.close()
    assert ours.unwrapped.closed


def test_continuous_actions_may_be_rescaled_by_a_wrapper(mesh: dict[str, Any]) -> None:
    with meshrl.make_vec("Pendulum-v1", 2, mesh=mesh, max_episode_steps=10) as envs:
        low, high = np.full(1, -1, np.float32), np.full(1, 1, np.float32)
        ours, theirs = (
            wrappers.RescaleAction(v, low, high) for v in (envs, local("Pendulum-v1", 2, max_episode_steps=10))
        )
        assert_steps_same(ours, theirs, 30)


def test_human_rendering_takes_it(mesh: dict[str, Any]) -> None:
    with meshrl.make_vec("Framed", 2, mesh=mesh, render_mode="rgb_array") as envs:
        shown = wrappers.HumanRendering(envs)
        assert "human" in shown.metadata["render_modes"]
        envs.reset()
        envs.step([0, 0])
        frames = envs.render()  # as it fetches them
        assert frames is not None
        assert [(frame.shape, frame.dtype, int(frame.max())) for frame in frames] == [((4, 6, 3), np.uint8, 1)] * 2


def test_render_without_a_mode_is_nothing_and_a_warning(counters: MeshVectorEnv) -> None:
    counters.reset()
    with pytest.warns(UserWarning, match="render_mode"):
        assert counters.render() == (None, None)


# ---------------------------------------------------------------- resets, attributes, errors


def test_the_callers_options_are_left_as_they_are_and_results_are_its_own(counters: MeshVectorEnv) -> None:
    options: dict[str, Any] = {"reset_mask": np.array([True, True]), "more": [1]}
    kept = copy.deepcopy(options)
    first, _ = counters.reset(options=options)
    assert_same(options, kept)
    counters.step([0, 0])
    options["reset_mask"][1] = False
    assert counters.reset(options=options)[0].tolist() == [0, 1]
    assert options["reset_mask"].tolist() == [True, False]
    observations, *rest = counters.step([0, 0])
    for array in (first, observations, *rest[:3]):
        assert array.flags.writeable
    observations[:] = 99
    assert counters.step([0, 0])[0].tolist() == [2, 3]
    assert first.tolist() == [0, 0]


def test_what_is_asked_wrongly_is_told_before_anything_is_leased(mesh: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError, match=r"'adress'.*url"):
        meshrl.make_vec("Counter", 2, mesh={"adress": "x"})
    with pytest.raises(errors.UnknownName) as unknown:
        meshrl.make_vec("Countr", 2, mesh=mesh)
    assert unknown.value.details["near"] == ["Counter"]
    with pytest.raises(errors.UsageError, match="rgb_array"):
        meshrl.make_vec("Framed", 2, mesh=mesh, render_mode="human")
    with pytest.raises(ValueError, match="Later"):
        meshrl.make_vec("Counter", 2, mesh=mesh, autoreset_mode="Later")
    with pytest.raises(errors.EnvError):
        meshrl.make_vec("Counter", 2, mesh=mesh, wrong=1)
    assert portals() == []


def test_a_bad_action_is_named_by_its_index_and_nothing_is_sent(counters: MeshVectorEnv) -> None:
    counters.reset()
    with pytest.raises(errors.InvalidAction, match="1") as invalid:
        counters.step([0, 7])
    assert "0, 7" not in str(invalid.value).split("1")[0]
    counters.step_async([0, 7])
    with pytest.raises(errors.InvalidAction):
        counters.step_wait()
    with pytest.raises(errors.NothingUnsettled):
        counters.settle()
    assert counters.step([0, 1])[0].tolist() == [1, 1]


def test_steps_before_a_reset_are_refused(mesh: dict[str, Any], counters: MeshVectorEnv) -> None:
    with pytest.raises(errors.ResetNeeded):
        counters.step([0, 0])
    assert count_from_their_own_reset(counters)
    with meshrl.make_vec("CartPole-v1", 2, mesh=mesh, autoreset_mode="Disabled") as envs:
        envs.reset(seed=1)
        ended = np.zeros(2, np.bool_)
        while not ended.any():
            _, _, terminations, truncations, _ = envs.step([1, 1])
            ended = terminations | truncations
        with pytest.raises(errors.ResetNeeded) as refused:
            envs.step([1, 1])
        assert refused.value.details["env_ids"] == np.flatnonzero(ended).tolist()
        envs.reset(options={"reset_mask": ended})
        envs.step([0, 0])


def test_attributes_are_the_remotes_by_name(counters: MeshVectorEnv) -> None:
    counters.reset(seed=5)
    assert counters.get_attr("np_random_seed") == (5, 6)
    assert counters.get_attr("limit") == (10, 10)
    counters.set_attr("limit", [11, 12])
    assert counters.get_attr("limit") == counters.call("limit") == (11, 12)  # as in Gymnasium
    counters.set_attr("limit", 13, env_ids=[1])
    assert counters.get_attr("limit", [1, 0]) == (13, 11)
    assert counters.call("doubled", 4, plus=1) == (9, 9)
    assert counters.call_some([1], "doubled", 2) == (4,)
    assert counters.is_wrapped(gymnasium.wrappers.TimeLimit) == (False, False)
    for name in ("missing", "_count"):
        with pytest.raises(errors.NotAllowed):
            counters.call(name)
        with pytest.raises(errors.NotAllowed):
            counters.get_attr(name)
    with pytest.raises(ValueError, match="length"):
        counters.set_attr("limit", [1, 2, 3])


def test_np_random_is_the_clients_and_follows_the_seed_alone(counters: MeshVectorEnv) -> None:
    counters.reset()
    drawn = counters.np_random_seed
    assert counters.get_attr("np_random_seed") == (drawn, drawn + 1)
    counters.reset(seed=1)
    first = counters.np_random.random(4).tolist()
    counters.reset()
    assert counters.np_random_seed == 1
    assert counters.np_random.random(4).tolist() != first  # it goes on, as the envs' do
    counters.reset(seed=[1, 9])
    assert counters.np_random.random(4).tolist() == first
    assert counters.get_attr("np_random_seed") == (1, 9)
    assert gymnasium.utils.seeding.np_random(1)[0].random(4).tolist() != first  # not the numbers that the envs draw
    counters.reset(seed=20, options={"reset_mask": np.array([False, True])})
    assert counters.get_attr("np_random_seed") == (1, 21)
    assert counters.np_random_seed == 21
    array: Any = np.array([3, 4])
    counters.reset(seed=array, options={"reset_mask": np.array([True, False])})
    assert counters.get_attr("np_random_seed") == (3, 21)
    with pytest.raises(errors.UsageError):
        counters.np_random = counters.np_random


@pytest.mark.parametrize("seed", [-1, [1], "one", 0.5])
def test_a_refused_seed_or_mask_changes_nothing(counters: MeshVectorEnv, seed: Any) -> None:
    counters.reset(seed=1)
    with pytest.raises((errors.InvalidSeed, TypeError)):
        counters.reset(seed=seed)
    for mask in (np.array([True]), [True, False], np.zeros(2, np.bool_)):
        with pytest.raises((TypeError, ValueError)):
            counters.reset(seed=8, options={"reset_mask": mask})
    assert counters.np_random_seed == 1
    counters.reset()
    assert counters.get_attr("np_random_seed") == (1, 2)


def test_derived_seeds_come_from_one_root(mesh: dict[str, Any]) -> None:
    with meshrl.make_vec("Counter", 2, mesh=mesh, seeding="derived") as envs:
        envs.reset(seed=3)
        seeds = envs.get_attr("np_random_seed")
        assert len(set(seeds)) == 2
        assert envs.np_random_seed == 3
        envs.reset()
        assert envs.get_attr("np_random_seed") != seeds
        envs.reset(seed=3)
        assert envs.get_attr("np_random_seed") == seeds


# ---------------------------------------------------------------- the spec


def test_gymnasium_makes_the_same_remotes_of_its_spec(mesh: dict[str, Any]) -> None:
    given: dict[str, Any] = {"map_name": "8x8", "is_slippery": False}
    asked: dict[str, Any] = {"autoreset_mode": "SameStep", "seeding": "derived", "render_mode": "ansi"}
    with meshrl.make_vec("FrozenLake-v1", 3, mesh=mesh, **asked, **given) as envs:
        assert envs.spec is not None
        with gymnasium.make_vec(envs.spec) as again:  # type: ignore[attr-defined]
            assert isinstance(again, MeshVectorEnv)
            assert again.spec == envs.spec
            assert (again.num_envs, again.render_mode) == (3, "ansi")
            assert again.autoreset_mode is AutoresetMode.SAME_STEP
            assert again.single_observation_space == gymnasium.spaces.Discrete(64)
            assert not sessions(again) & sessions(envs)
        with gymnasium.make(envs.spec) as env:
            assert isinstance(env.unwrapped, MeshEnv)
            assert env.observation_space == gymnasium.spaces.Discrete(64)
            assert env.reset(seed=1)[0] == 0


def test_a_vectors_spec_has_the_remotes_limit_of_steps_and_asks_nobody_for_it(server: EmbeddedServer) -> None:
    strict = {"url": server.url, "namespace": "strict"}
    with (
        WorkerProcess(server.url, {"CartPole-v1": "CartPole-v1"}, namespace="strict"),
        meshrl.make_vec("CartPole-v1", 2, mesh=strict) as envs,
    ):
        assert envs.spec is not None
        assert (envs.spec.max_episode_steps, envs.spec.reward_threshold) == (500, 475.0)
        with gymnasium.make_vec(envs.spec) as again, gymnasium.make(envs.spec) as env:  # type: ignore[attr-defined]
            assert again.spec == envs.spec
            assert isinstance(env.unwrapped, MeshEnv)
        with pytest.raises(errors.KwargsNotAllowed, match="max_episode_steps"):
            meshrl.make_vec("CartPole-v1", 2, mesh=strict, max_episode_steps=7)


def test_a_mesh_may_be_its_url_and_numbers_numpys(mesh: dict[str, Any]) -> None:
    count: Any = np.int64(2)
    with meshrl.make_vec("Counter", count, mesh=mesh["url"]) as envs, meshrl.make("Counter", mesh=mesh["url"]) as env:
        assert count_from_their_own_reset(envs)
        assert env.reset()[0] == 0


def test_wait_is_the_seconds_that_it_waits_and_goes_along(single: dict[str, Any]) -> None:
    with meshrl.make_vec("Counter", 2, mesh=single, wait=20.0) as envs:
        assert envs.spec is not None
        assert envs.spec.kwargs["wait"] == envs.__reduce__()[1][1]["wait"] == 20.0
        for full in (
            lambda: meshrl.make_vec("Counter", 2, mesh=single, wait=0.1),
            lambda: meshrl.make("Counter", mesh=single, wait=0.1),
        ):
            with pytest.raises(errors.MeshFull, match=r"within 0\.1 s .*--slots"):
                full()


def test_it_tells_where_it_is_in_the_singular_too(mesh: dict[str, Any]) -> None:
    envs = meshrl.make_vec("Counter", 2, mesh=mesh, shards=1)
    assert repr(envs) == "<MeshVectorEnv of 2 Counter: 1 shard at 1 worker>"
    envs.close()
    assert repr(envs) == "<MeshVectorEnv of 2 Counter: closed>"
    with meshrl.make_vec("Counter", 2, mesh=mesh, shards=2) as envs:
        assert "2 shards at 2 workers" in repr(envs)


def test_gymnasium_makes_a_vector_of_a_single_envs_spec(mesh: dict[str, Any]) -> None:
    with meshrl.make("Counter", mesh=mesh) as env:
        assert env.spec is not None
        with gymnasium.make_vec(env.spec, num_envs=2, autoreset_mode="Disabled") as envs:  # type: ignore[attr-defined]
            assert isinstance(envs, MeshVectorEnv)
            assert envs.autoreset_mode is AutoresetMode.DISABLED
            assert count_from_their_own_reset(envs)


def test_an_id_registered_for_it_goes_through_gymnasium(mesh: dict[str, Any]) -> None:
    kwargs = {"name": "Counter", "mesh": mesh}
    gymnasium.register(
        "ForTest/Vector-v0", entry_point="meshrl:make", vector_entry_point="meshrl:make_vec", kwargs=kwargs
    )
    try:
        envs = gymnasium.make_vec("ForTest/Vector-v0", num_envs=2)
        assert isinstance(envs, MeshVectorEnv)
        assert count_from_their_own_reset(envs)
        again = pickle.loads(pickle.dumps(envs))
        assert again.spec == envs.spec
        assert count_from_their_own_reset(again)
        again.close()
        envs.close()
        with gymnasium.make("ForTest/Vector-v0") as env:
            assert env.reset()[0] == 0
    finally:
        del gymnasium.registry["ForTest/Vector-v0"]


# ---------------------------------------------------------------- copies and processes


@pytest.mark.parametrize(
    "copied",
    [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy, lambda e: pickle.loads(cloudpickle.dumps(lambda: e))()],
    ids=["pickle", "deepcopy", "cloudpickle"],
)
def test_a_copy_is_another_vector_in_its_initial_state(
    counters: MeshVectorEnv, copied: Callable[[Any], MeshVectorEnv]
) -> None:
    counters.reset()
    counters.step([0, 0])
    with copied(counters) as other:
        assert other.spec == counters.spec
        assert not sessions(other) & sessions(counters)
        with pytest.raises(errors.ResetNeeded):
            other.step([0, 0])
        assert count_from_their_own_reset(other)
    assert counters.step([0, 0])[0].tolist() == [2, 2]


def test_a_forked_process_never_steps_its_parents_sessions(counters: MeshVectorEnv) -> None:
    counters.reset(seed=5)
    counters.step_async([0, 0])

    def child() -> dict[str, Any]:
        calls: list[Callable[[], Any]] = [
            lambda: counters.step([0, 0]),
            counters.step_wait,
            lambda: counters.call("doubled", 1),
            lambda: counters.get_attr("limit"),
        ]
        raised = []
        for call in calls:
            try:
                call()
            except errors.MeshError as exc:
                raised.append(type(exc))
        counts = count_from_their_own_reset(counters)
        told = {"raised": raised, "counts": counts, "sessions": sessions(counters)}
        counters.close()
        return told

    told = in_a_fork(child)
    assert told["raised"] == [errors.ResetNeeded] * 4
    assert told["counts"]
    assert not told["sessions"] & sessions(counters)
    assert counters.step_wait()[0].tolist() == [1, 1]
    in_a_fork(lambda: MeshVectorEnv.__del__(counters))
    in_a_fork(counters.close)
    assert counters.step([0, 0])[0].tolist() == [2, 2]
    assert counters.get_attr("np_random_seed") == (5, 6)


def test_it_works_inside_a_running_event_loop(mesh: dict[str, Any]) -> None:
    async def notebook() -> None:
        with meshrl.make_vec("Counter", 2, mesh=mesh) as envs:
            assert count_from_their_own_reset(envs)

    asyncio.run(notebook())


# ---------------------------------------------------------------- Ctrl-C, threads, steps that are begun


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@pytest.fixture
def gated(mesh: dict[str, Any], gate: Gate) -> Iterator[MeshVectorEnv]:
    """The action 1 waits at the gate."""
    with meshrl.make_vec("Gated", 2, mesh=mesh, shards=2) as envs:
        envs.reset(options=gate.options)
        yield envs


def waits(thread: int) -> bool:
    """Whether that thread waits for a call."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code is not Call.wait.__code__:
        frame = frame.f_back
    return frame is not None


def interrupted(call: Callable[[], Any], gate: Gate) -> None:
    """A call that Ctrl-C interrupts while a sub-environment is inside its step."""
    main = threading.get_ident()

    def interrupt() -> None:
        gate.entered()
        while not waits(main):
            pass
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        call()
    thread.join()


@pytest.mark.parametrize("begun", [False, True])
def test_after_ctrl_c_the_step_is_settled_and_counted_once(gated: MeshVectorEnv, gate: Gate, *, begun: bool) -> None:
    assert gated.step([0, 0])[0].tolist() == [1, 1]
    if begun:
        gated.step_async([1, 0])
        interrupted(gated.step_wait, gate)
    else:
        interrupted(lambda: gated.step([1, 0]), gate)
    with pytest.raises(errors.StepUnsettled) as unsettled:
        gated.step([0, 0])
    says = "Gated: a step was interrupted and may have run; `envs.settle()` gives its result, or reset"
    assert (str(unsettled.value), unsettled.value.details["op"]) == (says, "step")
    gate.open()
    observations, rewards, *_ = gated.settle()
    assert (observations.tolist(), rewards.tolist()) == ([2, 2], [1.0, 1.0])
    with pytest.raises(errors.NothingUnsettled, match="was interrupted"):
        gated.settle()
    assert gated.step([0, 0])[0].tolist() == [3, 3]


def test_after_ctrl_c_reset_discards_the_step(gated: MeshVectorEnv, gate: Gate) -> None:
    interrupted(lambda: gated.step([0, 1]), gate)
    gate.open()
    gated.reset()
    assert [gated.step([0, 0])[0].tolist() for _ in range(2)] == [[1, 1], [2, 2]]


def test_after_ctrl_c_they_close(gated: MeshVectorEnv, gate: Gate) -> None:
    interrupted(lambda: gated.step([1, 0]), gate)
    gate.open()
    gated.close()
    with pytest.raises(errors.SessionClosed):
        gated.settle()


def test_no_step_is_lost_or_repeated_wherever_an_interrupt_strikes(mesh: dict[str, Any]) -> None:
    class Interrupt(BaseException):
        pass

    inside = {Held.do.__code__, Held.begin.__code__, Held.finish.__code__}

    def handler(_number: int, frame: FrameType | None) -> None:
        # Outside of the call there is nothing that could keep a result: there the signal comes too late.
        while frame is not None:
            if frame.f_code in inside:
                raise Interrupt
            frame = frame.f_back

    main, ended = threading.get_ident(), threading.Event()
    go, struck = threading.Semaphore(0), threading.Semaphore(0)
    draw = random.Random(0)

    def strike() -> None:
        while True:
            go.acquire()
            if ended.is_set():
                return
            time.sleep(draw.uniform(0.0, 0.002))
            signal.pthread_kill(main, signal.SIGUSR1)
            struck.release()

    before = signal.signal(signal.SIGUSR1, handler)
    striker = threading.Thread(target=strike)
    striker.start()
    envs = meshrl.make_vec("Counter", 2, mesh=mesh, shards=2)
    envs.reset()
    count = settled = 0
    try:
        for turn in range(400):
            go.release()
            try:
                if turn % 2:
                    envs.step_async([0, 0])
                    observations = envs.step_wait()[0]
                else:
                    observations = envs.step([0, 0])[0]
            except Interrupt:
                try:
                    observations = envs.settle()[0]
                except errors.NothingUnsettled:
                    continue  # nothing had been sent
                settled += 1
            finally:
                struck.acquire()  # one strike a step
            count += 1
            assert observations.tolist() == [count, count]
    finally:
        ended.set()
        go.release()
        striker.join()
        signal.signal(signal.SIGUSR1, before)
    assert envs.step([0, 0])[0].tolist() == [count + 1] * 2
    assert settled
    envs.close()


def test_steps_of_two_vectors_may_be_begun_and_waited_for_later(mesh: dict[str, Any], gated: MeshVectorEnv) -> None:
    with meshrl.make_vec("Counter", 2, mesh=mesh) as envs:
        envs.reset()
        actions = np.array([0, 0])
        gated.step_async(actions)
        envs.step_async(actions)
        actions[:] = 7  # the caller's to use again
        assert envs.step_wait()[0].tolist() == [1, 1]
        assert gated.step_wait()[0].tolist() == [1, 1]
        with pytest.raises(errors.NothingUnderWay):
            envs.step_wait()


def test_what_else_is_called_while_a_step_is_begun_is_told_so_and_reset_drops_it(
    gated: MeshVectorEnv, gate: Gate
) -> None:
    gated.step_async([1, 0])
    for call in (lambda: gated.step([0, 0]), lambda: gated.step_async([0, 0]), lambda: gated.get_attr("limit")):
        with pytest.raises(errors.ConcurrentStep):
            call()
    gate.entered()
    gate.open()
    gated.reset()
    with pytest.raises(errors.NothingUnderWay):
        gated.step_wait()
    assert gated.step([0, 0])[0].tolist() == [1, 1]
    gated.step_async([0, 0])
    assert gated.settle()[0].tolist() == [2, 2]
    gated.step_async([0, 0])
    gated.close()


def test_a_second_thread_in_the_same_vector_is_told_so(gated: MeshVectorEnv, gate: Gate) -> None:
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(gated.step([1, 0])))
    thread.start()
    gate.entered()
    try:
        with pytest.raises(errors.ConcurrentStep):
            gated.step([0, 0])
    finally:
        gate.open()
        thread.join()
    assert got[0][0].tolist() == [1, 1]
    assert gated.step([0, 0])[0].tolist() == [2, 2]


# ---------------------------------------------------------------- the end


def test_envs_and_vectors_share_a_portal_and_close_twice(mesh: dict[str, Any]) -> None:
    assert portals() == []
    envs, env = meshrl.make_vec("Counter", 2, mesh=mesh), meshrl.make("Counter", mesh=mesh)
    assert envs._held.portal is env._held.portal
    envs.close()
    envs.close()
    assert envs.closed
    for call in (lambda: envs.step([0, 0]), envs.reset, envs.step_wait):
        with pytest.raises(errors.SessionClosed):
            call()
    env.close()
    assert portals() == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_vector_that_is_dropped_frees_its_slots_and_warns(single: dict[str, Any], *, wrapped: bool) -> None:
    def drop() -> None:
        envs: Any = meshrl.make_vec("Counter", 2, mesh=single)
        envs.reset()
        if wrapped and not hasattr(gymnasium.vector.VectorWrapper, "__del__"):  # Gymnasium 1.2 closes it there
            envs = wrappers.RecordEpisodeStatistics(envs)
        del envs
        gc.collect()

    for _ in range(2):
        with pytest.warns(ResourceWarning, match="unclosed <MeshVectorEnv of 2 Counter"):
            drop()
    with meshrl.make_vec("Counter", 2, mesh=single) as envs:
        assert count_from_their_own_reset(envs)


def test_it_may_be_closed_on_the_portals_own_thread(single: dict[str, Any]) -> None:
    """A wrapper of Gymnasium 1.2 closes what it wraps when it is garbage, wherever it is collected."""
    envs = meshrl.make_vec("Counter", 2, mesh=single)

    async def collected() -> None:
        envs.close()

    envs._held.portal.run(Call("collect", collected))
    with meshrl.make_vec("Counter", 2, mesh=single) as envs:
        assert count_from_their_own_reset(envs)


@pytest.mark.parametrize("ending", ["", "sys.exit(0)", "envs.close()"])
def test_an_interpreter_that_exits_frees_its_slots_without_a_word(single: dict[str, Any], ending: str) -> None:
    make = "import sys, meshrl; envs = meshrl.make_vec('Counter', 2, mesh={'url': sys.argv[1], 'namespace': 'single'})"
    ended = run_python(f"{make}\nenvs.reset(); envs.step([0, 0])\n{ending}", single["url"])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    with meshrl.make_vec("Counter", 2, mesh=single) as envs:
        assert count_from_their_own_reset(envs)

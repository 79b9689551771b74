"""``meshrl.make``: made again from its spec, pickled, forked, interrupted, dropped, and left open at the exit."""

import asyncio
import contextlib
import copy
import functools
import gc
import multiprocessing
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import gymnasium
import pytest
from gymnasium.vector import AsyncVectorEnv

import meshrl
from meshrl import errors
from meshrl.adapters.gymnasium import MeshEnv
from meshrl.adapters.held import Held
from meshrl.adapters.spec import own_metadata, own_spec
from meshrl.bus.embedded import EmbeddedServer
from tests.mesh.worker_process import ROOT, WorkerProcess

DEADLINE_S = 60.0
ENVS = "tests.mesh.made_envs"

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
    served = {"CartPole-v1": "CartPole-v1", "FrozenLake-v1": "FrozenLake-v1"}
    ours = {name: f"{ENVS}:{name}" for name in ("Counter", "Gated", "Framed")}
    with WorkerProcess(server.url, {**served, **ours}, allow_kwargs=["*"], allow=["*"]):
        yield {"url": server.url}


@pytest.fixture
def single(server: EmbeddedServer) -> Iterator[dict[str, Any]]:
    """One slot, and a lease that outlives every test: only who closes makes room."""
    with WorkerProcess(server.url, {"Counter": f"{ENVS}:Counter"}, slots=1, lease_s=3600.0, namespace="single"):
        yield {"url": server.url, "namespace": "single"}


@pytest.fixture
def counter(mesh: dict[str, Any]) -> Iterator[MeshEnv]:
    with meshrl.make("Counter", mesh=mesh) as env:
        yield env


def counts_from_its_own_reset(env: gymnasium.Env) -> bool:
    observation, info = env.reset(seed=1)
    return observation == 0 and info == {} and [env.step(0)[0] for _ in range(3)] == [1, 2, 3]


# ---------------------------------------------------------------- the spec


def test_spec_makes_the_same_remote_in_another_session(mesh: dict[str, Any]) -> None:
    given: dict[str, Any] = {"map_name": "8x8", "is_slippery": False}
    with meshrl.make("FrozenLake-v1", mesh=mesh, render_mode="ansi", **given) as env:
        spec = env.spec
        assert spec is not None
        assert spec.entry_point == "meshrl:make"
        assert env.remote_spec is not None
        assert env.remote_spec.id == "FrozenLake-v1"
        assert env.observation_space == gymnasium.spaces.Discrete(64)
        for made in (spec.make(), gymnasium.make(spec)):
            with made as again:
                assert isinstance(again, MeshEnv)
                assert again.spec == spec
                assert again.render_mode == "ansi"
                assert again.observation_space == env.observation_space
                assert again._held.remote.session_id != env._held.remote.session_id


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        ("cartpole", "cartpole"),
        ("CartPole-v1", "CartPole-v1"),
        ("module:Name-v2", "module:Name-v2"),
        ("ALE/Pong-v5", "ALE/Pong-v5"),
        ("some.module:ALE/Pong-v5", "some_module:ALE/Pong-v5"),
        ("my env, the 2nd!", "my_env__the_2nd_"),
        ("a/b/c", "a_b/c"),
        ("/", "_/_"),
    ],
)
def test_every_served_name_has_an_id_that_gymnasium_takes(name: str, id_: str) -> None:
    spec = own_spec(name, "meshrl:make", {}, None)
    assert (spec.id, spec.kwargs) == (id_, {"name": name})


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_make_vec_of_the_spec_steps_remotes(counter: MeshEnv, mode: str) -> None:
    assert counter.spec is not None
    envs = gymnasium.make_vec(counter.spec, num_envs=2, vectorization_mode=mode)
    try:
        envs.reset(seed=1)
        assert [list(envs.step([0, 1])[0]) for _ in range(2)] == [[1, 1], [2, 2]]
    finally:
        envs.close()


def test_an_id_registered_for_it_goes_through_gymnasium(mesh: dict[str, Any]) -> None:
    gymnasium.register("ForTest/Remote-v0", entry_point="meshrl:make", kwargs={"name": "Counter", "mesh": mesh})
    try:
        with gymnasium.make("ForTest/Remote-v0", max_episode_steps=2) as env:
            assert counts_from_its_own_reset(env)
            again = pickle.loads(pickle.dumps(env.unwrapped))
            assert again.spec == env.unwrapped.spec
            assert counts_from_its_own_reset(again)
            again.close()
        envs = gymnasium.make_vec("ForTest/Remote-v0", num_envs=2, vectorization_mode="async")
        envs.reset()
        assert list(envs.step([0, 0])[0]) == [1, 1]
        envs.close()
    finally:
        del gymnasium.registry["ForTest/Remote-v0"]


def test_human_mode_is_offered_exactly_where_frames_can_be_shown() -> None:
    assert own_metadata({"render_modes": ["rgb_array"]}) == {"render_modes": ["human", "rgb_array"]}
    assert own_metadata({"render_modes": ["human", "ansi"]}) == {"render_modes": ["ansi"]}
    assert own_metadata({"render_modes": ("human", "rgb_array")}) == {"render_modes": ("human", "rgb_array")}
    assert own_metadata({}) == {}


def test_human_mode_shows_the_remotes_frames_here(mesh: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import pygame

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    with meshrl.make("Framed", mesh=mesh, render_mode="human") as env:
        assert env.metadata == {"render_modes": ["human", "rgb_array"], "render_fps": 30}
        env.reset()
        env.step(0)
        shown = pygame.display.get_surface()
        assert shown is not None
        assert shown.get_size() == (6, 4)
        assert shown.get_at((0, 0))[:3] == (1, 1, 1)
        assert env.step(0)[0] == 2
        assert shown.get_at((5, 3))[:3] == (2, 2, 2)
        assert env.render() is None
    assert not pygame.display.get_init()


def test_unknown_mesh_arguments_and_unknown_names_are_named(mesh: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError, match=r"'adress'.*url"):
        meshrl.make("Counter", mesh={"adress": "x"})
    with pytest.raises(errors.UnknownName) as raised:
        meshrl.make("Countr", mesh=mesh)
    assert raised.value.details["near"] == ["Counter"]


# ---------------------------------------------------------------- pickles and processes


@pytest.mark.parametrize("copied", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_is_another_remote_in_its_initial_state(counter: MeshEnv, copied: Callable[[Any], Any]) -> None:
    counter.reset()
    counter.step(0)
    with copied(counter) as other:
        assert other.spec == counter.spec
        assert other._held.remote.session_id != counter._held.remote.session_id
        with pytest.raises(errors.ResetNeeded):
            other.step(0)
        assert counts_from_its_own_reset(other)
    assert counter.step(0)[0] == 2


def test_cloudpickle_takes_it_inside_closures(counter: MeshEnv) -> None:
    taken = pickle.loads(cloudpickle.dumps(lambda: counter))
    with taken() as other:
        assert counts_from_its_own_reset(other)


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_async_vector_env_leases_one_a_process(mesh: dict[str, Any], counter: MeshEnv, context: str) -> None:
    counter.reset()  # the parent's portal is at work when it forks
    counter.step(0)
    envs = AsyncVectorEnv([lambda: meshrl.make("Counter", mesh=mesh)] * 2, context=context)
    try:
        envs.reset(seed=1)
        assert [list(envs.step([0, 1])[0]) for _ in range(3)] == [[1, 1], [2, 2], [3, 3]]
        assert counter.step(0)[0] == 2
        assert len({state.session for state in envs.call("state")}) == 2
    finally:
        envs.close()


def subprocess_worker(pipe: Any, pickled: bytes) -> None:
    """What a SubprocVecEnv's process does: unpickle the factory, make the env, answer commands until told to close."""
    env = cloudpickle.loads(pickled)()
    while True:
        command, data = pipe.recv()
        if command == "reset":
            pipe.send(env.reset(seed=data))
        elif command == "step":
            pipe.send(env.step(data))
        elif command == "spaces":
            pipe.send((env.observation_space, env.action_space))
        else:
            env.close()
            pipe.close()
            return


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_a_factory_pickled_by_value_serves_in_subprocesses(mesh: dict[str, Any], counter: MeshEnv, start: str) -> None:
    context = multiprocessing.get_context(start)
    counter.reset()
    pickled = cloudpickle.dumps(lambda: meshrl.make("Counter", mesh=mesh))
    pairs = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=subprocess_worker, args=(end, pickled), daemon=True) for _, end in pairs]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    for pipe, _ in pairs:
        pipe.send(("spaces", None))
        assert pipe.recv() == (counter.observation_space, counter.action_space)
        pipe.send(("reset", 3))
        assert pipe.recv() == (0, {})
    for expected in (1, 2):
        for pipe, _ in pairs:
            pipe.send(("step", 0))
        assert [pipe.recv()[0] for pipe, _ in pairs] == [expected] * 2
    assert counter.step(0)[0] == 1
    for (pipe, end), process in zip(pairs, processes, strict=True):
        pipe.send(("close", None))
        process.join(DEADLINE_S)
        assert process.exitcode == 0
        pipe.close()
        end.close()


def in_a_fork(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in a forked process, or what it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            outcome = work()
        except BaseException as exc:
            outcome = exc
        os.write(writing, pickle.dumps(outcome))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if not select.select([pipe], [], [], DEADLINE_S)[0]:
            os.kill(pid, signal.SIGKILL)
        answer = pipe.read()
    os.waitpid(pid, 0)
    assert answer, "the forked process hangs"
    outcome = pickle.loads(answer)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def test_a_forked_process_never_steps_its_parents_session(counter: MeshEnv) -> None:
    counter.reset(seed=5)
    counter.step(0)

    def child() -> dict[str, Any]:
        raised = []
        for call in (
            lambda: counter.step(0),
            lambda: counter.call("doubled", 1),
            counter.state,
            lambda: counter.get_attr("limit"),
        ):
            try:
                call()
            except errors.MeshError as exc:
                raised.append(type(exc))
        counts = counts_from_its_own_reset(counter)
        told = {"raised": raised, "counts": counts, "session": counter._held.remote.session_id}
        counter.close()
        return told

    told = in_a_fork(child)
    assert told["raised"] == [errors.ResetNeeded] * 4
    assert told["counts"]
    assert told["session"] != counter._held.remote.session_id
    assert counter.step(0)[0] == 2
    state = counter.state()
    assert (state.episode, state.total_steps, state.seed) == (1, 2, 5)


def test_a_forked_process_that_closes_or_drops_an_env_leaves_the_parents(counter: MeshEnv) -> None:
    counter.reset()
    in_a_fork(counter.close)
    assert counter.step(0)[0] == 1
    in_a_fork(counter.__del__)
    assert counter.step(0)[0] == 2
    assert counts_from_its_own_reset(counter)


def test_a_forked_interpreter_that_goes_on_and_exits_says_nothing(mesh: dict[str, Any]) -> None:
    program = """
import os, sys, meshrl
env, idle = (meshrl.make("Counter", mesh={"url": sys.argv[1]}) for _ in range(2))
env.reset(); env.step(0)
pid = os.fork()
if pid == 0:
    env.reset()
    assert [env.step(0)[0] for _ in range(3)] == [1, 2, 3]
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert env.step(0)[0] == 2
"""
    ended = run_python(program, mesh["url"])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# ---------------------------------------------------------------- Ctrl-C and threads


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


def interrupted_step(env: MeshEnv, gate: Gate) -> None:
    """A step that Ctrl-C interrupts while the env is inside it."""
    main = threading.get_ident()

    def interrupt() -> None:
        gate.entered()
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        env.step(1)
    thread.join()


def test_after_ctrl_c_the_step_is_settled_and_counted_once(mesh: dict[str, Any], gate: Gate) -> None:
    with meshrl.make("Gated", mesh=mesh) as env:
        env.reset(options=gate.options)
        assert env.step(0)[0] == 1
        interrupted_step(env, gate)
        with pytest.raises(errors.StepUnsettled):
            env.step(0)
        gate.open()
        assert env.settle() == (2, 1.0, False, False, {})
        with pytest.raises(errors.NothingUnsettled):
            env.settle()
        assert env.step(0)[0] == 3


def test_after_ctrl_c_reset_discards_the_step(mesh: dict[str, Any], gate: Gate) -> None:
    with meshrl.make("Gated", mesh=mesh) as env:
        env.reset(options=gate.options)
        interrupted_step(env, gate)
        gate.open()
        assert counts_from_its_own_reset(env)


def test_after_ctrl_c_an_env_closes(mesh: dict[str, Any], gate: Gate) -> None:
    with meshrl.make("Gated", mesh=mesh) as env:
        env.reset(options=gate.options)
        interrupted_step(env, gate)
        gate.open()
    with pytest.raises(errors.SessionClosed):
        env.settle()


def test_no_step_is_lost_or_repeated_wherever_an_interrupt_strikes(counter: MeshEnv) -> None:
    class Interrupt(BaseException):
        pass

    def handler(_number: int, frame: FrameType | None) -> None:
        # Outside of the call there is nothing that could keep a result: there the signal comes too late.
        while frame is not None:
            if frame.f_code is Held.do.__code__:
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
            time.sleep(draw.uniform(0.0, 0.001))
            signal.pthread_kill(main, signal.SIGUSR1)
            struck.release()

    before = signal.signal(signal.SIGUSR1, handler)
    striker = threading.Thread(target=strike)
    striker.start()
    counter.reset()
    count = settled = 0
    try:
        for _ in range(400):
            go.release()
            try:
                observation = counter.step(0)[0]
            except Interrupt:
                try:
                    observation = counter.settle()[0]
                except errors.NothingUnsettled:
                    continue  # nothing had been sent
                settled += 1
            finally:
                struck.acquire()  # one strike a step
            count += 1
            assert observation == count
    finally:
        ended.set()
        go.release()
        striker.join()
        signal.signal(signal.SIGUSR1, before)
    assert counter.step(0)[0] == count + 1
    assert settled


def test_a_second_thread_in_the_same_env_is_told_so(mesh: dict[str, Any], gate: Gate) -> None:
    with meshrl.make("Gated", mesh=mesh) as env:
        env.reset(options=gate.options)
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(env.step(1)))
        thread.start()
        gate.entered()
        with pytest.raises(errors.ConcurrentStep):
            env.step(0)
        gate.open()
        thread.join()
        assert got[0][0] == 1
        assert env.step(0)[0] == 2


def test_it_works_inside_a_running_event_loop(mesh: dict[str, Any]) -> None:
    async def notebook() -> None:
        with meshrl.make("Counter", mesh=mesh) as env:
            assert counts_from_its_own_reset(env)

    asyncio.run(notebook())


# ---------------------------------------------------------------- attributes


def test_attributes_are_the_remotes_by_name_and_through_gymnasiums_ways(counter: MeshEnv) -> None:
    counter.reset()
    assert counter.get_attr("limit") == 10
    counter.set_attr("limit", 11)
    assert counter.call("doubled", 4, plus=1) == 9
    wrapped = gymnasium.wrappers.TimeLimit(counter, 5)
    assert wrapped.unwrapped is counter
    assert wrapped.get_wrapper_attr("limit") == 11
    wrapped.set_wrapper_attr("limit", 12)
    assert counter.get_attr("limit") == 12
    assert counter.has_wrapper_attr("limit")
    assert counter.has_wrapper_attr("doubled")
    assert counter.has_wrapper_attr("spec")
    assert not counter.has_wrapper_attr("missing")
    assert not counter.set_wrapper_attr("missing", 1, force=False)
    for name in ("missing", "_count"):
        with pytest.raises(AttributeError):
            counter.get_wrapper_attr(name)
    with pytest.raises(errors.NotAllowed):
        counter.get_attr("_count")


def test_np_random_is_the_clients_and_follows_the_seed_alone(counter: MeshEnv) -> None:
    counter.reset(seed=1)
    first = counter.np_random.random(4).tolist()
    counter.reset()
    assert counter.np_random_seed == 1
    assert counter.np_random.random(4).tolist() != first  # it goes on, as the env's does
    counter.reset(seed=1)
    assert counter.np_random.random(4).tolist() == first
    assert gymnasium.utils.seeding.np_random(1)[0].random(4).tolist() != first  # not the numbers that the env draws
    with pytest.raises(errors.UsageError):
        counter.np_random = counter.np_random


def test_a_refused_seed_changes_nothing(counter: MeshEnv) -> None:
    counter.reset(seed=1)
    with pytest.raises(errors.InvalidSeed):
        counter.reset(seed=-1)
    assert counter.np_random_seed == 1
    counter.reset()
    assert counter.state().seed == 1


# ---------------------------------------------------------------- the end


def portals() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name in {"meshrl-portal", "meshrl-keeper"}]


def test_envs_share_a_portal_until_the_last_is_closed(mesh: dict[str, Any]) -> None:
    assert portals() == []
    one, two = meshrl.make("Counter", mesh=mesh), meshrl.make("Counter", mesh=dict(mesh))
    three = meshrl.make("Counter", mesh={**mesh, "timeout": 20.0})
    assert one._held.portal is two._held.portal
    assert three._held.portal is not two._held.portal
    one.close()
    one.close()
    assert counts_from_its_own_reset(two)
    two.close()
    three.close()
    assert portals() == []
    with pytest.raises(errors.SessionClosed):
        two.reset()
    with meshrl.make("Counter", mesh=mesh) as four:
        assert counts_from_its_own_reset(four)


def test_a_make_that_fails_leaves_no_portal(mesh: dict[str, Any]) -> None:
    with pytest.raises(errors.EnvError):
        meshrl.make("Counter", mesh=mesh, wrong=1)
    with pytest.raises(errors.MeshUnreachable):
        meshrl.make("Counter", mesh={"url": "nats://127.0.0.1:1", "timeout": 1.0})
    assert portals() == []


def test_an_env_that_is_dropped_frees_its_slot(single: dict[str, Any]) -> None:
    for _ in range(2):
        env = meshrl.make("Counter", mesh=single)
        env.reset()
        del env
        gc.collect()
    with meshrl.make("Counter", mesh=single) as env:
        assert counts_from_its_own_reset(env)


def run_python(program: str, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    gone = ("MESHRL_URL", "MESHRL_EMBEDDED_URL")
    env = {key: value for key, value in os.environ.items() if key not in gone}
    return subprocess.run(
        # Warnings are shown; not -X dev, whose asyncio also tells of callbacks that a busy machine made slow.
        [sys.executable, "-W", "default", "-X", "faulthandler", "-c", program, *argv],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**env, "PYTHONPATH": str(ROOT), **variables},
    )


@pytest.mark.parametrize("ending", ["", "sys.exit(0)", "del env", "import gc; del env; gc.collect()", "env.close()"])
def test_an_interpreter_that_exits_frees_its_slots_without_a_word(single: dict[str, Any], ending: str) -> None:
    program = "import sys, meshrl; env = meshrl.make('Counter', mesh={'url': sys.argv[1], 'namespace': 'single'})\n"
    ended = run_python(program + "env.reset(); env.step(0)\n" + ending, single["url"])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    with meshrl.make("Counter", mesh=single) as env:
        assert counts_from_its_own_reset(env)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_multiprocessing_process_that_returns_frees_its_slots(single: dict[str, Any], start: str) -> None:
    context = multiprocessing.get_context(start)
    # Held by a cycle, so that nothing but the process's end closes it.
    process = context.Process(target=functools.partial(holds_and_returns, single))  # type: ignore[attr-defined]
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode == 0
    with meshrl.make("Counter", mesh=single) as env:
        assert counts_from_its_own_reset(env)


HELD: list[MeshEnv] = []


def holds_and_returns(mesh: dict[str, Any]) -> None:
    HELD.append(meshrl.make("Counter", mesh=mesh))
    HELD[0].reset()


def processes_with(text: str) -> list[int]:
    """Those that have ``text`` in their environment."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (directory / "environ").read_bytes():
                found.append(int(directory.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_without_a_mesh_it_starts_one_and_leaves_nothing_behind(tmp_path: Path) -> None:
    program = """
import meshrl
with meshrl.make("cartpole") as env:
    obs, info = env.reset(seed=1)
    assert env.observation_space.contains(obs)
    assert env.step(1)[1] == 1.0
    assert env.remote_spec.id == "CartPole-v1"
"""
    home = {"HOME": str(tmp_path), "MESHRL_STATE_DIR": str(tmp_path / "state"), "TMPDIR": str(tmp_path)}
    ended = run_python(program, **home)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    for pid in processes_with(str(tmp_path)):
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                assert select.select([fd], [], [], DEADLINE_S)[0], f"process {pid} outlives its mesh"
            finally:
                os.close(fd)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

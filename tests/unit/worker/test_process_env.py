"""An env in a process of its own, as its worker has it: without a server, with real processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest

from meshrl.errors import EnvError, EnvProcessDied, UsageError
from meshrl.worker.children import Children
from meshrl.worker.factories import Factory
from meshrl.worker.isolation import Deadlines
from meshrl.worker.limits import Limits
from meshrl.worker.process_env import ProcessEnv, picklable
from meshrl.worker.raised import EndsSession, RaisedInside
from tests.mesh.dangerous_envs import Dangerous
from tests.mesh.envs import Counter

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

LIMITS = Limits()
Make = Callable[..., ProcessEnv]


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    children = Children(Deadlines(60.0, 60.0), LIMITS)
    yield children
    children.stop()


@pytest.fixture
def make(children: Children) -> Iterator[Make]:
    made: list[ProcessEnv] = []

    def make(source: Any, **kwargs: Any) -> ProcessEnv:
        made.append(ProcessEnv.make(children, LIMITS, "env", picklable("env", Factory(source)), kwargs, None))
        return made[-1]

    yield make
    for env in made:
        env.close()


def test_its_generator_can_be_read_and_set_like_that_of_any_env(make: Make) -> None:
    env, local = make("CartPole-v1"), gymnasium.make("CartPole-v1")
    env.reset(seed=3)
    local.reset(seed=3)
    assert env.unwrapped.np_random.bit_generator.state == local.unwrapped.np_random.bit_generator.state
    saved = env.np_random
    first, second = env.reset()[0], env.reset()[0]
    assert first.tobytes() != second.tobytes()
    env.np_random = saved  # type: ignore[misc]  # of a property of gymnasium's too
    assert env.reset()[0].tobytes() == first.tobytes() == local.reset()[0].tobytes()


def test_what_is_set_outermost_is_set_on_the_wrapper(make: Make) -> None:
    env = make("CartPole-v1")
    env.gravity = 1.0
    assert env.get_wrapper_attr("gravity") == 1.0, "the wrapper is asked first"
    assert make("CartPole-v1").get_wrapper_attr("gravity") == 9.8
    env = make("CartPole-v1")
    env.set_wrapper_attr("gravity", 2.0)
    assert env.get_wrapper_attr("gravity") == 2.0


def test_its_spaces_are_those_of_the_env(make: Make) -> None:
    env, local = make("CartPole-v1"), gymnasium.make("CartPole-v1")
    assert (env.observation_space, env.action_space) == (local.observation_space, local.action_space)


def test_partials_and_classes_of_modules_are_made_in_processes(make: Make) -> None:
    assert make(partial(Counter, start=4)).reset()[0] == 4
    assert make(Counter, start=5).reset()[0] == 5


def test_exceptions_are_told_by_class_message_and_traceback(make: Make) -> None:
    env = make(Dangerous)
    env.reset()
    with pytest.raises(RaisedInside, match="no way on") as caught:
        env.step(Dangerous.RAISE)
    assert caught.value.kind == "ZeroDivisionError"
    assert "dangerous_envs.py" in caught.value.trace
    with pytest.raises(RaisedInside, match="__init__"):
        make(Dangerous, unknown=1)


def test_what_is_asked_after_the_end_is_an_error_and_close_is_not(make: Make) -> None:
    env = make(Counter)
    env.close()
    env.close()
    with pytest.raises(EndsSession) as caught:
        env.reset()
    assert type(caught.value.error) is EnvProcessDied


def test_process_that_breaks_the_protocol_is_ended(make: Make) -> None:
    env = make(Writes)
    pid = env.reset()[0]
    with pytest.raises(EndsSession) as caught:
        env.step(0)
    assert isinstance(caught.value.error, EnvError)
    env.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


class Writes(Counter):
    """Writes into whatever sockets it has, as a bug in native code may."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        return os.getpid(), {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        for fd in range(3, 64):
            try:
                os.write(fd, b"\xff" * 64)
            except OSError:
                continue
        return super().step(action)


def test_process_that_lets_go_of_its_channel_is_ended(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshrl.worker.child.END_S", 0.2)
    env = make(LetsGo)
    pid = env.reset()[0]
    with pytest.raises(EndsSession) as caught:
        env.step(0)
    assert caught.value.error.details["signal"] == "SIGKILL"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


class LetsGo(Writes):
    """Closes what is not its own, and lives on."""

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        os.closerange(3, 64)
        threading.Event().wait()
        return super().step(action)


def test_many_are_made_and_asked_at_once_by_many_threads(make: Make) -> None:
    told: list[Any] = []

    def play(n: int) -> None:
        env = make(Counter, start=n)
        env.reset()
        told.append((n, [env.step(0)[0] for _ in range(20)]))

    threads = [threading.Thread(target=play, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == [(n, list(range(n + 1, n + 21))) for n in range(16)]


def test_large_values_come_as_they_went(make: Make) -> None:
    env = make(Echo)
    for size in (0, 1, 65_400, 65_536, 3_000_000):
        sent = np.arange(size, dtype=np.uint8)
        assert env.step(sent)[0].tobytes() == sent.tobytes()


class Echo(Counter):
    """Observes its action."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return action, 0.0, False, False, {}


def test_nobody_is_left_after_the_stop_not_even_one_that_hangs() -> None:
    children = Children(Deadlines(60.0, 60.0), LIMITS)
    env = ProcessEnv.make(children, LIMITS, "env", picklable("env", Factory(Dangerous)), {}, None)
    pid = env.reset()[1]["pid"]
    raised: list[BaseException] = []

    def hang() -> None:
        try:
            env.step(Dangerous.HANG)
        except EndsSession as exc:
            raised.append(exc)

    hanging = threading.Thread(target=hang)
    hanging.start()
    children.stop()
    hanging.join(30.0)
    assert len(raised) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    env.close()
    with pytest.raises(EndsSession, match="no process could be started"):
        ProcessEnv.make(children, LIMITS, "env", picklable("env", Factory(Dangerous)), {}, None)


def test_what_cannot_be_pickled_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="maze: what makes it cannot be handed to a process"):
        picklable("maze", Factory(Counter, {"lock": threading.Lock()}))


def step_on(env: ProcessEnv) -> None:
    while True:
        env.step(0)


def test_signals_of_a_terminal_do_not_reach_the_processes(make: Make) -> None:
    env = make(Dangerous)
    pid = env.reset()[1]["pid"]
    assert os.getsid(pid) != os.getsid(0)
    assert os.getpgid(pid) == pid
    os.kill(pid, signal.SIGTERM)  # as of any program
    with pytest.raises(EndsSession) as caught:
        step_on(env)
    assert caught.value.error.details["signal"] == "SIGTERM"

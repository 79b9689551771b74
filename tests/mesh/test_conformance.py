"""The conformance suite over the bus: good envs pass all of it, each broken one fails the check that is about it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.context import context_of
from meshrl.client.mesh import Mesh
from meshrl.errors import EnvError, MeshFull, UnknownName, UsageError
from meshrl.testing import CHECKS, Report, Result, conformance
from meshrl.worker.env_worker import EnvWorker
from meshrl.worker.factories import EnvSource
from tests.mesh.gymnasium_ids import TAXI

Step = tuple[Any, Any, Any, Any, Any]


class Good(gymnasium.Env[Any, Any]):
    """A random walk of at most ten steps; the broken envs below differ from it in one thing each."""

    metadata = {"render_modes": ["rgb_array", "ansi", "human"]}  # as Gymnasium's own are

    def __init__(self, render_mode: str | None = None) -> None:
        self.observation_space: spaces.Space[Any] = spaces.Box(-20.0, 20.0, (2,), np.float32)
        self.action_space: spaces.Space[Any] = spaces.Discrete(2)
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        self.at = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.at = self.at + np.float32(1 if action else -1) + self.np_random.uniform(-0.1, 0.1, 2).astype(np.float32)
        return self.obs(), float(self.at[0]), False, self.steps >= 10, {"steps": self.steps}

    def obs(self) -> Any:
        return self.at

    def render(self) -> Any:
        return "text" if self.render_mode == "ansi" else np.zeros((3, 4, 3), np.uint8)


class WrongDtype(Good):
    def obs(self) -> Any:
        return self.at.astype(np.float64)


class LaterWrongDtype(Good):
    def obs(self) -> Any:
        return self.at.astype(np.float64) if self.steps > 3 else self.at


class NarrowerDtype(Good):
    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.observation_space = spaces.Box(-20.0, 20.0, (2,), np.float64)


class OutsideLater(Good):
    def obs(self) -> Any:
        return self.at + np.float32(100 * (self.steps == 5))


class Nondeterministic(Good):
    chance = np.random.default_rng()

    def step(self, action: Any) -> Any:
        self.at = self.at + self.chance.uniform(0, 0.1, 2).astype(np.float32)
        return super().step(action)


class Remembering(Good):
    """Its first episode differs from every later one with the same seed."""

    played = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.played += 1
        super().reset(seed=seed)
        self.at = self.at + np.float32(self.played)
        return self.obs(), {}


class ClockInInfo(Good):
    calls = 0

    def step(self, action: Any) -> Any:
        ClockInInfo.calls += 1
        *rest, info = super().step(action)
        return (*rest, {**info, "clock": ClockInInfo.calls})


class SeedIgnored(Good):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=5)


class Shared(Good):
    """Its state is the class's, so that two sessions tread on each other."""

    state: dict[str, Any] = {}  # the point of it

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(seed=seed)
        self.state["at"] = self.at
        return obs, info

    def step(self, action: Any) -> Any:
        self.at = self.state["at"]
        given = super().step(action)
        self.state["at"] = self.at
        return given


class RaisingInReset(Good):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        raise RuntimeError("the simulator did not start")


class RaisingInStep(Good):
    def step(self, action: Any) -> Any:
        if self.steps == 4:
            raise ZeroDivisionError("division by zero")
        return super().step(action)


class RaisingInRender(Good):
    def render(self) -> Any:
        raise gymnasium.error.DependencyNotInstalled("pygame is not installed")


class WrongFrame(Good):
    def render(self) -> Any:
        return "text" if self.render_mode == "ansi" else np.zeros((3, 4), np.float32)


class NanReward(Good):
    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return (obs, float("nan"), *rest)


class ArrayReward(Good):
    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return (obs, np.array([reward]), *rest)


class IntFlags(Good):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, int(terminated), int(truncated), info


class ObjectInInfo(Good):
    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        return (*rest, {**info, "env": self})


class InfoIsNone(Good):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=seed)[0], None


class StrangeFlags(Good):
    def step(self, action: Any) -> Any:
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, np.array([False, False]), truncated, info


class EndedForEver(Good):
    """Once ended, each first step ends it again."""

    ended = False

    def step(self, action: Any) -> Any:
        obs, reward, _, truncated, info = super().step(action)
        self.ended = self.ended or truncated
        return obs, reward, self.ended, truncated, info


class Endless(Good):
    def step(self, action: Any) -> Any:
        obs, reward, *_, info = super().step(action)
        return np.clip(obs, -20, 20), reward, False, False, info


class StrictOptions(Good):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if options:
            raise ValueError(f"unknown options {options}")
        return super().reset(seed=seed)


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start() as server:
        yield server


@asynccontextmanager
async def served(server: EmbeddedServer, env: EnvSource, slots: int = 4) -> AsyncIterator[Mesh]:
    async with EnvWorker({"tested": env}, server.url, slots=slots), Mesh(server.url) as mesh:
        yield mesh


async def report_of(server: EmbeddedServer, env: EnvSource, **options: Any) -> Report:
    async with served(server, env, slots=options.pop("slots", 4)) as mesh:
        return await conformance(mesh, "tested", **options)


def outcomes(report: Report, *expected: str) -> dict[str, str]:
    """The outcomes of the checks that did not pass, by name."""
    return {r.check: r.outcome for r in report.results if r.outcome != "passed" and r.outcome not in expected}


async def test_good_env_passes_every_check(server: EmbeddedServer) -> None:
    report = await report_of(server, Good)
    assert report.ok, str(report)
    assert outcomes(report) == {"exceptions": "skipped"}, str(report)
    assert [result.check for result in report.results] == [check.name for check in CHECKS]


async def test_env_that_refuses_options_passes_the_check_of_exceptions(server: EmbeddedServer) -> None:
    report = await report_of(server, StrictOptions)
    assert outcomes(report) == {}, str(report)


@pytest.mark.parametrize("name", ["CartPole-v1", "FrozenLake-v1", "Pendulum-v1", TAXI, "Blackjack-v1"])
async def test_gymnasiums_own_envs_conform(server: EmbeddedServer, name: str) -> None:
    report = await report_of(server, name, max_steps=60)
    assert report.ok, str(report)
    assert report.result("step").outcome == "passed"


@pytest.mark.parametrize(
    ("env", "check", "outcome", "says"),
    [
        (WrongDtype, "reset", "failed", "it has dtype float64, not float32"),
        (LaterWrongDtype, "observations", "failed", "step 4 of episode 1 is outside the observation space"),
        (NarrowerDtype, "observations", "warning", "dtype float32; the space says float64"),
        (OutsideLater, "observations", "failed", "the observation of step 5 of episode 1"),
        (Nondeterministic, "seeding", "failed", "observation of step 1 is"),
        (Remembering, "seeding again", "failed", "the observation of reset is"),
        (ClockInInfo, "seeding", "warning", "info['clock'] of step 1"),
        (SeedIgnored, "other seeds", "warning", "the seeds 0 and 1 give the same episode"),
        (SeedIgnored, "unseeded resets", "warning", "every reset gives the same observation"),
        (Shared, "independence", "failed", "is not the one that it is alone"),
        (RaisingInReset, "reset", "failed", "RuntimeError: the simulator did not start"),
        (RaisingInStep, "step", "failed", "ZeroDivisionError: division by zero"),
        (RaisingInRender, "render", "warning", "pygame is not installed"),
        (WrongFrame, "render", "failed", "render in the mode rgb_array gave array"),
        (NanReward, "rewards", "failed", "is nan"),
        (ArrayReward, "rewards", "failed", "(ndarray), not a number"),
        (IntFlags, "end flags", "failed", "terminated is 0 (int), not a bool"),
        (StrangeFlags, "step", "failed", "truth value of an array"),
        (InfoIsNone, "reset", "failed", "info"),
        (ObjectInInfo, "step", "failed", "env"),
        (EndedForEver, "end", "warning", "ended the episode again"),
        (Endless, "end", "skipped", "no episode ended within 30 steps"),
    ],
)
async def test_broken_env_fails_the_check_that_is_about_it(
    server: EmbeddedServer, env: type[Good], check: str, outcome: str, says: str
) -> None:
    report = await report_of(server, env, max_steps=30)
    result = report.result(check)
    assert result.outcome == outcome, str(report)
    assert says in result.found, str(report)
    before = report.results[: [each.name for each in CHECKS].index(check)]
    assert not [each for each in before if each.outcome == "failed"], str(report)


@pytest.mark.parametrize("slots", [1, 4])
async def test_env_whose_close_hangs_fails_the_check_of_close(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    monkeypatch.setattr("meshrl.testing.sessions.FREED_S", 1.0)
    hangs, released = threading.Event(), threading.Event()

    class HangingClose(Good):
        def __init__(self, render_mode: str | None = None) -> None:
            super().__init__(render_mode)
            self.hangs = hangs.is_set()  # by when it was made: one of an earlier check may be closing still

        def close(self) -> None:
            if self.hangs:
                released.wait()

    def note(result: Result) -> None:
        if result.check == CHECKS[-2].name:  # the one before: the others have their slots
            hangs.set()

    async with served(server, HangingClose, slots) as mesh:
        report = await conformance(mesh, "tested", on_result=note)
        released.set()
    assert [result.check for result in report.having("failed")] == ["close"], str(report)
    assert report.result("close").found == "the slot was not free again within 1 s"


async def test_env_whose_close_takes_its_time_passes(server: EmbeddedServer) -> None:
    class SlowClose(Good):
        def close(self) -> None:
            time.sleep(0.3)

    report = await report_of(server, SlowClose, slots=2)
    assert report.result("close").outcome == "passed", str(report)


async def test_slot_that_another_client_waits_for_is_not_held_against_the_env(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshrl.testing.sessions.FREED_S", 2.5)
    others: list[asyncio.Task[Any]] = []

    async with served(server, Good, slots=1) as mesh, Mesh(server.url) as theirs:

        def note(result: Result) -> None:
            if result.check == CHECKS[-2].name:
                others.extend(asyncio.create_task(theirs.env("tested", wait=60.0)) for _ in range(3))

        report = await conformance(mesh, "tested", wait=5.0, on_result=note)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    assert report.result("close").outcome in {"warning", "skipped"}, str(report)
    assert report.ok


async def test_checks_that_need_a_failed_one_are_skipped_and_say_so(server: EmbeddedServer) -> None:
    report = await report_of(server, RaisingInStep)
    assert {r.check for r in report.having("failed")} == {"step"}, str(report)
    assert report.result("seeding").found == "it needs the check 'step', which failed"
    assert report.result("independence").outcome == "skipped"
    assert report.result("close").outcome == "passed"


async def test_remote_traceback_stands_in_the_result(server: EmbeddedServer) -> None:
    traceback = (await report_of(server, RaisingInStep)).result("step").remote_traceback
    assert traceback is not None
    assert "in step" in traceback


async def test_one_slot_is_enough_but_for_the_check_of_two_sessions(server: EmbeddedServer) -> None:
    report = await report_of(server, Good, slots=1)
    assert report.ok, str(report)
    assert report.result("independence").outcome == "skipped"
    assert "no second slot" in report.result("independence").found


async def test_results_are_told_as_they_are_found(server: EmbeddedServer) -> None:
    told: list[Result] = []
    report = await report_of(server, Good, on_result=told.append)
    assert told == report.results


async def test_report_travels_as_json(server: EmbeddedServer) -> None:
    report = await report_of(server, WrongDtype)
    again = Report.model_validate_json(report.model_dump_json())
    assert again == report
    assert not again.ok
    assert '"ok":false' in report.model_dump_json()
    with pytest.raises(KeyError):
        report.result("no such check")


async def test_all_slots_are_free_afterwards(server: EmbeddedServer) -> None:
    async with (
        EnvWorker({"tested": RaisingInStep}, server.url, slots=4) as worker,
        Mesh(server.url) as mesh,
    ):
        await conformance(mesh, "tested")
        grants = [(await context_of(mesh).open("env", "tested", None, None, 10.0)).grant for _ in range(4)]
        assert grants[-1].load.free == 0
        assert worker.table.free == 0


async def test_name_that_nobody_serves_is_the_callers_error(server: EmbeddedServer) -> None:
    async with served(server, Good) as mesh:
        with pytest.raises(UnknownName, match="tested"):
            await conformance(mesh, "testes")


async def test_mesh_without_a_slot_is_an_error_and_no_passed_report(server: EmbeddedServer) -> None:
    async with served(server, Good, slots=1) as mesh:
        env = await mesh.env("tested")
        with pytest.raises(MeshFull):
            await conformance(mesh, "tested", wait=0.2)
        await env.close()


async def test_arguments_reach_the_constructor_or_are_refused(server: EmbeddedServer) -> None:
    report = await report_of(server, Good, kwargs={"size": 5})
    assert report.result("open").outcome == "failed"
    assert "allow_kwargs" in report.result("open").found
    worker = EnvWorker({"lake": "FrozenLake-v1"}, server.url, allow_kwargs=("map_name",))
    async with worker, Mesh(server.url) as mesh:
        report = await conformance(mesh, "lake", kwargs={"map_name": "8x8"})
    assert "Discrete(64)" in report.result("spaces").found


@pytest.mark.parametrize("options", [{"episodes": 0}, {"max_steps": 0}])
async def test_suite_without_a_step_is_refused(server: EmbeddedServer, options: dict[str, int]) -> None:
    async with served(server, Good) as mesh:
        with pytest.raises(UsageError, match="at least one episode"):
            await conformance(mesh, "tested", **options)  # type: ignore[arg-type]


async def test_constructor_that_raises_is_told_as_it_is(server: EmbeddedServer) -> None:
    class Unmade(Good):
        def __init__(self, render_mode: str | None = None) -> None:
            raise RuntimeError("no licence")

    with pytest.raises(EnvError, match="no licence"):
        await report_of(server, Unmade)

"""The client over a real server: what it gives back, whatever becomes of its caller, the server or the worker."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import numpy as np
import pytest
from gymnasium import spaces

import meshrl
from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.embedded import EmbeddedServer
from meshrl.client.context import context_of
from meshrl.client.keeper import Keeper
from meshrl.client.registry import MAX_REFUSALS, Registry
from meshrl.errors import (
    ConcurrentStep,
    LoginRefused,
    MalformedMessage,
    MeshFull,
    MeshUnreachable,
    NothingUnsettled,
    RequestTimeout,
    SessionClosed,
    StepUnsettled,
    UnknownName,
    UsageError,
)
from meshrl.wire import spaces as wire_spaces
from meshrl.wire.codec import pack
from meshrl.wire.messages import Advertisement, Ask, Description, Known, Renew, parse
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import DEADLINE_S, until
from tests.mesh.envs import Counter


class Odd(spaces.Discrete[Any]):
    """A space that can be written and, here, not be read."""


def unreadable(_description: dict[str, Any]) -> Odd:
    raise ValueError("not on this side")


wire_spaces.register("tests.odd", Odd, lambda _space: {}, unreadable)


class OddSpace(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = Odd(3)


class Flat(Counter):
    """Renders what is no picture."""

    metadata = {"render_modes": ["rgb_array"]}

    def render(self) -> Any:
        return np.zeros(4, np.uint8)


class Framed(Flat):
    """Renders one pixel."""

    def render(self) -> Any:
        return np.full((1, 1, 3), self.count, np.uint8)


class Gate:
    """Holds those who come while it is shut."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.waiting = 0

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_(self) -> None:
        self.waiting += 1
        assert self._open.wait(DEADLINE_S)
        self.waiting -= 1


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture(autouse=True)
def dummy_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def keepers() -> int:
    return sum(thread.name == "meshrl-keeper" for thread in threading.enumerate())


async def waiting(m: Mesh) -> dict[str, int]:
    return {advertised.worker: advertised.waiting for advertised in await m.envs()}


def slots_are_free(worker: EnvWorker | AgentWorker) -> bool:
    return worker.table.free == worker.table.slots


# ---------------------------------------------------------------- what is given back


async def test_a_mesh_that_is_left_by_a_cancelled_scope_gives_everything_back(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, lease_s=3600.0) as worker:
        mesh, before = Mesh(url), keepers()
        with anyio.CancelScope() as scope:
            async with mesh as m:
                env = await m.env("counter")
                await env.reset()
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert keepers() == before
        assert len(context_of(mesh)) == 0
        assert context_of(mesh).connection.raw.is_closed
        await until(lambda: slots_are_free(worker), "the slot is free")


async def test_a_mesh_whose_end_is_cancelled_again_and_again_gives_everything_back(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, lease_s=3600.0) as worker:
        mesh, before, inside = Mesh(url), keepers(), asyncio.Event()

        async def use() -> None:
            async with mesh as m:
                env = await m.env("counter")
                inside.set()
                await asyncio.Event().wait()
                await env.close()

        using = asyncio.create_task(use())
        await inside.wait()
        while not using.done():
            using.cancel()
            await asyncio.sleep(0)
        assert using.cancelled()
        assert keepers() == before
        assert context_of(mesh).connection.raw.is_closed
        await until(lambda: slots_are_free(worker), "the slot is free")


async def test_an_env_whose_spaces_cannot_be_rebuilt_leaves_no_lease(url: str) -> None:
    async with EnvWorker({"odd": OddSpace}, url, lease_s=3600.0) as worker, Mesh(url) as m:
        with pytest.raises(MalformedMessage, match="not on this side"):
            await m.env("odd")
        assert len(context_of(m)) == 0
        await until(lambda: slots_are_free(worker), "the slot is free")


async def test_an_agent_that_cannot_be_told_the_action_space_leaves_no_lease(url: str) -> None:
    class Remembers:
        def act(self, obs: Any) -> int:
            return 0

    class Nameless(spaces.Discrete[Any]):
        """A space that cannot be written."""

    async with (
        EnvWorker({"counter": Counter}, url),
        AgentWorker({"a": Remembers}, url, lease_s=3600.0) as worker,
        Mesh(url) as m,
        await m.env("counter") as env,
    ):
        env._action_space = Nameless(2)
        with pytest.raises(TypeError, match="Nameless"):
            await m.agent("a", stateful=True, env=env)
        assert len(context_of(m)) == 1
        await until(lambda: slots_are_free(worker), "the slot is free")


async def test_an_open_that_is_cancelled_at_any_moment_leaves_no_lease(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, slots=64, lease_s=3600.0) as worker, Mesh(url) as m:
        cancelled = 0
        for turns in range(40):
            opening = asyncio.create_task(m.env("counter"))
            for _ in range(turns):
                await asyncio.sleep(0.0001)
            cancelled += opening.cancel()
            await asyncio.wait({opening})
            if not opening.cancelled():
                await opening.result().close()
        assert cancelled > 0
        assert len(context_of(m)) == 0
        await until(lambda: slots_are_free(worker), "the slots are free")


async def test_an_env_that_is_dropped_frees_its_slot_and_warns(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, lease_s=3600.0) as worker, Mesh(url) as m:
        held = [await m.env("counter")]
        await held[0].reset()
        with pytest.warns(ResourceWarning, match="unclosed"):
            held.clear()
        gc.collect()
        await until(lambda: slots_are_free(worker), "the slot is free")
        assert len(context_of(m)) == 0


async def test_a_close_while_a_reset_drops_a_cancelled_step_ends_the_reset_as_closed(url: str, gate: Gate) -> None:
    class Gated(Counter):
        def step(self, action: int) -> Any:
            gate.pass_()
            return super().step(action)

    async with EnvWorker({"gated": Gated}, url) as worker, Mesh(url) as m:
        env = await m.env("gated")
        await env.reset()
        gate.shut()
        step = asyncio.create_task(env.step(0))
        await until(lambda: gate.waiting == 1, "it steps")
        step.cancel()
        await asyncio.wait({step})
        reset = asyncio.create_task(env.reset())
        await asyncio.sleep(0)
        close = asyncio.create_task(env.close())
        with pytest.raises(SessionClosed):
            await reset
        gate.open()
        await close
        await until(lambda: slots_are_free(worker), "the slot is free")


# ---------------------------------------------------------------- the server


async def test_an_outage_of_the_server_empties_no_directory_and_is_told(server: EmbeddedServer) -> None:
    async with connect(server.url) as peer, Mesh(server.url) as m:
        said = Advertisement(kind="env", name="counter", worker="w1", slots=1, free=1, interval_s=0.05, description="h")
        peer.publish(Subjects().advertisement("env", "counter", "w1"), said.to_wire())
        await until(lambda: len(context_of(m).registry.directory) == 1, "it is there")
        server.kill()
        await until(lambda: not context_of(m).connection.connected, "the server is away")
        with pytest.raises(MeshUnreachable, match="away"):
            await m.env("nobody serves this", wait=1.5)
        assert [ad.name for ad in await m.envs()] == ["counter"]
        with pytest.raises(MeshUnreachable, match="away"):
            await m.env("counter", wait=0.1)
        with pytest.raises(MeshUnreachable, match="away"):
            await m.env("counter", where={"gpu": True}, wait=0.1)
        with pytest.raises(MeshUnreachable, match="away"):
            await m.describe("counter", wait=0.1)


async def test_when_the_server_ends_the_connection_its_reason_is_told_and_the_watchers_end() -> None:
    with EmbeddedServer.start() as server:
        async with Mesh(server.url) as m:
            watching = asyncio.ensure_future(anext(aiter(m.watch())))
            await asyncio.sleep(0)
            config = server._home / "server.conf"
            changed = json.loads(config.read_text())
            changed["authorization"]["password"] = "another"
            config.write_text(json.dumps(changed))
            os.kill(server.pid, signal.SIGHUP)
            await until(lambda: context_of(m).connection.closed, "it is closed")
            with pytest.raises(LoginRefused):
                await watching
            for _ in range(2):
                with pytest.raises(LoginRefused) as raised:
                    await m.envs()
                assert len(raised.traceback) < 10


# ---------------------------------------------------------------- opening


async def test_a_constructor_that_runs_elsewhere_is_waited_for_when_the_queue_answers_full(
    url: str, gate: Gate
) -> None:
    class Slow(Counter):
        def __init__(self) -> None:
            gate.pass_()
            super().__init__()

    async with (
        EnvWorker({"slow": Slow}, url, slots=1) as one,
        EnvWorker({"slow": Slow}, url, slots=1) as two,
        Mesh(url) as m,
    ):
        envs = {env.worker: env for env in (await m.env("slow"), await m.env("slow"))}
        assert set(envs) == {one.id, two.id}
        gate.shut()
        opening = asyncio.create_task(m.env("slow", wait=4.0))

        async def parked() -> bool:
            return sum((await waiting(m)).values()) == 1

        await until(parked, "it is parked")
        free = next(worker for worker, count in (await waiting(m)).items() if not count)
        await envs[free].close()
        await until(lambda: gate.waiting == 1, "it is being constructed at the other")

        async def unparked() -> bool:
            return not any((await waiting(m)).values())

        await until(unparked, "the queue answered full")
        gate.open()
        async with await opening as env:
            assert env.worker == free
            assert (await env.reset())[0] == 0
        for left in envs.values():
            await left.close()


async def test_where_chooses_the_one_worker_that_has_the_capability(url: str) -> None:
    async with (
        EnvWorker({"counter": Counter}, url, slots=8, capabilities={"gpu": False}),
        EnvWorker({"counter": Counter}, url, slots=2, capabilities={"gpu": True, "games": ["pong"]}) as able,
        Mesh(url) as m,
    ):
        envs = [await m.env("counter", where={"gpu": True}), await m.env("counter", where={"games": "pong"})]
        assert [env.worker for env in envs] == [able.id] * 2
        with pytest.raises(MeshFull):
            await m.env("counter", where={"gpu": True}, wait=0.2)
        with pytest.raises(UnknownName, match="gpu"):
            await m.env("counter", where={"gpu": "two"}, wait=0.2)
        for env in envs:
            await env.close()


async def test_a_worker_that_never_describes_itself_is_a_timeout(url: str) -> None:
    async with connect(url) as peer, Mesh(url) as m:
        asked: list[Ask] = []
        await peer.subscribe(Subjects().ask, lambda _s, _r, body: asked.append(parse(Ask, body)))
        said = Advertisement(kind="env", name="mute", worker="w1", slots=1, free=1, interval_s=60.0, description="h")
        peer.publish(Subjects().advertisement("env", "mute", "w1"), said.to_wire())
        with pytest.raises(RequestTimeout, match="did not describe"):
            await m.describe("mute", wait=1.2)
        assert Ask(kind="env", name="mute") in asked


async def test_a_description_of_one_worker_says_nothing_of_another(url: str) -> None:
    async with connect(url) as peer:

        def answer(_subject: str, reply: str, _body: bytes) -> None:
            ads = [
                Advertisement(kind="env", name="a", worker=worker, slots=1, free=1, description="h")
                for worker in ("victim", "honest")
            ]
            descriptions = [Description(kind="env", name="a", worker="honest") for _ in ads]
            peer.publish(reply, Known(advertisements=ads, descriptions=descriptions).to_wire())

        await peer.subscribe(Subjects().ask, answer)
        async with Mesh(url) as m:
            assert [ad.worker for ad in await m.envs()] == ["honest"]


async def test_a_refusal_is_a_new_error_each_time(url: str) -> None:
    async with connect(url) as peer:

        def answer(_subject: str, reply: str, body: bytes) -> None:
            name = parse(Ask, body).name
            refusal = UsageError("no such module", asked=["env", name or ""])
            peer.publish(reply, pack({"error": refusal.to_wire()}))

        await peer.subscribe(Subjects().ask, answer)
        async with Mesh(url) as m:
            raised = []
            for _ in range(3):
                with pytest.raises(UsageError, match="no such module") as caught:
                    await m.env("module:Env")
                raised.append(caught.value)
            assert len(set(map(id, raised))) == 3
            registry = context_of(m).registry
            for n in range(2 * MAX_REFUSALS):
                registry._refused(UsageError("no", asked=["env", f"e{n}"]).to_wire())
            assert len(registry._refusals) == MAX_REFUSALS


# ---------------------------------------------------------------- the registry


async def test_an_advertisement_that_comes_before_the_subscription_is_through_is_asked_about(url: str) -> None:
    async with connect(url) as peer, connect(url) as own:
        asked: list[Ask] = []
        await peer.subscribe(Subjects().ask, lambda _s, _r, body: asked.append(parse(Ask, body)))
        registry = Registry(own, Subjects())
        listening = asyncio.create_task(registry.listen())
        await asyncio.sleep(0)  # it waits for the server to know of the subscription
        said = Advertisement(kind="env", name="e", worker="w1", slots=1, free=1, description="h")
        registry._on_advertisement(Subjects().advertisement("env", "e", "w1"), "", said.to_wire())
        await listening
        await until(lambda: Ask(worker="w1", name="e") in asked, "its description is asked for")
        registry.end()


async def test_workers_that_come_and_go_leave_nothing_in_a_client_that_stays(url: str) -> None:
    async with connect(url) as own:
        registry = Registry(own, Subjects())
        await registry.listen()
        for n in range(100):
            worker = f"w{n}"
            said = Advertisement(kind="env", name="e", worker=worker, slots=1, free=1, interval_s=0.1, description="h")
            subject = Subjects().advertisement("env", "e", worker)
            registry._on_advertisement(subject, "", said.to_wire())
            registry.placement.asked(worker, 0.0)
            registry.placement.granted(worker, 0.0)
            registry._on_advertisement(subject, "", said.model_copy(update={"left": True}).to_wire())
            registry.released(worker, 1)
        assert len(registry.directory) == 0
        assert registry.placement._own == {}
        await until(lambda: not registry._asked_about, "what was asked about is forgotten")
        registry.end()


async def test_a_session_that_outlives_its_workers_advertisement_leaves_nothing_behind(url: str) -> None:
    async with connect(url) as own:
        registry = Registry(own, Subjects())
        registry.placement.granted("w1", 0.0)  # of a worker whose goodbye came first
        registry.released("w1", 1)
        assert registry.placement._own == {}


# ---------------------------------------------------------------- human mode


async def test_who_steps_while_anothers_frame_is_fetched_is_told_of_the_concurrency(url: str, gate: Gate) -> None:
    class Gated(Framed):
        def render(self) -> Any:
            gate.pass_()
            return super().render()

    async with EnvWorker({"gated": Gated}, url) as _, Mesh(url) as m:
        async with await m.env("gated", render_mode="human") as env:
            await env.reset()
            gate.shut()
            step = asyncio.create_task(env.step(7))
            await until(lambda: gate.waiting == 1, "its frame is made")
            with pytest.raises(ConcurrentStep):
                await env.step(8)
            with pytest.raises(ConcurrentStep):
                await env.settle()
            gate.open()
            assert (await step)[:2] == (1, 7.0)
            with pytest.raises(NothingUnsettled):
                await env.settle()
            assert (await env.step(9))[0] == 2


async def test_a_step_and_a_reset_whose_frame_cannot_be_shown_are_kept(url: str) -> None:
    async with EnvWorker({"flat": Flat}, url) as _, Mesh(url) as m:
        async with await m.env("flat", render_mode="human") as env:
            with pytest.raises(UsageError, match="not height x width"):
                await env.reset()
            with pytest.raises(StepUnsettled):
                await env.step(1)
            assert (await env.settle())[0] == 0
            with pytest.raises(UsageError, match="not height x width"):
                await env.step(5)
            for refused in (lambda: env.step(1), lambda: env.call("add", 1), lambda: env.set_attr("label", "x")):
                with pytest.raises(StepUnsettled):
                    await refused()
            assert (await env.state()).steps == 1
            assert (await env.settle())[:2] == (1, 5.0)
            with pytest.raises(NothingUnsettled):
                await env.settle()


async def test_made_for_a_thread_too_a_step_whose_frame_cannot_be_shown_is_kept(url: str) -> None:
    def use() -> None:
        with meshrl.make("flat", mesh={"url": url}, render_mode="human") as env:
            with pytest.raises(UsageError, match="not height x width"):
                env.reset(seed=3)
            with pytest.raises(StepUnsettled):
                env.step(1)
            assert env.settle()[0] == 0
            assert env.np_random_seed == 3
            with pytest.raises(UsageError, match="not height x width"):
                env.step(5)
            with pytest.raises(StepUnsettled):
                env.step(1)
            assert env.settle()[:2] == (1, 5.0)
            with pytest.raises(NothingUnsettled):
                env.settle()

    async with EnvWorker({"flat": Flat}, url):
        await asyncio.to_thread(use)


async def test_rendering_without_a_mode_warns_as_gymnasium_does(url: str) -> None:
    def use() -> None:
        with meshrl.make("framed", mesh={"url": url}) as env:
            env.reset()
            with pytest.warns(UserWarning, match="render_mode"):
                assert env.render() is None

    async with EnvWorker({"framed": Framed}, url):
        await asyncio.to_thread(use)


# ---------------------------------------------------------------- renewing


class Stumbles(Keeper):
    """Finds no more file descriptors, at first."""

    attempts = 0

    async def _main(self) -> None:
        self.attempts += 1
        if self.attempts == 1:
            raise OSError(24, "Too many open files")
        await super()._main()


async def test_a_keeper_that_meets_an_error_nobody_thought_of_renews_again(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(url) as peer:
        renewed: list[Renew] = []
        await peer.subscribe(
            Subjects().at_worker("w1", "renew"), lambda _s, _r, body: renewed.append(parse(Renew, body))
        )
        keeper = Stumbles(url, None, Subjects(), lambda _session, _reason: None)
        keeper.hold("w1", "s1", 1, 15.0)
        await until(lambda: bool(renewed), "the lease is renewed")
        await keeper.stop()
        assert renewed[0].sessions == [("s1", 1)]
        assert "Too many open files" in caplog.text


# ---------------------------------------------------------------- agents


async def sendings(peer: Connection, subject: str) -> list[str]:
    """Reply subjects of what is sent there."""
    replies: list[str] = []
    await peer.subscribe(subject, lambda _s, reply, _b: replies.append(reply))
    return replies


async def test_an_act_that_is_not_answered_is_sent_again_ever_more_rarely_to_the_same_reply_subject(
    url: str, gate: Gate
) -> None:
    def act(obs: Any) -> int:
        gate.pass_()
        return 0

    async with AgentWorker({"slow": act}, url), connect(url) as peer, Mesh(url, timeout=1.5) as m:
        agent = await m.agent("slow")
        gate.shut()
        replies = await sendings(peer, Subjects().any_act("slow", context_of(m).connection.user))
        with pytest.raises(RequestTimeout):
            await agent.act(0)
        assert len(replies) == 2, "at once, after 0.5 s, and not after 1 s"
        assert len(set(replies)) == 1


async def test_a_large_act_is_sent_again_to_another_worker(url: str, gate: Gate) -> None:
    gate.shut()

    def never(obs: Any) -> str:
        gate.pass_()
        return "the one that is stuck"

    big = np.zeros(5_000_000, np.uint8)  # more than one message, so that the client chooses the worker
    async with (
        AgentWorker({"mean": never}, url, slots=8),
        AgentWorker({"mean": lambda obs: "the other"}, url, slots=4),
        Mesh(url, timeout=9.0) as m,
    ):

        async def both() -> bool:
            return len(await m.agents()) == 2

        await until(both, "both are there")
        assert await (await m.agent("mean")).act(big) == "the other"
        assert gate.waiting == 1
        gate.open()


async def test_an_agents_spaces_are_built_once(url: str) -> None:
    class Declares:
        observation_space = spaces.Box(-1, 1, (3,), np.float32)
        action_space = spaces.Discrete(2)

        def act(self, obs: Any) -> int:
            return 0

    async with AgentWorker({"a": Declares()}, url), Mesh(url) as m:
        agent = await m.agent("a")
        assert agent.action_space is agent.action_space
        assert agent.observation_space is agent.observation_space


# ---------------------------------------------------------------- evaluating


async def test_evaluate_goes_on_with_the_slots_there_are(url: str, gate: Gate) -> None:
    gate.shut()

    def act(obs: Any) -> int:
        gate.pass_()
        return 0

    async with (
        EnvWorker({"cartpole": "CartPole-v1"}, url, slots=1),
        AgentWorker({"gated": act}, url),
        Mesh(url) as m,
    ):
        running = asyncio.create_task(m.evaluate("cartpole", "gated", episodes=4, concurrency=3, wait=1.5))

        async def parked(count: int) -> bool:
            return sum((await waiting(m)).values()) == count

        await until(lambda: parked(2), "two runners are parked")
        await until(lambda: parked(0), "they were told that it is full")
        gate.open()
        report = await running
        assert [episode.seed for episode in report.episodes] == [0, 1, 2, 3]


async def test_evaluate_where_no_slot_is_free_says_so(url: str) -> None:
    async with (
        EnvWorker({"cartpole": "CartPole-v1"}, url, slots=1),
        AgentWorker({"zero": lambda obs: 0}, url),
        Mesh(url) as m,
        await m.env("cartpole"),
    ):
        with pytest.raises(MeshFull):
            await m.evaluate("cartpole", "zero", episodes=4, concurrency=2, wait=0.2)


async def test_evaluate_needs_no_more_slots_of_a_stateful_agent_than_there_are(url: str) -> None:
    class Remembers:
        def act(self, obs: Any) -> int:
            return 0

    async with (
        EnvWorker({"cartpole": "CartPole-v1"}, url, slots=4),
        AgentWorker({"a": Remembers}, url, slots=1),
        Mesh(url) as m,
    ):
        report = await m.evaluate("cartpole", "a", episodes=6, concurrency=3, wait=0.2)
        assert len(report.episodes) == 6


# ---------------------------------------------------------------- the interface


def test_the_public_names_of_a_mesh_are_the_api() -> None:
    public = {name for name in dir(Mesh()) if not name.startswith("_")}
    assert public == {
        *("agent", "agents", "describe", "env", "envs", "evaluate", "pool", "vector", "watch"),
        *("episode", "episodes", "experience", "experiment", "fork", "frames", "replay", "tap", "verify"),
    }


async def test_a_mesh_that_was_not_entered_or_was_closed_says_so(url: str) -> None:
    mesh = Mesh(url)
    with pytest.raises(UsageError, match="async with"):
        await mesh.envs()
    async with mesh as m:
        assert await m.envs() == []
    with pytest.raises(SessionClosed, match="this Mesh was closed"):
        await mesh.envs()
    with pytest.raises(SessionClosed):
        mesh.watch()

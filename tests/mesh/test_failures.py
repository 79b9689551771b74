"""Each failure ends in a typed error that says what and how to mend it, and the worker goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from meshrl import Credentials, EnvWorker, Factory, Mesh, RemoteEnv
from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.errors import (
    EnvError,
    InvalidAction,
    KwargsNotAllowed,
    LoginRefused,
    MalformedMessage,
    MeshError,
    MeshUnreachable,
    MessageTooLarge,
    SessionExpired,
    SessionLost,
    SessionUnknown,
    UnencodableValue,
    UnknownName,
    UnsupportedVersion,
    UsageError,
    from_wire,
)
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Close, Grant, Open, parse
from meshrl.wire.subjects import Subjects
from tests.mesh.conftest import until
from tests.mesh.envs import Breaks, Counter, Picture

SUBJECTS = Subjects()


async def test_an_unknown_env_names_near_matches(url: str) -> None:
    async with EnvWorker({"cartpole": "CartPole-v1", "counter": Counter}, url), Mesh(url) as m:
        with pytest.raises(UnknownName, match="did you mean cartpole") as caught:
            await m.env("cartpol", wait=0.1)
        assert isinstance(caught.value, LookupError)
        assert caught.value.details["near"] == ["cartpole"]
        with pytest.raises(UnknownName, match="served are: cartpole, counter"):
            await m.env("zzz", wait=0.1)


async def test_a_mesh_without_a_worker_says_so(url: str) -> None:
    async with Mesh(url) as m:
        assert await m.envs() == []
        with pytest.raises(UnknownName, match="no worker is on the mesh"):
            await m.env("cartpole", wait=0.2)


async def test_capabilities_that_nobody_has_are_named(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, capabilities={"gpu": False, "maps": ["a", "b"]}), Mesh(url) as m:
        with pytest.raises(UnknownName, match="gpu"):
            await m.env("counter", where={"gpu": True}, wait=0.2)
        async with await m.env("counter", where={"maps": "b", "gpu": False}) as env:
            assert (await env.reset())[0] == 0


async def test_kwargs_are_refused_unless_the_operator_allows_them(url: str) -> None:
    async with EnvWorker({"counter": Factory(Counter, {"start": 5})}, url, allow_kwargs=("slow_s",)), Mesh(url) as m:
        with pytest.raises(KwargsNotAllowed, match="start") as caught:
            await m.env("counter", {"start": 1, "slow_s": 0.0})
        assert caught.value.details["refused"] == ["start"]
        async with await m.env("counter", {"slow_s": 0.0}) as env:
            assert (await env.reset())[0] == 5, "the operator's own arguments hold"


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("MountainCarContinuous-v0", np.zeros(2, np.float32)),
        ("MountainCarContinuous-v0", np.zeros((1, 1), np.float32)),
        ("MountainCarContinuous-v0", np.array(["a"])),
        ("MountainCarContinuous-v0", {"a": 1}),
        ("MountainCarContinuous-v0", None),
        ("CartPole-v1", 2),
        ("CartPole-v1", np.int64(-1)),
        ("CartPole-v1", np.array([0, 1])),
        ("CartPole-v1", 1.0),
    ],
)
async def test_an_action_of_wrong_shape_structure_dtype_or_range_is_refused(url: str, name: str, action: Any) -> None:
    async with EnvWorker({name: name}, url), Mesh(url) as m, await m.env(name) as env:
        await env.reset(seed=0)
        with pytest.raises(InvalidAction, match=name):
            await env.step(action)
        await env.step(env.action_space.sample())
        assert (await env.state()).steps == 1


async def test_a_box_is_bounded_only_when_asked_for(url: str) -> None:
    async with EnvWorker({"car": "MountainCarContinuous-v0"}, url), Mesh(url) as m:
        async with await m.env("car") as env, await m.env("car", check_actions="strict") as strict:
            await env.reset(seed=0)
            await env.step(np.array([1.0000001], np.float64))
            await strict.reset(seed=0)
            with pytest.raises(InvalidAction, match="bounds"):
                await strict.step(np.array([1.5], np.float32))


@pytest.mark.parametrize("at", ["constructor", "reset", "step", "exit"])
async def test_an_env_that_raises_gives_its_traceback_and_the_worker_goes_on(url: str, at: str) -> None:
    async with EnvWorker({"breaks": Breaks}, url, allow_kwargs=("at",)) as worker, Mesh(url) as m:
        env: RemoteEnv | None = None

        async def use() -> None:
            nonlocal env
            env = await m.env("breaks", {"at": at})
            await env.reset()
            await env.step(0)

        with pytest.raises(EnvError) as caught:
            await use()
        error = caught.value
        assert error.details["type"] == ("SystemExit" if at == "exit" else "RuntimeError")
        assert error.remote_traceback is not None
        assert "tests/mesh/envs.py" in error.remote_traceback
        assert (env is None) == (at == "constructor")
        if env is not None:
            with pytest.raises(SessionLost, match="raised"):
                await env.step(0)
        async with await m.env("breaks") as healthy:
            await healthy.reset()
            await healthy.step(1)
        assert worker.table.slots == 64


async def test_a_value_that_cannot_travel_is_named_by_its_path(url: str) -> None:
    async with EnvWorker({"breaks": Breaks}, url, allow_kwargs=("at",)), Mesh(url) as m:
        async with await m.env("breaks", {"at": "unencodable"}) as env:
            await env.reset()
            with pytest.raises(UnencodableValue, match="thing"):
                await env.step(0)
            assert (await env.reset())[0] == 0
            with pytest.raises(UnencodableValue):
                await env.reset(options={"x": object()})
            assert (await env.reset())[0] == 0, "what could not be sent took no turn"


async def test_render_without_a_mode_says_how(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url), Mesh(url) as m, await m.env("counter") as env:
        await env.reset()
        with pytest.raises(UsageError, match="render_mode"):
            await env.render()


async def test_something_that_cannot_be_made_is_the_operators_error_at_the_start(url: str) -> None:
    with pytest.raises(EnvError, match="no simulator here"):
        async with EnvWorker({"breaks": Factory(Breaks, {"at": "constructor"})}, url):
            pass
    with pytest.raises(MeshError, match="nonsense"):
        EnvWorker({"x": "nonsense"}, url)
    with pytest.raises(ValueError, match="at least one"):
        EnvWorker({}, url)


# --------------------------------------------------------------------------- on the wire


@asynccontextmanager
async def raw_session(url: str, **options: Any) -> AsyncIterator[tuple[EnvWorker, Connection, Grant]]:
    """A worker, a bare connection, and a session opened by hand."""
    async with EnvWorker({"counter": Counter}, url, **options) as worker, connect(url) as raw:
        subject = SUBJECTS.worker(worker.id, "open", raw.user)
        answer = await raw.ask(subject, Open(session="s1", name="counter").to_wire(), 5.0)
        assert answer is not None
        yield worker, raw, parse(Grant, answer)


async def ask(raw: Connection, grant: Grant, op: str, body: dict[str, Any], session: str = "s1") -> dict[str, Any]:
    subject = SUBJECTS.session(grant.worker, raw.user, session, op)
    answer = await raw.ask(subject, pack(body), 5.0)
    assert answer is not None
    reply = unpack(answer)
    assert isinstance(reply, dict)
    return reply


async def test_the_same_seq_again_returns_the_same_reply_and_runs_nothing(url: str) -> None:
    async with raw_session(url) as (_, raw, grant):
        request = {"epoch": 1, "lane": 0, "seq": 1}
        await ask(raw, grant, "reset", request)
        step = {"epoch": 1, "lane": 0, "seq": 2, "action": 4}
        first = await ask(raw, grant, "step", step)
        assert first["obs"] == 1
        assert await ask(raw, grant, "step", step) == first
        assert (await ask(raw, grant, "step", {**step, "seq": 3}))["obs"] == 2
        assert (await ask(raw, grant, "step", step))["error"]["code"] == "stale_request"
        assert (await ask(raw, grant, "step", {**step, "seq": 5}))["error"]["code"] == "sequence_gap"
        assert (await ask(raw, grant, "step", {**step, "seq": 4, "epoch": 2}))["error"]["code"] == "wrong_epoch"
        assert (await ask(raw, grant, "step", {**step, "seq": 4, "lane": 1}))["error"]["code"] == "malformed_message"
        assert (await ask(raw, grant, "nonsense", {**step, "seq": 4}))["error"]["code"] == "malformed_message"
        assert (await ask(raw, grant, "step", {**step, "seq": 5}))["obs"] == 3, "errors take a seq as well"


async def test_an_open_of_a_higher_epoch_replaces_the_session_and_a_lower_one_is_refused(url: str) -> None:
    async with raw_session(url) as (worker, raw, grant):
        await ask(raw, grant, "reset", {"epoch": 1, "lane": 0, "seq": 1})
        subject = SUBJECTS.worker(worker.id, "open", raw.user)
        answer = await raw.ask(subject, Open(session="s1", epoch=2, name="counter").to_wire(), 5.0)
        assert answer is not None
        assert parse(Grant, answer).epoch == 2
        stale = await ask(raw, grant, "step", {"epoch": 1, "lane": 0, "seq": 2, "action": 0})
        assert stale["error"]["code"] == "wrong_epoch"
        assert (await ask(raw, grant, "reset", {"epoch": 2, "lane": 0, "seq": 1}))["obs"] == 0
        answer = await raw.ask(subject, Open(session="s1", epoch=1, name="counter").to_wire(), 5.0)
        assert answer is not None
        assert unpack(answer)["error"]["code"] == "wrong_epoch"
        assert len(worker.table) == 1


async def test_a_late_open_of_a_session_that_is_gone_is_refused_also_when_its_turn_comes_from_the_queue(
    url: str,
) -> None:
    async with raw_session(url, slots=1) as (worker, raw, grant):
        await ask(raw, grant, "reset", {"epoch": 1, "lane": 0, "seq": 1})
        subject = SUBJECTS.worker(worker.id, "open", raw.user)

        def open_(session: str) -> bytes:
            return Open(session=session, name="counter", park_s=20.0).to_wire()

        async def close(session: str) -> None:
            closed = SUBJECTS.session(worker.id, raw.user, session, "close")
            assert await raw.ask(closed, Close(epoch=1).to_wire(), 5.0)

        await close("s1")
        assert await raw.ask(subject, open_("s2"), 5.0)
        await ask(raw, grant, "reset", {"epoch": 1, "lane": 0, "seq": 1}, session="s2")
        first = asyncio.create_task(raw.ask(subject, open_("s3"), 20.0))
        await until(lambda: worker.waiting_count() == 1, "s3 waits")
        late = asyncio.create_task(raw.ask(subject, open_("s1"), 20.0))
        await raw.flush()
        await close("s2")
        answer = await first
        assert answer is not None
        assert parse(Grant, answer).session == "s3"
        await close("s3")
        answer = await late
        assert answer is not None
        assert unpack(answer)["error"]["code"] == "wrong_epoch"
        await until(lambda: worker.table.free == 1, "nothing is left behind")


async def test_a_reply_over_every_limit_is_an_error_and_not_silence(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshrl.worker.execution.MAX_MESSAGE_BYTES", 100_000)
    async with EnvWorker({"picture": Picture}, url), Mesh(url) as m:
        async with await m.env("picture") as env:
            with pytest.raises(MessageTooLarge, match="smaller"):
                await env.reset()
            assert (await env.state()).episode == 1


async def test_a_session_of_another_user_is_unknown(url: str) -> None:
    async with raw_session(url) as (_, raw, grant):
        subject = SUBJECTS.session(grant.worker, "mallory", "s1", "reset")
        answer = await raw.ask(subject, pack({"epoch": 1, "lane": 0, "seq": 1}), 5.0)
        assert answer is not None
        error = from_wire(unpack(answer)["error"])
        assert isinstance(error, SessionUnknown)
        reply = await ask(raw, grant, "reset", {"epoch": 1, "lane": 0, "seq": 1}, session="s2")
        assert isinstance(from_wire(reply["error"]), SessionUnknown)


async def test_an_env_error_can_be_had_again_after_its_session_ended(url: str) -> None:
    async with EnvWorker({"breaks": Factory(Breaks, {"at": "step"})}, url) as worker, connect(url) as raw:
        subject = SUBJECTS.worker(worker.id, "open", raw.user)
        answer = await raw.ask(subject, Open(session="s1", name="breaks").to_wire(), 5.0)
        assert answer is not None
        grant = parse(Grant, answer)
        await ask(raw, grant, "reset", {"epoch": 1, "lane": 0, "seq": 1})
        step = {"epoch": 1, "lane": 0, "seq": 2, "action": 0}
        first = await ask(raw, grant, "step", step)
        assert first["error"]["code"] == "env_error"
        assert await ask(raw, grant, "step", step) == first
        assert (await ask(raw, grant, "step", {**step, "seq": 3}))["error"]["code"] == "session_unknown"


async def test_an_expired_session_becomes_session_lost_for_the_user(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url) as worker, Mesh(url) as m:
        env = await m.env("counter", on_loss="raise")
        await env.reset()

        def overdue() -> bool:
            for session in worker.table:  # as after fifteen seconds without a renewal
                session.lease_until = 0.0
            return worker.table.free == 64

        await until(overdue, "the sweep ends it")
        with pytest.raises(SessionLost, match="lease ran out") as caught:
            await env.step(1)
        assert caught.value.details["reason"] == "session_expired"
        assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, SessionExpired)


async def test_another_major_version_is_refused_by_name(url: str) -> None:
    async with EnvWorker({"counter": Counter}, url) as worker, connect(url) as raw:
        subject = SUBJECTS.worker(worker.id, "open", raw.user)
        answer = await raw.ask(subject, pack({"v": 2, "session": "s1", "name": "counter"}), 5.0)
        assert answer is not None
        error = from_wire(unpack(answer)["error"])
        assert isinstance(error, UnsupportedVersion)
        assert "version 2" in str(error)
        assert "version 1" in str(error)


async def test_a_malformed_advertisement_disturbs_no_client(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with EnvWorker({"counter": Counter}, url), connect(url) as raw:
        with caplog.at_level(logging.CRITICAL):
            async with Mesh(url) as m:
                for body in (b"", b"\xc1", b"\x80", pack({"v": 9}), pack([1]), b"\x96\x00\x00"):
                    raw.publish(SUBJECTS.advertisement("env", "counter", "evil"), body)
                await raw.flush()
                async with await m.env("counter") as env:
                    assert (await env.reset())[0] == 0
                assert [ad.name for ad in await m.envs()] == ["counter"]


# --------------------------------------------------------------------------- the way to the mesh


async def test_no_server_at_the_address_is_mesh_unreachable() -> None:
    with pytest.raises(MeshUnreachable, match="meshrl up") as caught:
        async with Mesh("nats://127.0.0.1:9", timeout=0.5):
            pass
    assert isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize("login", ["url", "credentials"])
async def test_a_wrong_password_is_login_refused_and_does_not_show_it(url: str, login: str) -> None:
    host = url.rpartition("@")[2]
    wrong = Credentials.model_validate({"user": "embedded", "password": "secret-nonsense"})
    mesh = (
        Mesh(f"nats://embedded:secret-nonsense@{host}") if login == "url" else Mesh(f"nats://{host}", credentials=wrong)
    )
    with pytest.raises(LoginRefused, match="embedded") as caught:
        async with mesh:
            pass
    assert "nonsense" not in str(caught.value)
    assert "nonsense" not in repr(wrong)


async def test_a_login_by_credentials_is_the_same_as_one_in_the_url(url: str) -> None:
    _, _, rest = url.partition("://")
    userinfo, _, host = rest.rpartition("@")
    user, _, password = userinfo.partition(":")
    good = Credentials.model_validate({"user": user, "password": password})
    async with EnvWorker({"counter": Counter}, f"nats://{host}", credentials=good), Mesh(url) as m:
        async with await m.env("counter") as env:
            assert (await env.reset())[0] == 0


@pytest.mark.parametrize("bad", ["", "nats://", "://x"])
def test_an_address_that_is_none_is_refused(bad: str) -> None:
    async def enter() -> None:
        async with Mesh(bad or " "):
            pass

    with pytest.raises(MeshError):
        asyncio.run(enter())


@pytest.mark.parametrize("other", [{"session": "another"}, {"epoch": 2}, {"epoch": 1 << 40}, {"worker": "another"}])
async def test_a_grant_of_something_else_than_was_asked_for_is_refused(
    url: str, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Connection.publish

    def published(self: Connection, subject: str, body: bytes, reply: str = "", **kwargs: Any) -> None:
        if b"grant_s" in body:
            body = pack({**unpack(body), **other})
        publish(self, subject, body, reply, **kwargs)

    async with EnvWorker({"granted": Counter}, url) as worker, Mesh(url) as m:
        with monkeypatch.context() as patched:
            patched.setattr(Connection, "publish", published)
            with pytest.raises(MalformedMessage, match="was asked for session"):
                await m.env("granted")
        await until(lambda: worker.table.free == worker.table.slots, "its slot is free again")
        async with await m.env("granted") as env:
            assert (await env.reset(seed=1))[0] == 0

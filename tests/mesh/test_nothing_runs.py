"""What a client sends is data: no module is imported for it, nothing of it is evaluated, unpickled or called.

Here, over a real server, with a worker that serves on demand to strangers; the corpus of hostile messages
(tests/contract/test_hostile.py) does the same below, on every subject.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gymnasium
import msgpack
import pytest

from meshrl import AgentWorker, EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.errors import KwargsNotAllowed, MeshError, NotAllowed, UnknownName, from_wire
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Ask, Open
from meshrl.wire.subjects import Subjects
from meshrl.worker.policies import random_policy
from tests.mesh.envs import Counter

AT = Subjects()
# Importing it is seen, and so is calling anything in it.
TRAP = """
import pathlib
import gymnasium

def sprung(*_, **__):
    pathlib.Path({marker!r}).touch()
    return 0

sprung()

class Env(gymnasium.Env):
    __init__ = sprung

gymnasium.register("Trap-v0", entry_point=Env)
"""


class Payload:
    """A pickle of it runs code wherever it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is there once the trap has sprung."""
    made = tmp_path / "sprung"
    (tmp_path / "trap.py").write_text(TRAP.format(marker=str(made)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trap", raising=False)
    return made


def sprung(marker: Path) -> bool:
    return marker.exists()


def test_the_trap_springs_where_it_is_imported(marker: Path) -> None:
    import importlib

    try:
        importlib.import_module("trap")
        assert sprung(marker)
    finally:
        sys.modules.pop("trap", None)
        gymnasium.registry.pop("Trap-v0", None)


NAMES = ["trap:Trap-v0", "trap:Env", "trap:sprung", "trap", "os:system", "__import__('trap')", "../trap", "{trap}"]


@pytest.mark.parametrize("name", NAMES)
async def test_no_name_that_a_client_asks_for_imports_anything(name: str, url: str, marker: Path) -> None:
    async with (
        EnvWorker({"counter": Counter}, url, on_demand=True, allow_kwargs=("*",), allow=("*",)) as worker,
        AgentWorker({"random": random_policy}, url) as agents,
        connect(url) as bus,
    ):
        for subject, body in (
            (AT.ask, Ask(kind="env", name=name).to_wire()),
            (AT.worker(worker.id, "open", bus.user), Open(session="s", name=name).to_wire()),
            (AT.worker(agents.id, "open", bus.user), Open(session="s", name=name, kind="agent").to_wire()),
            (AT.worker(agents.id, "act", bus.user), pack({"name": name, "obs": 1})),
        ):
            answer = await bus.ask(subject, body, 30.0)
            assert answer is not None
            error = from_wire(unpack(answer)["error"])
            assert error.code in {"unknown_name", "malformed_message"}
    assert "trap" not in sys.modules
    assert not sprung(marker)


async def test_a_worker_serves_the_names_that_its_operator_gave_it_and_no_other_of_gymnasiums(url: str) -> None:
    async with (
        EnvWorker({"counter": Counter, "cartpole": "CartPole-v1"}, url) as worker,
        connect(url) as bus,
    ):
        for name in ("CartPole-v1", "Acrobot-v1", "Counter", "cartpole ", "CARTPOLE", "counter:"):
            body = Open(session="s", name=name).to_wire()
            answer = await bus.ask(AT.worker(worker.id, "open", bus.user), body, 30.0)
            with pytest.raises(UnknownName):
                raise from_wire(unpack(answer or b"")["error"])
        assert len(worker.table) == 0


@pytest.mark.parametrize(
    "kwargs", [{"slow_s": 0.0}, {"start": 1, "slow_s": 0.0}, {"self": 1}, {"__class__": 1}, {"": 1}]
)
async def test_kwargs_are_those_that_the_operator_allows(kwargs: dict[str, Any], url: str) -> None:
    async with EnvWorker({"counter": Counter}, url, allow_kwargs=("start",)) as worker, Mesh(url) as mesh:
        with pytest.raises(KwargsNotAllowed) as refused:
            await mesh.env("counter", kwargs)
        assert refused.value.details["refused"] == sorted(set(kwargs) - {"start"})
        assert len(worker.table) == 0
        await (await mesh.env("counter", {"start": 1})).close()


def pickled(value: object) -> dict[str, Any]:
    """As msgpack-numpy sends an array of objects: whoever reads it with that package runs it."""
    return {"nd": True, "type": "|O", "kind": "O", "shape": [1], "data": pickle.dumps([value])}


async def test_a_pickle_is_run_nowhere_in_what_a_session_takes(url: str, marker: Path) -> None:
    payload = pickled(Payload(marker))
    async with (
        EnvWorker({"counter": Counter}, url, allow_kwargs=("*",), allow=("*",)) as worker,
        AgentWorker({"random": random_policy}, url) as agents,
        connect(url) as bus,
    ):
        subject = AT.worker(worker.id, "open", bus.user)
        refused = await bus.ask(
            subject, _packed({"session": "s", "name": "counter", "kwargs": {"start": payload}}), 30.0
        )
        assert unpack(refused or b"")["error"]["code"] == "malformed_message"
        assert await bus.ask(subject, Open(session="s", name="counter").to_wire(), 30.0) is not None
        requests: list[tuple[str, dict[str, Any]]] = [
            ("reset", {"options": {"x": payload}}),
            ("step", {"action": payload}),
            ("call", {"name": "add", "args": [payload]}),
            ("set_attr", {"name": "label", "value": payload}),
            ("replay", {"journal": [["reset", payload]], "digest": b""}),
        ]
        for op, fields in requests:
            asked = _packed({"epoch": 1, "lane": 0, "seq": 1, **fields})
            answer = await bus.ask(AT.session(worker.id, bus.user, "s", op), asked, 30.0)
            assert unpack(answer or b"")["error"]["code"] == "malformed_message"
        for subject in (AT.any_act("random", bus.user), AT.worker(agents.id, "act", bus.user)):
            answer = await bus.ask(subject, _packed({"name": "random", "obs": payload}), 30.0)
            assert unpack(answer or b"")["error"]["code"] == "malformed_message"
    assert not sprung(marker)
    pickle.loads(payload["data"])  # to be sure that it would have been seen
    assert sprung(marker)


def _packed(body: dict[str, Any]) -> bytes:
    return bytes(msgpack.packb(body))


async def test_no_name_of_an_attribute_or_class_reaches_what_is_not_the_envs_own(url: str, marker: Path) -> None:
    async with EnvWorker({"counter": Counter}, url, allow=("*",)), Mesh(url) as mesh:
        env = await mesh.env("counter")
        await env.reset()
        names = [
            "__class__",
            "__init__",
            "__reduce__",
            "_np_random",
            "count.__class__",
            "add.__globals__",
            "trap:sprung",
            "",
        ]
        asks: list[Callable[[str], Awaitable[object]]] = [
            env.get_attr,
            env.call,
            lambda name: env.set_attr(name, 1),
        ]
        for name in names:
            for ask in asks:
                with pytest.raises(MeshError) as refused:
                    await ask(name)
                assert isinstance(refused.value, NotAllowed) or refused.value.code in {"malformed_message", "usage"}
        vector = await mesh.vector("counter", 2)
        await vector.reset()
        wrapper = type("Env", (gymnasium.Wrapper,), {"__module__": "trap"})
        assert await vector.is_wrapped(wrapper) == (False, False)
        assert (await env.step(2))[:2] == (1, 2.0), "the session goes on"
    assert "trap" not in sys.modules
    assert not sprung(marker)

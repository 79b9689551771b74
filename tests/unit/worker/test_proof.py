"""What goes with answers so that a session can be resumed, and that a client counts as a worker does (R8)."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from meshrl.client.recovery import Recovery
from meshrl.client.shard_recovery import ShardRecovery
from meshrl.protocol.journals import Journals
from meshrl.wire.batches import batching
from meshrl.wire.codec import pack, unpack
from meshrl.wire.messages import Open
from meshrl.worker.hosted import HostedEnv
from meshrl.worker.hosted_pool import HostedPool
from meshrl.worker.hosted_vector import HostedVector
from meshrl.worker.proof import HASHED_BYTES, bytes_of
from meshrl.worker.threads import Threads
from tests.mesh.resumed_envs import Labelled, Pictures, Unresumable

THREADS = Threads("test")
NAMES = ["CartPole-v1", "FrozenLake-v1", "Blackjack-v1", "Pendulum-v1"]


def opened(form: str, digests: str, count: int) -> Open:
    return Open.model_validate({"session": "s", "name": "x", "form": form, "digests": digests, "num_envs": count})


def hosted(env: Any, digests: str) -> HostedEnv:
    kwargs: dict[str, Any] = {"resumable": digests != "none", "digests": digests == "all"}
    return HostedEnv(env, name="x", session="s", worker="w", allow=["*"], threads=THREADS, **kwargs)


def arrived(frame: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """An answer as a client gets it, and its fields."""
    data = pack(frame)
    return data, unpack(data)


# --------------------------------------------------------------------------- counted by either


@pytest.mark.parametrize("name", NAMES)
def test_of_an_env(name: str) -> None:
    env = gymnasium.make(name)
    env.action_space.seed(1)
    worker = hosted(env, "all")
    client = Recovery(None, "env", "x", None, {}, 1.0, resumes=True)  # type: ignore[arg-type]  # nothing is opened
    ended, counted = True, 0
    for n in range(300):
        op = "reset" if ended else "step"
        body = {"seed": 7 if n == 0 else None} if ended else {"action": env.action_space.sample()}
        data, frame = arrived(worker.run(op, body))
        said = frame.pop("digest")
        client.note(op, pack(body), data, frame, 0.0)
        if n % 17 == 0 or ended:
            assert client.journal.digest == said
            counted += 1
        ended = bool(frame.get("terminated") or frame.get("truncated"))
    assert counted > 17
    assert not client.journal.lacking


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("name", NAMES)
def test_of_a_vector(name: str, mode: str) -> None:
    envs = [gymnasium.make(name) for _ in range(3)]
    space = envs[0].action_space
    space.seed(1)
    open_ = opened("vector", "all", 3).model_copy(update={"autoreset_mode": mode})
    worker = HostedVector(envs, open_, allow=["*"], threads=THREADS)
    aside = Journals(3, batching(envs[0].observation_space))
    says = ShardRecovery(None, "env", "x", None, {}, 1.0, resumes=True, journal=aside)  # type: ignore[arg-type]
    journal = Journals(3, batching(envs[0].observation_space))
    client = ShardRecovery(None, "env", "x", None, {}, 1.0, resumes=True, journal=journal)  # type: ignore[arg-type]

    def ask(op: str, body: dict[str, Any]) -> dict[str, Any]:
        before = journal.fields()["digests"].tolist() if len(journal) % 13 == 1 else None
        data, frame = arrived(worker.run(op, body))
        assert worker.counts is not None
        if len(journal) % 7:  # else the next request has it counted
            worker.counts()
        says.note(op, pack(body), data, frame, 0.0)
        said = frame.pop("digests")
        client.note(op, pack(body), data, frame, 0.0)
        assert before is None or said.tolist() == before, "those of all before it"
        if len(journal) % 13 == 1 or "origins" in frame or op == "reset":
            assert aside.fields()["digests"].tolist() == journal.fields()["digests"].tolist()
        return frame

    ask("reset", {"seeds": [1, 2, 3]})
    for _ in range(500):
        actions = batching(space).stack([space.sample() for _ in envs])
        frame = ask("step", {"actions": actions})
        if mode == "Disabled":
            ask("reset", {"mask": frame["terminations"] | frame["truncations"]})
    assert not journal.lacking
    assert len(journal) < 450, "two hundred steps, and an episode"


def test_of_a_pool() -> None:
    envs = [gymnasium.make("CartPole-v1") for _ in range(4)]
    worker = HostedPool(envs, opened("pool", "all", 4), threads=THREADS)
    journal, says = (Journals(4, batching(envs[0].observation_space)) for _ in range(2))
    chance = np.random.default_rng(3)
    for n in range(400):
        lanes = np.arange(4) if n == 0 else chance.permutation(4)[: chance.integers(1, 5)]
        op = "step" if n else "reset"
        body: dict[str, Any] = {"actions": chance.integers(2, size=len(lanes))} if n else {"seeds": [1, 2, 3, 4]}
        given = worker.check(op, lanes, body)
        before = journal.fields()["digests"][lanes].tolist() if n % 7 == 0 else None
        data, frame = arrived({**worker.run(op, lanes, given)[0], "lanes": lanes, "seqs": lanes + 1})
        assert before is None or frame["digests"].tolist() == before, "those of all before it"
        origins = frame.get("origins", [])
        told = [(int(lanes[row]), origin) for row, origin in zip(origins[::2], origins[1::2], strict=True)]
        # A row that was heard before, or is none of this request's, is told to nobody.
        half = len(lanes) // 2 if n % 5 == 4 else 0
        parts = [np.arange(half), np.arange(half, len(lanes))] if half else [np.arange(len(lanes))]
        at, says_at = journal.asked(op, pack(body)), says.asked(op, pack(body))
        for rows in parts:
            own = [(lane, origin) for lane, origin in told if lane in lanes[rows]]
            journal.told((at, data, op, lanes[rows], rows), own)
            says.told((says_at, data, op, lanes[rows], rows), own, frame["digests"][rows])
        if n % 5 == 0:
            assert says.fields()["digests"].tolist() == journal.fields()["digests"].tolist()
    assert not journal.lacking
    assert len(journal) < 400


def test_what_of_a_pools_batch_cannot_be_told_costs_the_others_no_digest() -> None:
    envs = [Labelled() for _ in range(3)]
    worker = HostedPool(envs, opened("pool", "large", 3), threads=THREADS)
    journal, lanes = Journals(3, batching(envs[0].observation_space)), np.arange(3)

    def ask(op: str, body: dict[str, Any], *heard: int) -> Any:
        """Its digests; the client hears these alone, each by itself, or all of them."""
        frame, alone = worker.run(op, lanes, worker.check(op, lanes, body))
        assert worker.counts is not None
        at = journal.asked(op, pack(body))
        for own in [np.array([lane]) for lane in heard] or [lanes]:
            data, told = arrived({**(alone(int(own[0])) if heard else frame), "lanes": own, "seqs": own})
            origins = told.get("origins", [])
            began = [(int(own[row]), origin) for row, origin in zip(origins[::2], origins[1::2], strict=True)]
            journal.told((at, data, op, own, np.arange(len(own))), began, told["digests"])
        worker.counts()
        return frame["digests"]

    ask("reset", {"seeds": [1, 2, 3]})
    ask("step", {"actions": np.array([0, 0, 0])})
    ask("step", {"actions": np.array([0, 1, 0])}, 0, 2)
    counted = journal.fields()["digests"].tolist()
    assert ask("step", {"actions": np.array([0, 0, 0])})[[0, 2]].tolist() == [counted[0], counted[2]]


# --------------------------------------------------------------------------- who counts


@pytest.mark.parametrize(("digests", "small", "large"), [("none", 0, 0), ("large", 0, 1), ("all", 1, 1)])
def test_large_observations_are_counted_where_they_are_made(digests: str, small: int, large: int) -> None:
    for env, said in ((gymnasium.make("CartPole-v1"), small), (Pictures(), large)):
        vector = HostedVector([env], opened("vector", digests, 1), allow=(), threads=THREADS)
        assert ("digests" in vector.run("reset", {"seeds": [1]})) == bool(said)
        assert ("digests" in vector.run("step", {"actions": np.array([1])})) == bool(said)


@pytest.mark.parametrize("digests", ["large", "all"])
def test_of_an_env_that_cannot_be_resumed_nothing_is_told(digests: str) -> None:
    assert hosted(Unresumable(), digests).run("reset", {"seed": 1}).keys() == {"obs", "info"}
    vector = HostedVector([Unresumable()], opened("vector", digests, 1), allow=(), threads=THREADS)
    assert vector.run("reset", {"seeds": [1]}).keys() == {"obs"}


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (spaces.Box(0, 255, (84, 84, 4), np.uint8), 84 * 84 * 4),
        (spaces.Box(-1, 1, (17,), np.float64), 17 * 8),
        (spaces.Discrete(5), 0),
        (spaces.Dict({"a": spaces.Box(0, 1, (3,)), "b": spaces.Tuple((spaces.MultiBinary(8), spaces.Text(9)))}), 20),
        (spaces.Sequence(spaces.Box(0, 1, (999,))), 0),
    ],
    ids=str,
)
def test_how_large_an_observation_is(space: spaces.Space[Any], size: int) -> None:
    assert bytes_of(space) == size
    assert bytes_of(Pictures().observation_space) >= HASHED_BYTES

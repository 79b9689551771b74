"""Recordings where things fail: steps go on, what could not be kept is counted, and the rest can be read."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import zstandard
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from meshrl import EnvWorker, Mesh
from meshrl.bus.connect import connect
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.storing import Reader, store
from meshrl.bus.streams import make_stream
from meshrl.errors import (
    EnvError,
    EpisodeTorn,
    EpisodeUnknown,
    NotRecorded,
    RequestTimeout,
    TransportError,
    UnencodableValue,
)
from meshrl.protocol.chunks import Chunk, pack_chunk, read_chunk
from meshrl.recording import chain
from meshrl.recording.messages import is_description
from meshrl.recording.streams import EPISODES, MAX_BYTES, Retention, make_streams, stream_of
from meshrl.wire.codec import pack, unpack
from meshrl.wire.compressed import compress, decompress
from meshrl.wire.recorded import Entry
from meshrl.wire.subjects import Subjects
from meshrl.worker import strict
from meshrl.worker.recording import Recording
from tests.mesh.conftest import until
from tests.mesh.envs import Counter
from tests.mesh.own_server import own_server
from tests.mesh.recordings import drive, drive_vector, listed, listed_in_the_end
from tests.mesh.test_recordings import same_as

AT = Subjects()


async def js(url: str, api: str, body: dict[str, Any]) -> dict[str, Any]:
    async with connect(url) as connection:
        answer = await connection.ask(f"$JS.API.{api}", json.dumps(body).encode(), 10.0)
    told: dict[str, Any] = json.loads(answer or b"{}")
    assert "error" not in told, told
    return told


async def test_a_stream_that_is_deleted_while_it_is_written_is_made_again(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url) as worker, Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            session = env.session_id
            await drive(env, 2, 1)
            await until(lambda: worker.recorded.recorded > 0, "some of it is stored")
            await js(url, f"STREAM.DELETE.{stream_of(AT, 'of')}", {})
            told = await drive(env, 3, 2)
        found = {one.episode_id: one async for one in m.episodes("of")}
        await until(lambda: worker.recorded.recorded > sum(len(one.obs) for one in told), "the rest is stored")
        found = {one.episode_id: one async for one in m.episodes("of")}
        assert {f"{session}.0.{n}" for n in range(2, 5)} <= found.keys()
        for n, one in enumerate(told, 2):
            same_as(one, await m.episode(f"{session}.0.{n}"))
        with pytest.raises(EpisodeTorn):
            await m.episode(f"{session}.0.0")


async def test_a_server_that_comes_back_has_all_of_it(server: EmbeddedServer) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, server.url) as worker, Mesh(server.url) as m:
        async with await m.env("of", record="full") as env:
            told = await drive(env, 2, 1)
            await until(lambda: worker.recorded.recorded > 0, "some of it is stored")
            await asyncio.to_thread(server.restart)
            told += await drive(env, 2, 2)
        for one, summary in zip(told, await listed(m, "of", 4), strict=True):
            same_as(one, await m.episode(summary.episode_id))
        assert worker.recorded.lost == 0


async def test_what_does_not_fit_is_counted_and_no_step_fails(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with connect(url) as connection:
        small = {"subjects": [AT.recording("of", "*")], "max_bytes": 20_000, "discard": "new", "allow_direct": True}
        await make_stream(connection, stream_of(AT, "of"), small)
    async with EnvWorker({"of": "CartPole-v1"}, url) as worker, Mesh(url) as m:
        async with await m.vector("of", 64, record="full", shards=1) as envs:
            await envs.reset(seed=1)
            for _ in range(60):
                for n in range(20):
                    await envs.step(np.full(64, n % 2))
                if worker.recorded.lost:
                    break
                await asyncio.sleep(0.2)
            steps = 64 * 21
            for n in range(20):
                await envs.step(np.full(64, n % 2))
        assert worker.recorded.lost >= steps // 64
        assert "maximum bytes" in worker.recorded.why
        assert [record for record in caplog.records if "is not recorded" in record.getMessage()]


class Screens(gymnasium.Env[Any, Any]):
    """100 KB a step."""

    observation_space = spaces.Box(0, 255, (210, 160, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros((210, 160, 3), np.uint8), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.full((210, 160, 3), action, np.uint8), 0.0, False, False, {}


async def test_a_session_that_begins_with_much_loses_nothing_of_it(url: str) -> None:
    """More than may wait is noted before the recorder, which sleeps, would look whether there are new sessions."""
    async with EnvWorker({"screens": Screens}, url, record="full") as worker, Mesh(url) as m:
        for _ in range(3):
            async with await m.vector("screens", 8, shards=1) as envs:
                await envs.reset(seed=1)
                for n in range(150):  # 120 MB
                    await envs.step(np.full(8, n % 2))
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.3)  # until it sleeps again
        assert worker.recorded.lost == 0, worker.recorded.why


@pytest.mark.parametrize("asked", [True, False])
async def test_without_jetstream_nothing_is_recorded_and_it_is_said_to_who_asked(
    tmp_path: Path, asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with own_server(tmp_path, {}) as server:
        url = server.url()
        async with (
            EnvWorker({"of": "CartPole-v1"}, url, record="actions" if asked else None) as worker,
            Mesh(url) as m,
        ):
            async with await m.env("of") as env:
                await drive(env, 2, 1)
            await until(lambda: worker.recorded.lost > 0, "it is counted")
            assert "JetStream" in worker.recorded.why
            said = [record for record in caplog.records if "is not recorded" in record.getMessage()]
            assert bool(said) == asked
            assert [one async for one in m.episodes()] == []
            with pytest.raises(EpisodeUnknown):
                await m.episode("abc.0.0")


async def test_where_a_server_cannot_set_much_aside_less_is_kept(tmp_path: Path) -> None:
    config = {"jetstream": {"store_dir": str(tmp_path / "js"), "max_file_store": 300_000_000}}
    async with own_server(tmp_path, config) as server:
        url = server.url()
        async with EnvWorker(dict.fromkeys("abc", "CartPole-v1"), url) as worker, Mesh(url) as m:
            for name in "abc":
                async with await m.env(name) as env:
                    told = await drive(env, 1, 1)
                (one,) = await listed(m, name, 1)
                assert one.steps == len(told[0].rewards)
            assert worker.recorded.lost == 0
            sizes = [(await js(url, f"STREAM.INFO.{stream_of(AT, name)}", {}))["config"]["max_bytes"] for name in "abc"]
            assert all(1 << 20 <= size < MAX_BYTES for size in sizes), sizes
        with pytest.raises(TransportError, match="insufficient"):  # what an operator asks for is had, or refused
            async with connect(url) as connection:
                await make_streams(connection, AT, "d", Retention())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of six megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a disk")
async def test_on_a_full_disk_steps_go_on_and_when_there_is_room_again_all_of_it_is_stored(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JetStream says nothing then, and so it is as if it were away."""
    monkeypatch.setattr(strict, "STORED_S", 2.0)
    config = {"jetstream": {"store_dir": str(small_disk), "max_file_store": 1 << 32}}
    async with own_server(tmp_path, config) as server:
        url = server.url()
        async with EnvWorker({"of": "CartPole-v1"}, url, record="full", slots=70) as worker, Mesh(url) as m:
            async with await m.env("of") as env:
                told = await drive(env, 2, 1)
            first = await listed(m, "of", 2)
            (small_disk / "of somebody else").write_bytes(bytes(free_on(small_disk) - 200_000))
            stored, count = worker.recorded.recorded, 0
            async with await m.vector("of", 64, shards=1) as envs:
                await envs.reset(seed=1)
                for n in range(600):
                    await envs.step(np.full(64, n % 2))
                    count += 64
                await asyncio.sleep(1.2)
                await envs.step(np.zeros(64, np.int64))
                assert worker.recorded.recorded < stored + count
                env = await m.env("of", record="strict")
                with pytest.raises(NotRecorded, match="within 2 s"):
                    await env.reset()
                (small_disk / "of somebody else").unlink()
                await server.kill()
                await server.start()
                await envs.step(np.zeros(64, np.int64))
            rows = stored + 64 * 603 + 1
            await until(lambda: worker.recorded.recorded >= rows, "all of it is stored")
            assert worker.recorded.lost == 0
            for one, summary in zip(told, first, strict=True):
                same_as(one, await m.episode(summary.episode_id))


def free_on(disk: Path) -> int:
    told = os.statvfs(disk)
    return told.f_bavail * told.f_frsize


def version_two(chunk: bytes) -> bytes:
    return compress(pack({**unpack(decompress(chunk, 1 << 24)), "v": 2}))


def shorter(chunk: bytes) -> bytes:
    body = unpack(decompress(chunk, 1 << 24))
    return compress(pack({**body, "rewards": body["rewards"][:-1]}))


def other_space(chunk: bytes) -> bytes:
    body = unpack(decompress(chunk, 1 << 24))
    return compress(pack({**body, "observations": np.zeros((len(body["rewards"]), 5), np.float32)}))


BROKEN = {
    "noise": lambda chunk: bytes(range(256)) * 4,
    "cut": lambda chunk: chunk[: len(chunk) // 2],
    "a bit": lambda chunk: chunk[:40] + bytes([chunk[40] ^ 1]) + chunk[41:],
    "empty": lambda chunk: b"",
    "another version": version_two,
    "a column that is too short": shorter,
    "observations of another space": other_space,
    "a bomb": lambda chunk: zstandard.ZstdCompressor().compress(b"\0" * (1 << 28)),
    "a list": lambda chunk: compress(pack([1, 2])),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_chunk_that_is_broken_costs_its_own_episodes_alone(url: str, how: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            good = env.session_id
            told = await drive(env, 2, 1)
        await listed(m, "of", 2)
        await copied(url, good, "broken", BROKEN[how])
        found = [one async for one in m.episodes("of")]
        assert [one.episode_id for one in found] == [f"{name}.0.{n}" for name in (good, "broken") for n in range(2)]
        for n, one in enumerate(told):
            same_as(one, await m.episode(f"{good}.0.{n}"))
            with pytest.raises(EpisodeTorn, match=f"broken.0.{n} cannot be read"):
                await m.episode(f"broken.0.{n}")
        feed = m.experience("of", follow=False)
        assert sum([len(batch) async for batch in feed]) == sum(len(one.rewards) for one in told)
        assert feed.skipped == 2


async def copied(url: str, session: str, new: str, change: Any) -> None:
    """The recording of a session once more, as another's, with its chunks changed."""
    async with connect(url) as connection, Reader(connection, 5.0) as reader:
        at = 0
        described = 0
        async for stored in reader.get(stream_of(AT, "of"), AT.recording("of", session)):
            body = stored.body if is_description(stored) else change(stored.body)
            mark = "d" if is_description(stored) else ""
            at = await store(connection, AT.recording("of", new), body, 5.0, message_id=f"{new}:1:{at}{mark}")
            described = described or at
        async for stored in reader.get(EPISODES, AT.episodes("of", session)):
            entry = Entry.from_stream(stored.body)
            moved = entry.model_copy(
                update={
                    "session": new,
                    "described": described,
                    "after": described,
                    "first": entry.first * 0 + described,
                }
            )
            await store(connection, AT.episodes("of", new), moved.to_stream(), 5.0, message_id=f"{new}:{stored.seq}")


async def tampered(url: str, change: Any, level: Any = "actions") -> str:
    def changed(body: bytes) -> bytes:
        chunk = read_chunk(body)
        fields = {name: getattr(chunk, name) for name in Chunk.__slots__}
        return pack_chunk(Chunk(**{**fields, **change(chunk)}))

    async with EnvWorker({"of": "CartPole-v1"}, url), Mesh(url) as m:
        async with await m.env("of", record=level) as env:
            good = env.session_id
            await drive(env, 1, 1)
        await listed(m, "of", 1)
        await copied(url, good, "changed", changed)
        verdict = await m.verify("changed.0.0")
        assert verdict.status == "diverged"
        assert (await m.verify(f"{good}.0.0")).status == "exact"
        return f"{verdict.field} of step {verdict.step}"


def with_changed(values: Any, at: int | tuple[int, int], value: Any) -> Any:
    other = values.copy()
    other[at] = value
    return other


async def test_what_was_tampered_with_is_named(url: str) -> None:
    reward = await tampered(url, lambda chunk: {"rewards": with_changed(chunk.rewards, 5, 2.0)})
    assert reward == "reward of step 5"


async def test_a_flag_that_was_tampered_with_is_named(url: str) -> None:
    flag = await tampered(url, lambda chunk: {"truncations": with_changed(chunk.truncations, len(chunk) - 1, True)})
    assert flag.startswith("truncated of step ")


async def test_an_action_that_was_tampered_with_is_found_where_it_tells(url: str) -> None:
    def other(chunk: Chunk) -> dict[str, Any]:
        actions = chunk.actions.values
        return {"actions": type(chunk.actions)("batch", with_changed(actions, 3, 1 - actions[3]))}

    assert await tampered(url, other) == "observation of step 4"


async def test_a_digest_that_was_tampered_with_is_found(url: str) -> None:
    digest = await tampered(url, lambda chunk: {"digests": with_changed(chunk.digests, 2, 1)})
    assert digest == "observation of step 2"


async def test_however_little_was_changed_it_is_not_taken_for_another_processors_rounding(url: str) -> None:
    def nudged(chunk: Chunk) -> dict[str, Any]:
        observations = chunk.observations
        assert observations is not None
        values = with_changed(observations.values, (6, 2), np.nextafter(observations.values[6, 2], np.float32(1)))
        return {"observations": type(observations)("batch", values)}

    assert await tampered(url, nudged, "full") == "observation of step 6"


async def test_a_word_of_the_server_that_is_lost_costs_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = []

    async def forgetful(*args: Any, **kwargs: Any) -> int:
        number = await store(*args, **kwargs)
        stored.append(number)
        if len(stored) % 2:
            raise RequestTimeout("no word of it")
        return number

    monkeypatch.setattr(chain, "store", forgetful)
    async with EnvWorker({"of": "CartPole-v1"}, url) as worker, Mesh(url) as m:
        async with await m.env("of", record="full") as env:
            told = await drive(env, 2, 1)
            await asyncio.sleep(1.2)
            told += await drive(env, 2, 2)
        for one, summary in zip(told, await listed(m, "of", 4), strict=True):
            same_as(one, await m.episode(summary.episode_id))
        kept = sum(len(one.obs) for one in told)
        await until(lambda: worker.recorded.recorded == kept, "all of it is known to be stored")
        assert worker.recorded.lost == 0
        assert len(stored) > 2


async def test_what_comes_while_a_chunk_is_stored_waits_for_the_next(url: str) -> None:
    steps = 0
    async with EnvWorker({"of": Counter}, url), Mesh(url) as m:
        async with await m.env("of", record="actions") as env:
            session = env.session_id
            await env.reset(seed=1)
            began = asyncio.get_running_loop().time()
            while (passed := asyncio.get_running_loop().time() - began) < 2.2:
                await env.step(1)
                steps += 1
                await asyncio.sleep(0.001)
        await listed(m, "of", 1)
        async with connect(url) as connection, Reader(connection, 5.0) as reader:
            stored = [one async for one in reader.get(stream_of(AT, "of"), AT.recording("of", session))]
        assert 2 <= len(stored) <= passed + 3 < steps, "a description, a chunk a second, and what the close leaves"


class Unspeakable(Counter):
    """Its infos cannot travel at times."""

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        obs, reward, _, _, _ = super().step(action)
        return obs, reward, obs >= 6, False, {"odd": object()} if obs == 3 else {"even": obs}


@pytest.mark.parametrize("kind", ["single", "vector"])
async def test_an_info_that_cannot_travel_is_left_out_and_its_step_is_not(url: str, kind: str) -> None:
    async with EnvWorker({"of": Unspeakable}, url) as worker, Mesh(url) as m:
        remote: Any = await (m.env("of", record="full") if kind == "single" else m.vector("of", 2, record="full"))
        async with remote:
            await remote.reset(seed=1)
            for n in range(6):
                try:
                    await remote.step(1 if kind == "single" else np.ones(2, np.int64))
                except UnencodableValue:
                    assert n == 2
        found = await listed(m, "of", 1 if kind == "single" else 2)
        for one in found:
            episode = await m.episode(one.episode_id)
            assert np.asarray(episode.observations).tolist() == list(range(7))
            assert [info.get("even") for info in episode.infos[1:]] == [1, 2, None, 4, 5, 6]
        assert worker.recorded.lost == 0


async def test_an_env_of_which_no_recording_can_be_made_is_refused_and_leaves_no_slot_taken(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise OSError("the disk with its levels is gone")

    async with EnvWorker({"of": Counter}, url, slots=1, record="full"), Mesh(url) as m:
        with monkeypatch.context() as patch:
            patch.setattr(Recording, "of_envs", breaks)
            with pytest.raises(EnvError, match="its levels"):
                await m.env("of", wait=5)
        async with await m.env("of", wait=5) as env:
            await drive(env, 1, 1, max_steps=2)
        await listed(m, "of", 1)


class Wide(gymnasium.Env[Any, Any]):
    """Observations of which a hundred are a large message and one is small, always in the same array."""

    observation_space = spaces.Box(-1, 1, (210,), np.float32)
    action_space = spaces.Discrete(2)
    metadata = {"outlives_reset": "generator"}

    def __init__(self) -> None:
        self._shown = np.zeros(210, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._next(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        shown = self._next()
        return shown, float(shown[0]), bool(shown[1] > 0.8), False, {}

    def _next(self) -> Any:
        self._shown[:] = self.np_random.uniform(-1, 1, 210)
        return self._shown


@pytest.mark.parametrize("level", ["actions", "full"])
async def test_large_batches_of_small_observations_are_recorded_as_they_were(url: str, level: Any) -> None:
    async with EnvWorker({"of": Wide}, url, slots=128) as worker, Mesh(url) as m:
        async with await m.vector("of", 100, record=level, shards=1) as envs:
            await envs.reset(seed=1)
            for _ in range(30):
                await envs.step(np.zeros(100, np.int64))
            await until(lambda: worker.recorded.recorded > 0, "some of it is stored before the end")
        found = await listed_in_the_end(m, "of", 100)
        for one in found[::31]:
            assert (await m.verify(one.episode_id)).status == "exact"


class Snow(gymnasium.Env[Any, Any]):
    """Black pictures, and after ten of them such as no compression makes any smaller; an episode has fifteen."""

    observation_space = spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = spaces.Discrete(2)
    metadata = {"outlives_reset": "generator"}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._next(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return self._next(), 1.0, self.count == 15, False, {"count": self.count}

    def _next(self) -> Any:
        snows = self.count >= 10
        return self.np_random.integers(0, 256, (96, 96, 3), np.uint8) if snows else np.zeros((96, 96, 3), np.uint8)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, None])
async def test_what_is_too_much_for_a_message_is_stored_in_several(url: str, mode: AutoresetMode | None) -> None:
    async with EnvWorker({"of": Snow}, url, slots=64) as worker, Mesh(url) as m:
        if mode is None:
            async with await m.env("of", record="full") as env:
                await drive(env, 60, 1)
            found = await listed(m, "of", 60)
        else:
            async with await m.vector("of", 64, record="full", shards=1, autoreset_mode=mode) as envs:
                told = await drive_vector(envs, 36, 1)
                assert len(told) == 128
            found = await listed_in_the_end(m, "of", 128)
        assert worker.recorded.lost == 0
        for one in [one for one in found if one.reason == "terminated"][::9]:
            episode = await m.episode(one.episode_id)
            assert episode.rewards.tolist() == [1.0] * 15
            assert [info["count"] for info in episode.infos[1:]] == list(range(1, 16))
            assert (await m.verify(one.episode_id)).status == "exact"


async def test_an_episode_that_is_reset_into_one_that_is_not_recorded_is_listed(url: str) -> None:
    async with EnvWorker({"of": "CartPole-v1"}, url) as worker, Mesh(url) as m:
        async with await m.env("of", record="actions", record_every=2) as env:
            await env.reset(seed=1)
            await env.step(0)
            await until(lambda: worker.recorded.recorded == 2, "it is stored")
            await env.reset(seed=2)
            (found,) = await listed(m, "of", 1)
            assert (found.steps, found.reason) == (1, "reset")
            assert await m.verify(found.episode_id)

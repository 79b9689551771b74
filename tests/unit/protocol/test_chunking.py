"""What is noted of lanes comes back from chunks: row by row as if each had been written down by hand."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.spaces import GraphInstance

from meshrl.protocol.chunking import Chunker, Ended
from meshrl.protocol.chunks import Chunk, pack_chunk, read_chunk
from meshrl.protocol.digests import Digests
from meshrl.protocol.joined import Noted, halves
from meshrl.protocol.runs import REASONS
from meshrl.protocol.transcript import Level, Transcript
from meshrl.protocol.values import own
from meshrl.wire.batches import batching
from meshrl.wire.large import Rows

OBS = spaces.Box(-1, 1, (3,), np.float32)
ACTIONS = spaces.Discrete(5)
DEEP = spaces.Dict({"a": OBS, "b": spaces.Tuple([spaces.Discrete(3), spaces.Text(4)])})


def transcript(count: int, level: Level = "full", space: Any = OBS, *, at_once: bool = False) -> Transcript:
    return Transcript(count, batching(space), batching(ACTIONS), level, at_once, row_bytes=64)


class Lanes:
    """Lanes that do anything, and what a recording of them should hold, written down row by row."""

    def __init__(self, noted: Transcript, mode: str, seed: int, space: Any = OBS) -> None:
        self.noted = noted
        self.mode = mode
        self.space = space
        space.seed(seed)
        self.rng = np.random.default_rng(seed)
        self.rows: list[list[dict[str, Any]]] = [[] for _ in range(noted.count)]
        self.ended: list[tuple[int, int, int, float, str]] = []
        self.number = [-1] * noted.count
        self.over = [True] * noted.count
        self.resets = 0

    def reset(self, ids: list[int]) -> None:
        obs = [self._begin(i, int(self.rng.integers(100))) for i in ids]
        lanes = None if len(ids) == self.noted.count and self.mode != "pool" else np.array(ids, np.int64)
        infos = [(k, self.rows[i][-1]["info"]) for k, i in enumerate(ids) if self.rows[i][-1]["info"]]
        zeros = np.zeros(len(ids))
        flags = zeros.astype(np.bool_)
        self._note(lanes, None, obs, zeros, flags, flags, infos)

    def step(self, ids: list[int]) -> None:
        actions = self.rng.integers(0, 5, len(ids))
        obs, rewards, terminations, truncations, infos = [], [], [], [], []
        for k, i in enumerate(ids):
            if self.over[i]:  # NEXT_STEP: it is reset now
                obs.append(self._begin(i, None))
                told: tuple[Any, ...] = (0.0, False, False)
                infos += [(k, self.rows[i][-1]["info"])] if self.rows[i][-1]["info"] else []
            else:
                end = self.rng.random() < 0.2
                told = (float(self.rng.normal()), bool(end and self.rng.random() < 0.5), False)
                told = (*told[:2], bool(end and not told[1]))
                shown = self._row(i, int(actions[k]), *told)
                if end:
                    self._over(i, "terminated" if told[1] else "truncated")
                if end and self.mode in {"same", "pool"}:
                    infos.append((k, {"final_obs": shown["obs"], "final_info": shown["info"]}))
                    obs.append(self._begin(i, None))
                    infos += [(k, self.rows[i][-1]["info"])] if self.rows[i][-1]["info"] else []
                else:
                    obs.append(shown["obs"])
                    infos += [(k, shown["info"])] if shown["info"] else []
            rewards.append(told[0])
            terminations.append(told[1])
            truncations.append(told[2])
        lanes = None if self.mode != "pool" else np.array(ids, np.int64)
        self._note(lanes, actions, obs, np.array(rewards), np.array(terminations), np.array(truncations), infos)

    def _note(self, lanes: Any, actions: Any, obs: list[Any], *told: Any) -> None:
        batches = self.noted.observations
        rows = Rows(obs) if type(obs[0]) is np.ndarray and self.rng.random() < 0.5 else batches.stack(obs)
        self.noted.note(float(len(self.rows[0])), lanes, actions, rows, *told)
        self.noted.settle()
        for one in obs:
            if type(one) is np.ndarray:
                one[:] = 0  # as an env that fills the same array again

    def _begin(self, i: int, seed: int | None) -> Any:
        if not self.over[i]:
            self._over(i, "reset")
        self.number[i] += 1
        self.over[i] = False
        self.noted.began(i, seed, b"state" if seed is None else None, {"o": i} if seed == 1 else None)
        return self._row(i, None, 0.0, False, False, seed=seed)["obs"]

    def _row(self, i: int, action: int | None, *told: Any, seed: int | None = None) -> dict[str, Any]:
        obs = self.space.sample()
        info = {"n": len(self.rows[i])} if self.rng.random() < 0.3 else {}
        kept = obs.copy() if type(obs) is np.ndarray else obs
        self.rows[i].append(
            {"number": self.number[i], "action": action, "told": told, "kept": kept, "info": info, "seed": seed}
        )
        return {"obs": obs, "info": info}

    def _over(self, i: int, why: str) -> None:
        self.over[i] = True
        rows = [row for row in self.rows[i] if row["number"] == self.number[i] and row["action"] is not None]
        if rows:
            self.ended.append((i, self.number[i], len(rows), sum(row["told"][0] for row in rows), why))


def read_back(chunks: list[Chunk], obs_space: Any, count: int) -> list[list[dict[str, Any]]]:
    """The rows of each lane, as chunks have them."""
    batches, acted = batching(obs_space), batching(ACTIONS)
    rows: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    number = [-1] * count
    for chunk in chunks:
        resets = iter(range(len(chunk.started.numbers)))
        stepped = len(chunk) - int(chunk.resets.sum())
        actions = iter(values(acted, chunk.actions, stepped))
        observations = iter([]) if chunk.observations is None else iter(values(batches, chunk.observations, len(chunk)))
        infos: dict[int, Any] = dict(chunk.infos or [])
        for k, lane in enumerate(chunk.lanes.tolist()):
            seed = None
            if chunk.resets[k]:
                at = next(resets)
                number[lane] = int(chunk.started.numbers[at])
                seed = chunk.started.seeds[at]
                assert chunk.started.states[at] == (b"state" if seed is None else None)
                assert chunk.started.options[at] == ({"o": lane} if seed == 1 else None)
            told = (float(chunk.rewards[k]), bool(chunk.terminations[k]), bool(chunk.truncations[k]))
            action = None if chunk.resets[k] else int(next(actions))
            row = {
                "number": number[lane],
                "action": action,
                "told": told,
                "seed": seed,
                "digest": int(chunk.digests[k]),
            }
            if chunk.observations is not None:
                row |= {"kept": next(observations), "info": infos.get(k, {})}
            rows[lane].append(row)
    return rows


def values(batches: Any, column: Any, count: int) -> list[Any]:
    return column.values if column.form == "items" else list(batches.rows(column.values, count))


def digested(rows: list[dict[str, Any]], space: Any) -> list[int]:
    """What the digests of one lane's rows have to be, by the class that sessions use."""
    batches = batching(space)
    digests = Digests(1, batches)
    out = []
    for row in rows:
        reward, terminated, truncated = row["told"]
        obs = batches.stack([row["kept"]])
        told = np.array([reward]), np.array([terminated]), np.array([truncated])
        out.append(int(digests.add(np.array([0]), obs, *told, [0] if row["action"] is None else [])[0]))
    return out


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Over(NamedTuple):
    """A row of ``Ended``."""

    lane: int
    number: int
    steps: int
    episode_return: float
    reason: int
    first: int


def rows_of(ended: Ended) -> list[Over]:
    columns = (ended.lanes, ended.numbers, ended.steps, ended.returns, ended.reasons, ended.first)
    return [Over(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def chunked(chunker: Chunker, lanes: Lanes, noted: Noted, most: int) -> list[tuple[Chunk, Ended]]:
    """As a writer does with what is too much for one message: what has over so many rows is halved."""
    before = chunker.standing()
    made = chunker.chunk(noted)
    assert made is not None
    parts = halves(lanes.noted, noted) if len(made[0]) > most else None
    if parts is None:
        return [made]
    chunker.go_back(before)
    return [one for part in parts for one in chunked(chunker, lanes, part, most)]


def drive(
    lanes: Lanes, chunker: Chunker, requests: int, limit: int = 1 << 62, most: int = 1 << 62
) -> tuple[list[Chunk], list[Over]]:
    chunks, ended = [], []
    count = lanes.noted.count
    lanes.reset(list(range(count)))
    for k in range(requests):
        ids = list(range(count))
        if lanes.mode == "pool":
            ids = sorted(lanes.rng.choice(count, int(lanes.rng.integers(1, count + 1)), replace=False).tolist())
        elif k % 17 == 16:
            lanes.reset(ids[:: int(lanes.rng.integers(1, 3))] if lanes.mode == "pool" else ids)
        lanes.step(ids)
        if k % 13 == 12 or k == requests - 1:
            while noted := lanes.noted.taken(limit):
                for chunk, over in chunked(chunker, lanes, noted, most):
                    chunks.append(read_chunk(pack_chunk(chunk)))
                    ended += rows_of(over)
    return chunks, ended


@pytest.mark.parametrize("mode", ["same", "next", "pool"])
@pytest.mark.parametrize("space", [OBS, DEEP], ids=["array", "nested"])
@pytest.mark.parametrize(("limit", "most"), [(1 << 62, 1 << 62), (300, 1 << 62), (1 << 62, 2)])
def test_rows_come_back_as_they_were_told(mode: str, space: Any, limit: int, most: int) -> None:
    lanes = Lanes(transcript(4, space=space), mode, 3, space)
    chunks, ended = drive(lanes, Chunker(lanes.noted), 120, limit, most)
    assert all(len(chunk) <= most for chunk in chunks)
    assert [chunk.n for chunk in chunks] == list(range(1, len(chunks) + 1))
    for told, read in zip(lanes.rows, read_back(chunks, space, 4), strict=True):
        assert len(told) == len(read)
        for one, other in zip(told, read, strict=True):
            assert all(same(one[name], other[name]) for name in one), (one, other)
        assert [row["digest"] for row in read] == digested(told, space)
    for end, (lane, number, steps, episode_return, reason) in zip(sorted(ended), sorted(lanes.ended), strict=True):
        assert (end.lane, end.number, end.steps, REASONS[end.reason]) == (lane, number, steps, reason)
        assert end.episode_return == pytest.approx(episode_return)


@pytest.mark.parametrize("mode", ["same", "next", "pool"])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("most", [1 << 62, 2])
def test_actions_alone_have_the_same_digests_and_no_observations(mode: str, at_once: bool, most: int) -> None:
    lanes = Lanes(transcript(4, "actions", at_once=at_once), mode, 3)
    chunks, _ = drive(lanes, Chunker(lanes.noted), 60, most=most)
    for told, read in zip(lanes.rows, read_back(chunks, OBS, 4), strict=True):
        assert [row["digest"] for row in read] == digested(told, OBS)
        assert [(row["number"], row["action"], row["told"]) for row in read] == [
            (row["number"], row["action"], row["told"]) for row in told
        ]
    assert all(chunk.observations is None and chunk.infos is None for chunk in chunks)


def test_a_chunk_says_where_each_lane_was_before_it() -> None:
    lanes = Lanes(transcript(3), "pool", 5)
    chunks, _ = drive(lanes, Chunker(lanes.noted), 80)
    at: dict[int, tuple[int, int]] = defaultdict(lambda: (-1, 0))
    for chunk in chunks:
        resets = iter(chunk.started.numbers.tolist())
        assert [at[i] for i in range(3)] == list(zip(chunk.numbers.tolist(), chunk.steps.tolist(), strict=True))
        for lane, reset in zip(chunk.lanes.tolist(), chunk.resets.tolist(), strict=True):
            at[lane] = (next(resets), 0) if reset else (at[lane][0], at[lane][1] + 1)


@pytest.mark.parametrize("mode", ["same", "next", "pool"])
def test_every_third_episode_is_recorded_whole_and_no_other(mode: str) -> None:
    lanes = Lanes(transcript(4), mode, 9)
    chunks, ended = drive(lanes, Chunker(lanes.noted, every=3), 150)
    for told, read in zip(lanes.rows, read_back(chunks, OBS, 4), strict=True):
        wanted = [row for row in told if row["number"] % 3 == 0]
        assert [row["number"] for row in read] == [row["number"] for row in wanted]
        assert all(same(one["kept"], other["kept"]) for one, other in zip(wanted, read, strict=True))
        assert [row["digest"] for row in read] == digested(wanted, OBS)
    assert sorted((one.lane, one.number) for one in ended) == sorted(one[:2] for one in lanes.ended if one[1] % 3 == 0)


def test_of_an_episode_that_lost_a_part_nothing_more_is_kept() -> None:
    lanes = Lanes(transcript(2), "pool", 2)
    chunker = Chunker(lanes.noted)
    lanes.reset([0, 1])
    lanes.step([0])
    before = len(lanes.rows[0])
    lost, dropped = lanes.noted.dropped()
    assert (lost, dropped) == ({0, 1}, 3)
    chunker.lose(lost)
    chunks, ended = drive(lanes, chunker, 60)
    assert chunks[0].lost == chunks[-1].touched == (0, 1)
    rows = read_back(chunks, OBS, 2)
    for told, read in zip(lanes.rows, rows, strict=True):
        begins = next(
            k for k, row in enumerate(told) if k >= (before if told is lanes.rows[0] else 1) and row["action"] is None
        )
        assert [row["number"] for row in read] == [row["number"] for row in told[begins:]]
        assert [row["digest"] for row in read] == digested(told[begins:], OBS)
    assert {one.number for one in ended if one.lane == 0} == {
        number for lane, number, *_ in lanes.ended if lane == 0 and number >= rows[0][0]["number"]
    }


@pytest.mark.parametrize("taken_over", [False, True])
def test_that_an_env_was_changed_is_said_from_then_on(taken_over: bool) -> None:
    noted = transcript(3)
    lanes = Lanes(noted, "pool", 2)
    chunker = Chunker(noted)
    lanes.reset([0, 1, 2])
    noted.asked(0.0, 1, "set_attr", {"name": "gravity", "value": 9.0})
    first, _ = chunker.chunk(noted.taken(1 << 20)) or pytest.fail("it holds a reset")
    assert (first.touched, [change.lane for change in first.changes]) == ((), [1])
    if taken_over:
        chunker = Chunker(noted)
        chunker.go_on(read_chunk(pack_chunk(first)))
    for _ in range(2):
        lanes.step([0, 1])
        chunk, _ = chunker.chunk(noted.taken(1 << 20)) or pytest.fail("it holds a step")
        assert read_chunk(pack_chunk(chunk)).touched == (1,)


def test_who_takes_over_knows_what_was_lost_chunks_ago() -> None:
    noted = transcript(2)
    lanes = Lanes(noted, "pool", 8)
    lanes.rng = np.random.default_rng(4)
    lanes.reset([0, 1])
    chunker = Chunker(noted)
    noted.dropped()
    chunker.lose({0})
    chunks = []
    for _ in range(2):
        lanes.reset([1])
        chunks += chunked(chunker, lanes, noted.taken(1 << 20), 1 << 62)
    assert [chunk.lost for chunk, _ in chunks] == [(0,), (0,)]
    other = Chunker(noted)
    other.go_on(read_chunk(pack_chunk(chunks[-1][0])))
    lanes.over = [False, False]
    lanes.step([0])
    lanes.reset([1])
    ((last, ended),) = chunked(other, lanes, noted.taken(1 << 20), 1 << 62)
    assert (last.lanes.tolist(), len(ended)) == ([1], 0)
    lanes.reset([0])
    ((anew, _),) = chunked(other, lanes, noted.taken(1 << 20), 1 << 62)
    assert (anew.lanes.tolist(), anew.lost) == ([0], (0,))
    lanes.step([0])
    assert chunked(other, lanes, noted.taken(1 << 20), 1 << 62)[0][0].lost == ()


def test_what_an_env_writes_to_again_is_copied_also_in_a_graph() -> None:
    nodes = np.zeros((2, 3), np.float32)
    kept: Any = own({"graph": GraphInstance(nodes, None, None), "list": [nodes]})
    nodes[:] = 1
    assert not kept["graph"].nodes.any()
    assert not kept["list"][0].any()
    assert type(kept["graph"]) is GraphInstance


def test_a_closed_session_ends_what_is_under_way() -> None:
    noted = transcript(2)
    lanes = Lanes(noted, "same", 1)
    chunker = Chunker(noted)
    lanes.reset([0, 1])
    lanes.rng = np.random.default_rng(4)
    lanes.step([0, 1])
    made = chunker.chunk(noted.taken(1 << 62), end="closed")
    assert made is not None
    chunk, ended = made
    assert chunk.end == "closed"
    open_now = [i for i in range(2) if not lanes.over[i] and lanes.rows[i][-1]["action"] is not None]
    assert [(one.lane, REASONS[one.reason]) for one in rows_of(ended) if one.reason == 3] == [
        (i, "closed") for i in open_now
    ]
    assert open_now


def test_nothing_noted_is_no_chunk() -> None:
    noted = transcript(2)
    chunker = Chunker(noted)
    assert chunker.chunk(noted.taken(1 << 62)) is None
    assert chunker.n == 0


def test_versions_of_policies_and_changes_stand_where_they_happened() -> None:
    noted = transcript(2)
    lanes = Lanes(noted, "pool", 1)
    chunker = Chunker(noted)
    lanes.reset([0, 1])
    noted.policy = 7
    lanes.step([0, 1])
    noted.asked(0.0, 1, "set_attr", {"name": "x", "value": 3})
    noted.policy = 8
    lanes.step([1])
    one = chunker.chunk(noted.taken(1 << 62))
    assert one is not None
    lanes.step([0])
    other = chunker.chunk(noted.taken(1 << 62))
    assert other is not None
    chunk = read_chunk(pack_chunk(one[0]))
    second = 2 + len([row for rows in lanes.rows for row in rows[1:2]])
    assert chunk.policies[0] == (2, 7)
    assert chunk.policies[1][1] == 8
    assert chunk.changes[0].row == chunk.policies[1][0] >= second
    assert (chunk.changes[0].lane, chunk.changes[0].op, chunk.changes[0].given) == (
        1,
        "set_attr",
        {"name": "x", "value": 3},
    )
    assert read_chunk(pack_chunk(other[0])).policies == ((0, 8),)


@pytest.mark.parametrize("space", [OBS, spaces.Dict({"a": OBS, "b": spaces.Discrete(3)})], ids=["array", "nested"])
def test_actions_of_another_dtype_than_their_space_has_keep_every_bit(space: Any) -> None:
    noted = Transcript(2, batching(OBS), batching(space), "actions", hashes_at_once=False, row_bytes=64)
    chunker, rng = Chunker(noted), np.random.default_rng(1)
    zeros = np.zeros(2)
    flags = zeros.astype(np.bool_)
    for lane in range(2):
        noted.began(lane, 1, None, None)
    noted.note(0.0, None, None, np.zeros((2, 3), np.float32), zeros, flags, flags, ())
    given = []
    for n in range(4):
        dtype = np.float64 if n < 3 or space is not OBS else np.float32
        actions: Any = rng.normal(size=(2, 3)).astype(dtype)
        if space is not OBS:
            actions = {"a": actions, "b": rng.integers(0, 3, 2)}
        given += list(batching(space).rows(actions, 2))
        noted.note(0.0, None, actions, np.zeros((2, 3), np.float32), zeros, flags, flags, ())
    made = chunker.chunk(noted.taken(1 << 62))
    assert made is not None
    read = read_chunk(pack_chunk(made[0]))
    assert all(same(one, other) for one, other in zip(given, values(batching(space), read.actions, 8), strict=True))


def test_rewards_without_end_both_ways_are_kept_and_add_up_to_no_number() -> None:
    noted = transcript(1)
    noted.began(0, 1, None, None)
    obs = np.zeros(3, np.float32)
    noted.note_one(0.0, None, obs, 0.0, False, False, {}, reset=True)
    for reward in (np.inf, -np.inf, 1.0):
        noted.note_one(0.0, 1, obs, reward, False, reward == 1.0, {}, reset=False)
    made = Chunker(noted).chunk(noted.taken(1 << 30))
    assert made is not None
    assert made[0].rewards.tolist() == [0.0, np.inf, -np.inf, 1.0]
    assert np.isnan(made[1].returns).all()

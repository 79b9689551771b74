"""What a transcript gives back is what was noted, in order, whoever takes it meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from meshrl.protocol.block import ANSWERS
from meshrl.protocol.chunking import Chunker
from meshrl.protocol.digests import Digests, chained
from meshrl.protocol.joined import Noted, joined
from meshrl.protocol.noted import Asked, Note, One
from meshrl.protocol.transcript import Transcript
from meshrl.protocol.values import hashes_of_values
from meshrl.wire.batches import batching
from meshrl.wire.large import Rows

LANES = 3
ROW_BYTES = 50


def transcript() -> Transcript:
    obs = batching(spaces.Box(-np.inf, np.inf, (2,), np.float32))
    return Transcript(LANES, obs, batching(spaces.Discrete(2**31)), "full", False, ROW_BYTES, 8)


def answer(noted: Transcript, n: int, dtype: type = np.int64) -> None:
    """Every seventh answer shows a reset of a lane."""
    if n % 7 == 0:
        noted.began(n % LANES, n, None, None)
    rewards = np.arange(LANES, dtype=np.float64) + 10 * n
    flags = np.array([n % 5 == 0] * LANES)
    infos = [(1, {"n": n})] if n % 3 == 0 else []
    obs = np.full((LANES, 2), n, np.float32)
    noted.note(float(n), None, np.full(LANES, n, dtype), obs, rewards, flags, ~flags, infos)


def check(noted: Transcript, taken: Noted, count: int) -> None:
    told = joined(noted, taken)
    numbers = np.repeat(np.arange(count), LANES)
    assert told.at.tolist() == numbers.tolist()
    assert told.lanes.tolist() == list(range(LANES)) * count
    assert told.rewards.tolist() == [row % LANES + 10.0 * (row // LANES) for row in range(count * LANES)]
    assert told.terminations.tolist() == (numbers % 5 == 0).tolist()
    assert told.truncations.tolist() == (numbers % 5 != 0).tolist()
    assert told.observations is not None
    assert told.observations.values[:, 0].tolist() == numbers.tolist()
    began = {n * LANES + n % LANES: n for n in range(0, count, 7)}
    assert {row: one.seed for row, one in told.begun.items()} == began
    assert told.actions.values.tolist() == [n for row, n in enumerate(numbers.tolist()) if row not in began]
    assert [(row, final) for row, final, _ in told.infos] == [(n * LANES + 1, False) for n in range(0, count, 3)]


def test_one_thread_notes_while_another_takes() -> None:
    noted, count, done = transcript(), 4000, threading.Event()
    taken: list[Note | One | Asked] = []

    def note() -> None:
        for n in range(count):
            answer(noted, n)
        done.set()

    thread = threading.Thread(target=note)
    thread.start()
    rng = np.random.default_rng(1)
    while True:
        over = done.is_set()
        taken += noted.taken(int(rng.integers(1, 40 * LANES * ROW_BYTES)))
        if over and not noted.nbytes:
            break
    thread.join()
    check(noted, taken, count)


@pytest.mark.parametrize("limit", [1, 5 * LANES * ROW_BYTES, 1 << 62])
def test_no_more_is_taken_than_was_asked_for_but_always_one_answer(limit: int) -> None:
    noted, count = transcript(), 2 * ANSWERS + 5
    taken: list[Note | One | Asked] = []
    for n in range(count):
        answer(noted, n)
    before = noted.nbytes
    while part := noted.taken(limit):
        size = sum(one.nbytes for one in part)
        assert size <= limit or sum(len(one.rewards) for one in part if isinstance(one, Note)) == LANES
        taken += part
    assert sum(one.nbytes for one in taken) == before
    assert noted.nbytes == 0
    check(noted, taken, count)


def test_what_comes_between_stays_between() -> None:
    """A call, and actions of another dtype, which is kept."""
    noted = transcript()
    for n in range(3):
        answer(noted, n)
    noted.asked(0.0, 1, "call", {"name": "f"})
    answer(noted, 3)
    answer(noted, 4, np.int32)
    noted.policy = 9
    answer(noted, 5, np.int32)
    taken = noted.taken(1 << 62)
    kinds = [
        (type(one), one.actions.dtype.name, one.policy, len(one.rewards)) if isinstance(one, Note) else type(one)
        for one in taken
    ]
    assert kinds == [
        (Note, "int64", None, 3 * LANES),
        Asked,
        (Note, "int64", None, LANES),
        (Note, "int32", None, LANES),
        (Note, "int32", 9, LANES),
    ]


def test_whoever_waits_for_what_was_noted_waits_until_it_is_stored_also_where_it_was_taken_before() -> None:
    noted, told = transcript(), []  # type: ignore[var-annotated]
    answer(noted, 0)
    noted.taken(1 << 62)
    noted.when_stored(told.append)
    assert told == [], "it is taken, and not stored"
    noted.settled(None)
    assert told == [None]
    noted.when_stored(told.append)
    assert told == [None, None], "nothing was noted since"
    answer(noted, 1)
    noted.dropped()
    noted.settled("no room")
    noted.when_stored(told.append)
    answer(noted, 2)
    noted.when_stored(told.append)
    assert told[2:] == ["no room"] * 2, "of a recording with a gap nothing more is said to be stored"


def test_who_waits_is_told_when_nobody_stores_any_more() -> None:
    noted, told = transcript(), []  # type: ignore[var-annotated]
    answer(noted, 0)
    noted.when_stored(told.append)
    noted.close()
    noted.when_stored(told.append)
    assert told == ["it is recorded no more"] * 2


@pytest.mark.parametrize("watched", [False, True])
def test_what_is_kept_counts_also_where_no_chunk_has_it(monkeypatch: pytest.MonkeyPatch, watched: bool) -> None:
    monkeypatch.setattr("meshrl.protocol.transcript.MAX_NOTED_BYTES", 100_000)
    space = spaces.Box(-np.inf, np.inf, (1000,), np.float64)
    noted = Transcript(2, batching(space), batching(spaces.Discrete(2)), "actions", watched, 40, 8000)
    noted.watched = watched
    zeros = np.zeros(2)
    for n in range(50):
        noted.note(float(n), None, np.zeros(2, np.int64), np.zeros((2, 1000)), zeros, zeros > 0, zeros > 0, [])
        noted.settle()
    assert noted.missed >= 2 * 40
    (taken,) = noted.taken(1 << 62)[:1]
    assert isinstance(taken, Note)
    assert taken.obs is not None


@pytest.mark.parametrize("order", ["<", ">"])
def test_arrays_that_are_not_in_one_piece_are_noted_as_they_are(order: str) -> None:
    noted = transcript()
    wide = np.arange(2 * 2 * LANES * 2, dtype=f"{order}f4").reshape(2 * LANES, 4)
    zeros = np.zeros(2 * LANES)[::2]
    noted.note(0.0, None, np.arange(2 * LANES)[::2], wide[::2, ::2], zeros, zeros > 0, zeros == 0, [])
    noted.note(1.0, None, np.arange(LANES), np.asfortranarray(wide[:LANES, :2]), zeros, zeros > 0, zeros == 0, [])
    told = joined(noted, noted.taken(1 << 62))
    assert told.observations is not None
    assert told.observations.values.tolist() == [*wide[::2, ::2].tolist(), *wide[:LANES, :2].tolist()]
    assert told.actions.values.tolist() == [0, 2, 4, 0, 1, 2]
    assert told.truncations.all()


def test_observations_of_another_shape_begin_another_block() -> None:
    noted = transcript()
    zeros = np.zeros(LANES)
    for n, size in enumerate((2, 2, 3, 2)):
        noted.note(float(n), None, zeros, np.full((LANES, size), n), zeros, zeros > 0, zeros > 0, [])
    taken = noted.taken(1 << 62)
    assert [one.obs.shape for one in taken if isinstance(one, Note)] == [(2 * LANES, 2), (LANES, 3), (LANES, 2)]


def test_values_that_are_no_plain_numbers_are_noted_one_by_one() -> None:
    noted, zeros = transcript(), np.zeros(LANES)
    obs = np.array([{"a": 1}, None, "text"], object)
    noted.note(0.0, None, zeros, obs, zeros, zeros > 0, zeros > 0, [])
    (note,) = noted.taken(1 << 62)
    assert isinstance(note, Note)
    assert note.obs is obs


@pytest.mark.parametrize("redone", [False, True])
def test_an_info_of_a_reset_may_have_any_key_also_that_of_what_was_told_last(redone: bool) -> None:
    noted, last, never = transcript(), np.ones(2, np.float32), np.zeros(LANES, np.bool_)
    for lane in range(LANES):
        noted.began(lane, lane, None, None)
    noted.note(0.0, None, None, np.full((LANES, 2), 9, np.float32), np.zeros(LANES), never, never, ())
    noted.began(1, None, None, None)
    infos: list[Any] = [{"final_obs": last, "final_info": {"n": 1}}, {"final_obs": "the env's own"}]
    if redone:
        noted.note_redone(0.0, 1, 3, np.zeros(2, np.float32), 1.0, (True, False), infos)
    else:
        flags = np.array([False, True, False])
        obs = np.zeros((LANES, 2), np.float32)
        noted.note(0.0, None, np.full(LANES, 3), obs, np.ones(LANES), flags, ~flags, [(1, info) for info in infos])
    made = Chunker(noted).chunk(noted.taken(1 << 20))
    assert made is not None
    chunk = made[0]
    assert chunk.observations is not None
    rows = np.flatnonzero(chunk.lanes == 1).tolist()
    assert chunk.resets[rows].tolist() == [True, False, True]
    assert chunk.observations.values[rows].tolist() == [[9, 9], [1, 1], [0, 0]]
    assert chunk.infos == [(rows[1], {"n": 1}), (rows[2], {"final_obs": "the env's own"})]


def test_who_takes_is_called_once_when_as_much_is_noted() -> None:
    noted, called = transcript(), []
    noted.when_full(3 * LANES * ROW_BYTES, lambda: called.append(noted.nbytes))
    for n in range(5):
        answer(noted, 7 * n + 1)
    assert len(called) == 1
    assert called[0] >= 3 * LANES * ROW_BYTES
    noted.taken(1 << 62)
    noted.when_full(LANES * ROW_BYTES, lambda: called.append(-1))
    noted.asked(14.0, 0, "call", {"name": "nothing"})
    assert len(called) == 1
    answer(noted, 1)
    assert called[1:] == [-1]


def test_who_asks_again_while_it_is_called_is_called_again() -> None:
    noted, called = transcript(), []
    again = 2 * LANES * ROW_BYTES

    def full() -> None:
        called.append(noted.nbytes)
        if len(called) == 1:
            noted.when_full(again, full)

    noted.when_full(1, full)
    for n in range(4):
        answer(noted, 7 * n + 1)
    assert len(called) == 2


def test_flags_that_are_no_bools_are_not_taken_for_others() -> None:
    noted, zeros = transcript(), np.zeros(LANES)
    noted.note(0.0, None, zeros, np.zeros((LANES, 2), np.float32), zeros, zeros.astype(np.int32), zeros > 0, [])
    with pytest.raises(ValueError, match="flags are no bools"):
        noted.taken(1 << 62)


def test_the_oldest_is_what_was_noted_first_and_not_taken() -> None:
    noted = transcript()
    assert noted.oldest_at == np.inf
    for n in (11, 12, 13):
        answer(noted, n)
    noted.asked(14.0, 0, "call", {"name": "nothing"})
    answer(noted, 15)
    assert noted.oldest_at == 11.0
    noted.taken(1)
    assert noted.oldest_at == 12.0
    noted.taken(2 * LANES * ROW_BYTES + 10)
    assert noted.oldest_at == 14.0
    noted.taken(1)
    assert noted.oldest_at == 15.0
    noted.taken(1 << 62)
    assert noted.oldest_at == np.inf


def test_actions_of_a_replay_and_of_what_follows_are_one_column() -> None:
    acted = spaces.Dict({"a": spaces.Discrete(5), "b": spaces.Box(-1, 1, (2,), np.float32)})
    noted = Transcript(2, batching(spaces.Discrete(9)), batching(acted), "actions", False, 40, 8)
    actions = [{"a": np.int64(n), "b": np.full(2, n / 10, np.float32)} for n in range(6)]
    for n in range(2):
        noted.note_redone(0.0, n, actions[n], 1, 0.0, (False, False), ())
    zeros = np.zeros(2)
    for n in (2, 4):
        batch = batching(acted).stack(actions[n : n + 2])
        noted.note(1.0, None, batch, np.array([1, 2]), zeros, zeros > 0, zeros > 0, [])
    column = joined(noted, noted.taken(1 << 62)).actions
    assert column.form == "items"
    assert [one["a"] for one in column.values] == list(range(6))
    assert [one["b"].tolist() for one in column.values] == [one["b"].tolist() for one in actions]


@pytest.mark.parametrize("level", ["actions", "full"])
def test_large_observations_have_the_digests_of_their_values_whatever_they_are(level: Any) -> None:
    """Most are arrays like those of their space, which are hashed as they come; an env need not keep to it."""
    space = spaces.Box(0, 255, (40, 40), np.uint8)
    rng = np.random.default_rng(1)
    shown = [rng.integers(0, 256, (40, 40), np.uint8) for _ in range(3)]
    fortran = np.asfortranarray(rng.integers(0, 256, (40, 40), np.uint8))
    odd: list[Any] = [*shown, fortran, shown[0].astype(np.float64), shown[1][:20], "text", shown[2]]
    noted = Transcript(1, batching(space), batching(spaces.Discrete(2)), level, True, 40, 1600)
    noted.began(0, 5, None, None)
    for n, obs in enumerate(odd):
        noted.note_one(float(n), None if n == 0 else 1, obs, n / 2, n == 7, False, {}, reset=n == 0)
        noted.settle()
    hashes = joined(noted, noted.taken(1 << 62)).hashes
    rewards, over = [n / 2 for n in range(len(odd))], [n == 7 for n in range(len(odd))]
    expected = hashes_of_values(batching(space), odd, rewards, over, [False] * len(odd), [0])
    assert hashes.tolist() == expected.tolist()
    for n, obs in enumerate(shown):
        alone = hashes_of_values(batching(space), [obs], rewards[n : n + 1], [False], [False], [0] if n == 0 else [])
        assert hashes[n] == alone[0]


class Keys(spaces.Space[Any]):
    """A space of arrays that Gymnasium batches as single values."""

    def __init__(self) -> None:
        super().__init__((40, 40), np.uint8)


def test_arrays_that_travel_one_by_one_are_hashed_as_such() -> None:
    space, key = Keys(), np.zeros((40, 40), np.uint8)
    noted = Transcript(1, batching(space), batching(spaces.Discrete(2)), "actions", True, 40, 1600)
    noted.note_one(0.0, 1, key, 1.0, False, False, {}, reset=False)
    noted.settle()
    hashes = joined(noted, noted.taken(1 << 62)).hashes
    assert hashes.tolist() == hashes_of_values(batching(space), [key], [1.0], [False], [False], []).tolist()


@pytest.mark.parametrize("level", ["actions", "full"])
@pytest.mark.parametrize("size", [3, 400])
@pytest.mark.parametrize("code", [">f4", "<f4", ">i8", "u1"])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_what_one_env_told_has_the_hashes_that_a_replay_of_it_has(level: Any, size: int, code: str, count: int) -> None:
    """Whatever its byte order; and however many rows are hashed together."""
    space = spaces.Box(0, 100, (size,), np.dtype(code))
    large = space.sample().nbytes > 256
    noted = Transcript(1, batching(space), batching(spaces.Discrete(2)), level, large, ROW_BYTES, size)
    shown = [(np.arange(size) % 7 + n).astype(code) for n in range(count)]
    for n, obs in enumerate(shown):
        noted.note_one(float(n), 1, obs, float(n), False, False, {}, reset=False)
        noted.settle()
    told = joined(noted, noted.taken(1 << 62))
    alone = [
        hashes_of_values(noted.observations, [obs], [float(n)], [False], [False], ())[0] for n, obs in enumerate(shown)
    ]
    digest = Digests(1, noted.observations)
    for n, obs in enumerate(shown):
        digest.add(np.zeros(1, np.int64), obs[None], np.array([float(n)]), np.zeros(1, np.bool_), np.zeros(1, np.bool_))
    assert told.hashes.tolist() == alone
    assert chained(told.hashes, np.array([0]), np.zeros(1, np.uint64))[-1] == digest.values[0]
    if level == "full":
        assert told.observations is not None
        kept = told.observations.values
        batch = kept.stacked() if type(kept) is Rows else kept
        assert batch.dtype == np.dtype(code)
        assert batch.tobytes() == b"".join(obs.tobytes() for obs in shown)


def test_what_two_threads_settle_at_once_is_noted_once_and_whole() -> None:
    """A session may end on the event loop while its env is done again on a thread of its own."""
    space = spaces.Box(0, 255, (64, 64), np.uint8)
    for _ in range(20):
        noted = Transcript(1, batching(space), batching(spaces.Discrete(2)), "full", True, ROW_BYTES, 4096)
        for n in range(200):
            noted.note_one(0.0, 1, np.full((64, 64), n, np.uint8), float(n), False, False, {}, reset=False)
        threads = [threading.Thread(target=noted.settle) for _ in range(3)]
        for thread in threads:
            thread.start()
        for n in range(200, 220):
            noted.note_one(0.0, 1, np.full((64, 64), n, np.uint8), float(n), False, False, {}, reset=False)
            noted.settle()
        for thread in threads:
            thread.join()
        taken = noted.taken(1 << 62)
        assert sorted(one.reward for one in taken if isinstance(one, One)) == list(range(220))
        assert all((one.obs == one.reward).all() for one in taken if isinstance(one, One))

"""Messages that JetStream stores: once, in order, by one writer; and read again by their number."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from meshrl.bus.connect import connect
from meshrl.bus.connection import Connection
from meshrl.bus.embedded import EmbeddedServer
from meshrl.bus.storing import Reader, store
from meshrl.bus.streams import make_stream
from meshrl.errors import MessageTooLarge, RequestTimeout, StorageRefused, StreamMissing, WrongSequence

CONFIG = {"subjects": ["kept.>"], "storage": "file", "allow_direct": True}


@pytest.fixture(params=["thin", "plain"])
async def connection(
    request: pytest.FixtureRequest, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Connection]:
    if request.param == "plain":
        monkeypatch.setenv("MESHRL_BUS", "plain")
    async with connect(server.url) as made:
        await make_stream(made, "KEPT", CONFIG)
        yield made


async def test_each_message_has_its_number_and_is_read_by_it(connection: Connection) -> None:
    last = 0
    for n in range(5):
        last = await store(connection, "kept.a", b"%d" % n, 5.0, message_id=f"m{n}", after=last)
    await store(connection, "kept.b", b"other", 5.0, message_id="b")
    async with Reader(connection, 5.0) as reader:
        got = [one async for one in reader.get("KEPT", "kept.a")]
        assert [(one.seq, one.body, one.subject) for one in got] == [(n + 1, b"%d" % n, "kept.a") for n in range(5)]
        assert [one.message_id for one in got] == [f"m{n}" for n in range(5)]
        assert [one.seq async for one in reader.get("KEPT", "kept.*", 4)] == [4, 5, 6]
        assert [one.seq async for one in reader.get("KEPT", "kept.*", 2, limit=3)] == [2, 3, 4]
        assert [one.seq async for one in reader.get("KEPT", "kept.c")] == []
        assert (await reader.last("KEPT", "kept.a")) == got[-1]
        assert await reader.last("KEPT", "kept.c") is None
        assert (await reader.at("KEPT", 3)) == got[2]
        assert await reader.at("KEPT", 99) is None
        since = [one.seq async for one in reader.get("KEPT", "kept.a", since=got[3].at)]
        assert since == [4, 5]
        assert not [one async for one in reader.get("KEPT", "kept.a", since=got[4].at + timedelta(minutes=1))]


async def test_more_than_one_answer_holds_comes_all_the_same(connection: Connection) -> None:
    for n in range(600):
        await store(connection, "kept.many", b"x" * 20_000, 5.0, message_id=f"many{n}")
    async with Reader(connection, 5.0) as reader:
        assert [one.seq async for one in reader.get("KEPT", "kept.many")] == list(range(1, 601))


async def test_a_retry_is_told_from_a_rival_by_the_last_messages_id(connection: Connection) -> None:
    first = await store(connection, "kept.a", b"1", 5.0, message_id="one", after=0)
    with pytest.raises(WrongSequence) as refused:  # the very same once more
        await store(connection, "kept.a", b"1", 5.0, message_id="one", after=0)
    assert refused.value.details["subject"] == "kept.a"
    async with Reader(connection, 5.0) as reader:
        last = await reader.last("KEPT", "kept.a")
        assert last is not None
        assert (last.seq, last.message_id) == (first, "one")
    with pytest.raises(WrongSequence):
        await store(connection, "kept.a", b"2", 5.0, message_id="rival", after=0)


async def test_the_same_id_is_stored_once(connection: Connection) -> None:
    numbers = [await store(connection, "kept.a", b"1", 5.0, message_id="one") for _ in range(2)]
    assert numbers == [1, 1]


async def test_where_nothing_is_kept_it_is_said_so(connection: Connection) -> None:
    with pytest.raises(StreamMissing, match="nowhere"):
        await store(connection, "nowhere.a", b"1", 5.0, message_id="1")
    async with Reader(connection, 5.0) as reader:
        with pytest.raises(StreamMissing, match="NOWHERE"):
            await reader.last("NOWHERE", "kept.a")
        await make_stream(connection, "HIDDEN", {"subjects": ["hidden.>"]})
        with pytest.raises(StreamMissing, match="HIDDEN"):
            [one async for one in reader.get("HIDDEN", "hidden.>")]


async def test_a_stream_that_is_full_says_so(connection: Connection) -> None:
    await make_stream(connection, "SMALL", {"subjects": ["small"], "max_bytes": 4096, "discard": "new"})
    for n in range(3):
        await store(connection, "small", b"x" * 1000, 5.0, message_id=f"s{n}")
    with pytest.raises(StorageRefused, match="maximum bytes"):
        await store(connection, "small", b"x" * 2000, 5.0, message_id="last")


async def test_what_is_larger_than_a_message_may_be_is_refused_here(connection: Connection) -> None:
    with pytest.raises(MessageTooLarge) as refused:
        await store(connection, "kept.a", b"x" * connection.max_payload, 5.0, message_id="1")
    limit = refused.value.details["limit_bytes"]
    assert await store(connection, "kept.a", b"x" * limit, 5.0, message_id="2") == 1


async def test_a_server_that_is_away_is_waited_for_no_longer_than_was_said(server: EmbeddedServer) -> None:
    async with connect(server.url) as made, Reader(made, 0.3) as reader:
        await make_stream(made, "KEPT", CONFIG)
        await asyncio.to_thread(server.stop)
        with pytest.raises(RequestTimeout):
            await store(made, "kept.a", b"1", 0.3, message_id="1")
        with pytest.raises(RequestTimeout):
            await reader.last("KEPT", "kept.a")

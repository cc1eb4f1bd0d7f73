"""The readers: each connection gets its own data, and is not disturbed by the errors of another one."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio
from http_node import Turns
from trio.testing import wait_all_tasks_blocked

from trio_cluster.net import readers
from trio_cluster.net.readers import Reader, Reading, SharedReader, TaskReader, has_epoll
from trio_cluster.net.streams import TcpStream

pytestmark = pytest.mark.skipif(not has_epoll(), reason="the system has no epoll")


class Connection:
    """A connection that is read, and its client."""

    def __init__(
        self,
        reader: Reader,
        on_feed: Callable[[bytes], None] = lambda data: None,
        kind: type[TcpStream] = TcpStream,
    ) -> None:
        ours, self.client = socket.socketpair()
        self.stream = kind(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        self.on_feed = on_feed
        self.fed: list[bytes] = []
        self.failed: list[Exception] = []
        self.reading: Reading = reader.reading(self.stream, self)

    def data_received(self, data: bytes) -> None:
        self.fed.append(data)
        self.on_feed(data)

    def read_failed(self, error: Exception) -> None:
        self.failed.append(error)

    def close(self) -> None:
        self.reading.end()
        self.stream.close()
        self.client.close()


@pytest.fixture(params=["one task for all", "a task for each"])
async def reader(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Reader:
    reader: Reader = SharedReader() if request.param == "one task for all" else TaskReader(nursery)
    nursery.start_soon(reader.run)
    return reader


@pytest.fixture
async def shared(nursery: trio.Nursery) -> SharedReader:
    reader = SharedReader()
    nursery.start_soon(reader.run)
    return reader


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Connection]]:
    made: list[Connection] = []

    def connect(*args: Any) -> Connection:
        made.append(Connection(*args))
        return made[-1]

    yield connect
    for each in made:
        each.close()


async def settle() -> None:
    with trio.fail_after(5):
        await wait_all_tasks_blocked()


async def test_each_is_given_what_came_on_it_and_its_end_once(
    reader: Reader, connect: Callable[..., Connection]
) -> None:
    one, two = connect(reader), connect(reader)
    one.client.send(b"before")
    for each in (one, two):
        each.reading.begin()
    await settle()
    two.client.send(b"after")
    await settle()
    one.client.close()
    await settle()
    assert one.fed == [b"before", b""]
    assert two.fed == [b"after"]


async def test_a_connection_that_breaks_is_one_that_ends(
    reader: Reader, connect: Callable[..., Connection]
) -> None:
    one = connect(reader)
    one.reading.begin()
    # What the client has not read when it leaves is a reset.
    await one.stream.write(b"unread")
    one.client.close()
    await settle()
    assert one.fed == [b""]
    assert one.failed == []


async def test_what_a_receiver_raises_concerns_its_own_connection_only(
    reader: Reader, connect: Callable[..., Connection]
) -> None:
    def bug(data: bytes) -> None:
        raise ZeroDivisionError

    one, two = connect(reader, bug), connect(reader)
    for each in (one, two):
        each.reading.begin()
        each.client.send(b"first")
    await settle()
    for each in (one, two):
        each.client.send(b"second")
    await settle()
    assert one.fed == [b"first"]
    assert [type(error) for error in one.failed] == [ZeroDivisionError]
    assert b"".join(two.fed) == b"firstsecond"
    assert two.failed == []


async def test_nothing_is_read_during_a_pause_and_no_task_is_busy_with_it(
    reader: Reader, connect: Callable[..., Connection]
) -> None:
    one = connect(reader)
    one.on_feed = lambda data: one.reading.pause()
    one.reading.begin()
    one.client.send(b"first")
    await settle()
    one.client.send(b"second")
    one.client.close()
    # This would not return if a task was woken again and again because there is something to read.
    await settle()
    assert one.fed == [b"first"]
    one.reading.resume()
    await settle()
    assert one.fed[:2] == [b"first", b"second"]


async def test_a_reading_that_has_ended_does_not_begin_again(
    reader: Reader, connect: Callable[..., Connection]
) -> None:
    one = connect(reader)
    one.reading.end()
    one.client.send(b"anything")
    one.reading.begin()
    one.reading.resume()
    await settle()
    one.reading.end()
    assert one.fed == []


async def test_a_connection_that_another_one_closes_is_not_read_any_more(
    shared: SharedReader, connect: Callable[..., Connection]
) -> None:
    one, two = connect(shared), connect(shared)
    for each, other in ((one, two), (two, one)):
        each.on_feed = lambda data, other=other: other.close()
        each.reading.begin()
        each.client.send(b"both at once")
    await settle()
    assert sorted(one.fed + two.fed) == [b"both at once"]


async def test_a_closed_connection_that_another_process_keeps_open_is_not_read(
    shared: SharedReader, connect: Callable[..., Connection]
) -> None:
    old = connect(shared)
    old.reading.begin()
    number = old.stream.descriptor
    # As a child process has it.
    held = os.dup(number)
    try:
        old.reading.end()
        old.stream.close()
        new = connect(shared)
        if new.stream.descriptor != number:
            os.dup2(new.stream.descriptor, number)
        new.reading.begin()
        old.client.send(b"for the closed one")
        await settle()
        assert new.fed == []
    finally:
        os.close(held)


async def test_other_tasks_have_their_turn_after_some_connections(
    shared: SharedReader, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_AT_ONCE", 3)
    seen: list[int] = []
    with Turns() as turns:
        connections = [connect(shared, lambda data: seen.append(turns.now)) for _ in range(9)]
        for each in connections:
            each.reading.begin()
        for each in connections:
            each.client.send(b"x")
        await settle()
    assert [seen.count(turn) for turn in seen] == [3] * 9


async def test_a_connection_may_end_when_the_reader_has_ended(
    connect: Callable[..., Connection],
) -> None:
    reader = SharedReader()
    one, two = connect(reader), connect(reader)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        one.reading.begin()
        await settle()
        nursery.cancel_scope.cancel()
    one.client.send(b"late")
    one.reading.pause()
    one.reading.resume()
    one.reading.end()
    two.reading.begin()
    two.reading.end()
    assert one.fed == []


class ReadAhead(TcpStream):
    """A stream that reads more than it is asked for, as a TLS record makes it: it gives two bytes at a time."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self.ahead = b""

    @property
    def pending(self) -> bool:  # type: ignore[override]
        return bool(self.ahead)

    def read_nowait(self, limit: int) -> bytes:
        data = self.ahead or super().read_nowait(limit)
        self.ahead = data[2:]
        return data[:2]


async def test_what_a_stream_has_read_ahead_is_given_although_its_descriptor_is_not_readable(
    shared: SharedReader, connect: Callable[..., Connection]
) -> None:
    one = connect(shared, lambda data: None, ReadAhead)
    one.reading.begin()
    one.client.send(b"abcdef")
    await settle()
    assert one.fed == [b"ab", b"cd", b"ef"]


async def test_what_a_stream_has_read_ahead_waits_during_a_pause_and_is_given_after_it(
    shared: SharedReader, connect: Callable[..., Connection]
) -> None:
    one = connect(shared, lambda data: one.reading.pause(), ReadAhead)
    one.reading.begin()
    one.client.send(b"abcd")
    await settle()
    assert one.fed == [b"ab"]
    one.reading.resume()
    assert one.fed == [b"ab", b"cd"]


class Failing(TcpStream):
    """A stream that fails in a way that no stream may."""

    def read_nowait(self, limit: int) -> bytes:
        raise ZeroDivisionError

    async def read(self, limit: int) -> bytes:
        await super().read(limit)
        raise ZeroDivisionError


async def test_a_stream_that_fails_in_an_unexpected_way_ends_its_own_reading_only(reader: Reader) -> None:
    one, two = Connection(reader), Connection(reader)
    for connection in (one, two):
        connection.reading.begin()
    await wait_all_tasks_blocked()
    # Not before the reading has begun.
    one.stream.__class__ = Failing
    for _ in range(2):
        for connection in (one, two):
            connection.client.send(b"hello")
        await settle()
    assert [type(error) for error in one.failed] == [ZeroDivisionError]
    assert (two.fed, two.failed) == ([b"hello"] * 2, [])
    one.close()
    two.close()

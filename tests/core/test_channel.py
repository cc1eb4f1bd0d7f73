"""A body that is coming in: its producer, its consumer, and what lies between them."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, strategies as st
from trio.testing import wait_all_tasks_blocked

from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.limits import WINDOW


class Sink:
    """A consumer that is pushed to."""

    def __init__(self) -> None:
        self.pieces: list[tuple[bytes, bool]] = []

    def __call__(self, data: bytes | memoryview, last: bool) -> bool:
        self.pieces.append((bytes(data), last))
        return False

    @property
    def data(self) -> bytes:
        return b"".join(data for data, _ in self.pieces)


# The consumer


async def test_what_has_come_is_received_together_and_the_end_is_empty() -> None:
    upload = ByteChannel(5)
    upload.put(b"ab")
    upload.put(b"cd")
    assert await upload.receive() == b"abcd"
    upload.put(b"e", last=True)
    assert await upload.receive() == b"e"
    assert await upload.receive() == b""
    assert await upload.receive() == b""
    assert (upload.size, upload.received, upload.complete) == (5, 5, True)


async def test_what_has_come_can_be_taken_without_waiting() -> None:
    taken: list[int] = []
    upload = ByteChannel(on_consumed=taken.append)
    assert upload.receive_nowait() == b""
    upload.put(b"one")
    upload.put(b"two", last=True)
    assert (upload.receive_nowait(), upload.receive_nowait()) == (b"onetwo", b"")
    assert taken == [6]


async def test_a_consumer_waits_until_something_comes(nursery: trio.Nursery) -> None:
    upload, received = ByteChannel(), []

    async def consume() -> None:
        while data := await upload.receive():
            received.append(data)
        received.append(b"")

    nursery.start_soon(consume)
    await wait_all_tasks_blocked()
    assert received == []
    upload.put(b"a")
    await wait_all_tasks_blocked()
    assert received == [b"a"]
    upload.put(b"", last=True)
    await wait_all_tasks_blocked()
    assert received == [b"a", b""]


async def test_a_cancelled_receive_loses_nothing() -> None:
    upload = ByteChannel()
    with trio.CancelScope() as scope:
        scope.cancel()
        upload.put(b"a", last=True)
        await upload.receive()
    assert scope.cancelled_caught
    assert await upload.read() == b"a"


@given(st.lists(st.binary(max_size=5)), st.booleans())
async def test_the_whole_body_is_what_was_put(pieces: list[bytes], late: bool) -> None:
    upload = ByteChannel()

    async def produce() -> None:
        for piece in pieces:
            upload.put(piece)
            if late:
                await trio.lowlevel.checkpoint()
        upload.put(b"", last=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(produce)
        assert await upload.read() == b"".join(pieces)


def test_a_sink_gets_what_waits_and_then_what_comes() -> None:
    upload, sink = ByteChannel(), Sink()
    upload.put(b"a")
    upload.put(b"b")
    upload.redirect(sink)
    upload.put(b"c")
    upload.put(b"", last=True)
    assert sink.pieces == [(b"ab", False), (b"c", False), (b"", True)]


def test_a_sink_gets_an_end_that_was_put_before_it_was_set() -> None:
    upload, sink = ByteChannel(), Sink()
    upload.put(b"", last=True)
    upload.redirect(sink)
    assert sink.pieces == [(b"", True)]


def test_a_sink_is_not_called_while_there_is_nothing() -> None:
    upload, sink = ByteChannel(), Sink()
    upload.redirect(sink)
    upload.put(b"")
    assert sink.pieces == []


def test_on_complete_is_called_once_the_body_is_complete() -> None:
    called: list[int] = []
    upload = ByteChannel()
    upload.on_complete(lambda: called.append(upload.received))
    upload.put(b"ab")
    assert called == []
    upload.put(b"c", last=True)
    assert called == [3]
    upload.on_complete(lambda: called.append(-1))
    assert called == [3, -1]


# The producer


async def test_a_producer_waits_while_a_window_is_full_and_goes_on_when_some_was_received(
    nursery: trio.Nursery,
) -> None:
    upload, room = ByteChannel(), trio.Event()

    async def produce() -> None:
        upload.put(bytes(WINDOW - 1))
        await upload.wait_room()
        upload.put(b"x")
        await upload.wait_room()
        room.set()

    nursery.start_soon(produce)
    await wait_all_tasks_blocked()
    assert upload.received == WINDOW
    assert not room.is_set()
    await upload.receive()
    await wait_all_tasks_blocked()
    assert room.is_set()


async def test_what_a_sink_was_given_waits_until_it_has_gone_on(nursery: trio.Nursery) -> None:
    upload, room = ByteChannel(), trio.Event()
    upload.redirect(Sink())
    upload.put(bytes(WINDOW))

    async def produce() -> None:
        await upload.wait_room()
        room.set()

    nursery.start_soon(produce)
    await wait_all_tasks_blocked()
    assert not room.is_set()
    upload.consumed(1)
    await wait_all_tasks_blocked()
    assert room.is_set()


async def test_credit_is_given_for_what_was_taken_and_for_nothing_else() -> None:
    credit: list[int] = []
    upload = ByteChannel(on_consumed=credit.append)
    upload.put(b"abc")
    assert credit == []
    assert await upload.receive() == b"abc"
    assert credit == [3]
    upload.redirect(Sink())
    upload.put(b"de")
    assert credit == [3]
    upload.consumed(2)
    assert credit == [3, 2]


def test_more_of_a_complete_body_is_an_error() -> None:
    upload = ByteChannel()
    upload.put(b"a", last=True)
    with pytest.raises(RuntimeError, match="after the end"):
        upload.put(b"b")


# Wanting no more


async def test_closing_calls_on_close_and_releases_a_producer_that_waits(nursery: trio.Nursery) -> None:
    upload, called, room = ByteChannel(), trio.Event(), trio.Event()
    upload.on_close(called.set)
    upload.put(bytes(WINDOW))

    async def produce() -> None:
        await upload.wait_room()
        room.set()

    nursery.start_soon(produce)
    await wait_all_tasks_blocked()
    assert not room.is_set()
    upload.close()
    assert called.is_set()
    await wait_all_tasks_blocked()
    assert room.is_set()


async def test_what_is_put_after_a_close_is_dropped_and_gives_no_credit() -> None:
    credit: list[int] = []
    upload, sink = ByteChannel(on_consumed=credit.append), Sink()
    upload.redirect(sink)
    upload.put(b"a")
    upload.close()
    upload.put(b"b")
    upload.consumed(1)
    assert (sink.data, credit, upload.received) == (b"a", [], 2)


def test_closing_again_calls_nothing_again() -> None:
    called: list[str] = []
    upload = ByteChannel()
    upload.on_close(lambda: called.append("first"))
    upload.close()
    upload.close()
    assert called == ["first"]
    upload.on_close(lambda: called.append("late"))
    assert called == ["first", "late"]


def test_the_end_of_a_call_whose_body_is_complete_does_not_close_it() -> None:
    called: list[str] = []
    upload = ByteChannel()
    upload.on_close(lambda: called.append("closed"))
    upload.put(b"a", last=True)
    upload.close()
    assert called == []

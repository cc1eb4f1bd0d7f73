"""How connections are accepted: many at once, not too many, and what happens when there is no room for one."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio
from http_node import Turns, listener, listening_socket
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.net import acceptor
from trio_cluster.net.acceptor import accept_all
from trio_cluster.net.streams import ByteStream, Listener


@pytest.fixture
async def crowd() -> AsyncIterator[tuple[socket.socket, list[socket.socket]]]:
    """Give a listening socket, and those that have been connected to it."""
    sock = listening_socket()
    clients = [socket.create_connection(sock.getsockname()) for _ in range(5)]
    yield sock, clients
    for each in (*clients, sock):
        each.close()


async def accept_crowd(sock: socket.socket) -> list[int]:
    """Accept five connections, and return in which turn each was accepted."""
    accepted = []

    def admit(stream: ByteStream) -> None:
        accepted.append(turns.now)
        stream.close()

    with trio.fail_after(5), Turns() as turns:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_all, listener(sock), admit)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    return accepted


async def test_all_that_wait_are_accepted_at_once(
    crowd: tuple[socket.socket, list[socket.socket]],
) -> None:
    accepted = await accept_crowd(crowd[0])
    assert accepted == accepted[:1] * 5


async def test_others_have_their_turn_after_some(
    crowd: tuple[socket.socket, list[socket.socket]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "_AT_ONCE", 2)
    accepted = await accept_crowd(crowd[0])
    assert [accepted.count(turn) for turn in accepted] == [2, 2, 2, 2, 1]


async def test_a_cancelled_acceptor_leaves_no_open_listener() -> None:
    sock = listening_socket()
    address = sock.getsockname()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_all, listener(sock), print)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(address):
        pass


class Troubled(Listener):
    """A listener that raises errors, until it has no more of them and waits for ever."""

    local_address = ("troubled", 0)
    shares_descriptors = False

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)
        self.closed = False

    async def accept(self) -> ByteStream:
        await trio.lowlevel.checkpoint()
        if self.numbers:
            raise OSError(self.numbers.pop(0), "trouble")
        return await trio.sleep_forever()

    def accept_nowait(self) -> ByteStream:
        raise trio.WouldBlock

    def limit_unread_time(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_without_room_for_another_connection_it_is_tried_again_after_a_while(
    number: int, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    troubled = Troubled(number, number)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_all, troubled, print)
        await trio.sleep(0.15)
        assert troubled.numbers == []
        assert not troubled.closed
        nursery.cancel_scope.cancel()
    assert troubled.closed
    (record,) = caplog.records
    assert record.message.startswith(f"no room for another connection: {os.strerror(number)};")


async def test_no_room_is_logged_when_it_begins_and_when_it_is_over(
    crowd: tuple[socket.socket, list[socket.socket]],
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "trio_cluster.http")

    class Recovering(Troubled):
        async def accept(self) -> ByteStream:
            if not self.numbers and not self.closed:
                # Long after the last error.
                await trio.sleep(60)
                return await real.accept()
            return await super().accept()

    real = listener(crowd[0])
    troubled = Recovering(*[errno.EMFILE] * 50)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_all, troubled, lambda stream: stream.close())
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert caplog.records[1].message == "there is room for another connection again"


async def test_a_connection_that_cannot_be_served_is_closed_and_logged_and_the_others_are_accepted(
    crowd: tuple[socket.socket, list[socket.socket]], caplog: pytest.LogCaptureFixture
) -> None:
    streams: list[ByteStream] = []

    def admit(stream: ByteStream) -> None:
        streams.append(stream)
        raise RuntimeError("a bug")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_all, listener(crowd[0]), admit)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert len(streams) == 5
    for client in crowd[1]:
        client.settimeout(5)
        assert client.recv(1) == b""
    assert caplog.text.count("RuntimeError: a bug") == 5


async def test_another_error_is_raised() -> None:
    troubled = Troubled(errno.EBADF)
    with pytest.raises(OSError, match="trouble"):
        await accept_all(troubled, print)
    assert troubled.closed

"""What a ``ByteStream`` promises, on each kind of it; and what is particular to sockets."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace

import pytest
import trio
from certificates import client_side, server_side
from http_node import listening_socket
from memory_streams import memory_pair
from trio.testing import wait_all_tasks_blocked

from trio_cluster.net.sockets import Sockets, close_all, port_of
from trio_cluster.net.streams import ByteStream, TcpListener, TcpStream
from trio_cluster.net.tls import TlsStream
from trio_cluster.security.authority import MASTER_NAME
from trio_cluster.testing import SimulatedNetwork

Ends = tuple[ByteStream, ByteStream]


async def tcp() -> Ends:
    network = Sockets()
    listeners = await network.listen("127.0.0.1", 0)
    near = await network.connect("127.0.0.1", port_of(listeners))
    far = await listeners[0].accept()
    close_all(listeners)
    return near, far


async def simulated() -> Ends:
    network = SimulatedNetwork()
    listeners = await network.host("server").listen("", 80)
    near = await network.host("client").connect("server", 80)
    far = await listeners[0].accept()
    close_all(listeners)
    return near, far


async def memory() -> Ends:
    return memory_pair()


async def encrypted(ends: Ends) -> Ends:
    """Return TLS on a connection, after the handshakes of both ends."""
    near = TlsStream(ends[0], client_side(), server_name=MASTER_NAME)
    far = TlsStream(ends[1], server_side())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.handshake)
        nursery.start_soon(far.handshake)
    return near, far


async def tls_on_tcp() -> Ends:
    return await encrypted(await tcp())


async def tls_on_simulated() -> Ends:
    return await encrypted(await simulated())


async def tls_on_memory() -> Ends:
    return await encrypted(await memory())


@pytest.fixture(params=[tcp, simulated, memory, tls_on_tcp, tls_on_simulated, tls_on_memory])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[Ends]:
    connect: Callable[[], Awaitable[Ends]] = request.param
    near, far = await connect()
    async with near, far:
        yield near, far


@pytest.fixture(params=[tcp, simulated, tls_on_tcp, tls_on_simulated])
async def bounded(request: pytest.FixtureRequest) -> AsyncIterator[Ends]:
    """Give the ends of a connection that does not take any number of bytes."""
    connect: Callable[[], Awaitable[Ends]] = request.param
    near, far = await connect()
    async with near, far:
        yield near, far


async def read_now(stream: ByteStream, limit: int = 100) -> bytes:
    """Return what can be read without waiting, when all that was sent has had the time to arrive."""
    await trio.sleep(0.01)
    return stream.read_nowait(limit)


async def test_what_is_written_is_read_in_order_and_in_pieces_as_asked_for(ends: Ends) -> None:
    near, far = ends
    await near.write(b"one ")
    assert near.try_write(bytearray(b"two ")) == 4
    assert near.try_write(memoryview(b"three")) == 5
    received = b""
    while len(received) < 13:
        piece = await far.read(2)
        assert 1 <= len(piece) <= 2
        assert type(piece) is bytes
        received += piece
    assert received == b"one two three"


async def test_reading_without_waiting_takes_what_there_is(ends: Ends) -> None:
    near, far = ends
    with pytest.raises(trio.WouldBlock):
        far.read_nowait(100)
    await near.write(b"hello")
    assert await read_now(far, 3) == b"hel"
    assert await read_now(far) == b"lo"
    await near.write_eof()
    assert await read_now(far) == b""
    assert await far.read(100) == b""


async def test_a_reader_waits_for_what_comes_later(ends: Ends) -> None:
    near, far = ends
    received: list[bytes] = []

    async def read() -> None:
        received.append(await far.read(100))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            near.try_write(b"later")
    assert received == [b"later"]


async def test_a_cancelled_read_loses_nothing(ends: Ends) -> None:
    near, far = ends
    with trio.move_on_after(0.01):
        await far.read(100)
    await near.write(b"x")
    assert await far.read(100) == b"x"


async def test_what_is_not_taken_at_once_is_taken_later(bounded: Ends) -> None:
    near, far = bounded
    data, sent, received = bytes(range(256)) * 80_000, 0, bytearray()
    while taken := near.try_write(memoryview(data)[sent:]):
        sent += taken
    assert 0 < sent < len(data)
    with trio.move_on_after(0.05) as waited:
        await near.wait_writable()
    assert waited.cancelled_caught

    async def send() -> None:
        nonlocal sent
        while sent < len(data):
            await near.wait_writable()
            sent += near.try_write(memoryview(data)[sent:])

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while len(received) < len(data):
                received += await far.read(1 << 20)
    assert received == data


async def test_a_write_waits_for_a_slow_reader(bounded: Ends) -> None:
    near, far = bounded
    data, received = bytes(5_000_000), 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.write, data)
        await wait_all_tasks_blocked(0.01)
        assert nursery.child_tasks
        with trio.fail_after(10):
            while received < len(data):
                received += len(await far.read(1 << 20))


async def test_two_tasks_do_not_write_at_once(bounded: Ends) -> None:
    near, _ = bounded
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.write, bytes(20_000_000))
        await wait_all_tasks_blocked()
        for use in (lambda: near.write(b"x"), near.write_eof):
            with pytest.raises(trio.BusyResourceError):
                await use()
        nursery.cancel_scope.cancel()


async def test_after_an_end_of_file_one_end_still_reads(ends: Ends) -> None:
    near, far = ends
    await near.write_eof()
    assert await far.read(100) == b""
    await far.write(b"answer")
    assert await near.read(100) == b"answer"


async def test_nothing_is_written_behind_an_end_of_file(bounded: Ends) -> None:
    near, _ = bounded
    await near.write_eof()
    with pytest.raises(trio.ClosedResourceError):
        await near.write(b"more")
    with pytest.raises((trio.ClosedResourceError, trio.BrokenResourceError)):
        near.try_write(b"more")


async def test_a_closed_stream_delivers_what_was_written_and_does_nothing_more(ends: Ends) -> None:
    near, far = ends
    await near.write(b"last words")
    near.close()
    near.close()
    near.abort()
    for read in (lambda: near.read_nowait(100), lambda: near.try_write(b"x")):
        with pytest.raises(trio.ClosedResourceError):
            read()
    for use in (lambda: near.read(100), lambda: near.write(b"x"), near.aclose):
        if use == near.aclose:
            await use()
        else:
            with pytest.raises(trio.ClosedResourceError):
                await use()
    assert await far.read(100) == b"last words"
    assert await far.read(100) == b""


async def test_closing_wakes_the_tasks_that_wait(bounded: Ends) -> None:
    near, _ = bounded
    closed: list[str] = []

    async def wait(name: str, use: Callable[[], Awaitable[object]]) -> None:
        try:
            await use()
        except trio.ClosedResourceError:
            closed.append(name)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, "read", lambda: near.read(100))
            nursery.start_soon(wait, "write", lambda: near.write(bytes(20_000_000)))
            await wait_all_tasks_blocked()
            near.close()
    assert sorted(closed) == ["read", "write"]


async def test_an_aborted_stream_is_an_error_for_its_peer(ends: Ends) -> None:
    near, far = ends
    near.abort()
    await trio.sleep(0.01)
    with pytest.raises(trio.BrokenResourceError):
        await far.read(100)
    with pytest.raises(trio.BrokenResourceError):
        far.try_write(b"x")
    with pytest.raises(trio.BrokenResourceError):
        await far.write(b"x")


async def test_a_peer_that_leaves_is_known_to_a_writer_that_waits(bounded: Ends) -> None:
    near, far = bounded

    async def write() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await near.write(bytes(20_000_000))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await wait_all_tasks_blocked()
            far.abort()


async def test_each_end_knows_both_addresses() -> None:
    for connect in (tcp, simulated):
        near, far = await connect()
        async with near, far:
            assert near.local_address == far.peer_address
            assert near.peer_address == far.local_address
            assert [len(each) for each in (near.local_address, near.peer_address)] == [2, 2]


# Sockets


async def test_the_descriptor_is_readable_when_there_is_something_to_read() -> None:
    near, far = await tcp()
    async with near, far:
        assert far.descriptor is not None
        with trio.move_on_after(0.01) as waited:
            await trio.lowlevel.wait_readable(far.descriptor)
        assert waited.cancelled_caught
        near.try_write(b"x")
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(far.descriptor)
        assert far.read_nowait(100) == b"x"


async def test_a_socket_that_is_closed_after_its_reader_was_woken_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near, far = await tcp()
    number = far.descriptor
    used: list[int] = []

    async def wake(descriptor: int) -> None:
        far.close()

    def read(descriptor: int, limit: int) -> bytes:
        used.append(descriptor)
        return os.read(descriptor, limit)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wake)
    monkeypatch.setattr("trio_cluster.net.streams.os", SimpleNamespace(read=read))
    async with near:
        with pytest.raises(trio.ClosedResourceError):
            await far.read(100)
    # By then, it may be the number of another connection.
    assert number not in used


async def test_another_thread_may_write_while_the_loop_is_blocked() -> None:
    near, far = await tcp()
    async with near, far:
        assert near.injectable
        thread = threading.Thread(target=near.try_write, args=(b"from a thread",))
        thread.start()
        thread.join()
        assert await far.read(100) == b"from a thread"


async def test_a_socket_without_an_address_says_so() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with TcpStream(trio.SocketStream(trio.socket.from_stdlib_socket(ours))) as stream:
            with pytest.raises(OSError, match="ddress family"):
                _ = stream.peer_address


async def test_the_address_of_a_client_that_has_left_is_an_error() -> None:
    near, far = await tcp()
    async with near, far:
        near.abort()
        await trio.sleep(0.01)
        with pytest.raises(OSError, match="not connected"):
            _ = far.peer_address


async def test_connections_that_wait_are_accepted_without_waiting() -> None:
    sock = listening_socket()
    listener = TcpListener(sock)
    assert listener.local_address == sock.getsockname()
    with pytest.raises(trio.WouldBlock):
        listener.accept_nowait()
    client = socket.create_connection(listener.local_address)
    with client:
        async with listener.accept_nowait() as stream:
            assert stream.peer_address == client.getsockname()
    await listener.aclose()
    listener.close()
    with pytest.raises(trio.ClosedResourceError):
        listener.accept_nowait()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()

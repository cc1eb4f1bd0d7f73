"""The supervisor of a group, with small programs as its members."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from trio_cluster.group.messages import (
    Ask,
    Message,
    Replies,
    Reply,
    Request,
    Response,
    Start,
    Up,
    decode,
    encode,
)
from trio_cluster.group.metrics import merge_metrics
from trio_cluster.group.supervisor import Supervisor
from trio_cluster.net.streams import TcpListener

pytestmark = pytest.mark.processes

#: Says what happens to it on a connection to a port, and serves when it is told to there.
MEMBER = """
import os, signal, socket, sys
supervisor = socket.socket(fileno=int(os.environ["_TRIO_CLUSTER_GROUP_SOCKET"]))
test = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
test.sendall(b"begun\\n")
test.recv(1)
signal.signal(signal.SIGHUP, lambda *_: test.sendall(b"reload\\n"))
supervisor.sendall(sys.argv[2].encode() + b"\\n")
while supervisor.recv(65536):
    pass
"""

#: Passes on what the supervisor and the test send each other through it. Ends when either closes its connection.
RELAY = """
import os, select, socket, sys
supervisor = socket.socket(fileno=int(os.environ["_TRIO_CLUSTER_GROUP_SOCKET"]))
test = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
while True:
    for source in select.select([supervisor, test], [], [])[0]:
        data = source.recv(65536)
        if not data:
            sys.exit()
        (test if source is supervisor else supervisor).sendall(data)
"""
UP = Up("http://127.0.0.1:1", [])


def listener() -> TcpListener:
    opened = socket.create_server(("127.0.0.1", 0))
    opened.setblocking(False)
    return TcpListener(opened)


@asynccontextmanager
async def lines_of(stream: trio.SocketStream) -> AsyncIterator[trio.MemoryReceiveChannel[bytes]]:
    """The lines of a member, one after the other."""
    send, receive = trio.open_memory_channel[bytes](10)

    async def read() -> None:
        received = b""
        async for data in stream:
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                await send.send(line)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        yield receive
        nursery.cancel_scope.cancel()


async def test_a_member_that_does_not_serve_yet_reads_its_configuration_again_when_it_does() -> None:
    (meeting,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = str(meeting.socket.getsockname()[1])
    clients, workers = [listener()], [listener()]
    command = [sys.executable, "-S", "-c", MEMBER, port, encode(UP).decode()]
    supervisor = Supervisor(1, "m", command, dict(os.environ), clients, workers)
    served = trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.run, lambda _: served.set())
            async with await meeting.accept() as stream, lines_of(stream) as lines:
                assert await lines.receive() == b"begun"
                await supervisor.reload_members()
                await stream.send_all(b"!")
                await served.wait()
                assert await lines.receive() == b"reload"
                await supervisor.reload_members()
                assert await lines.receive() == b"reload"
            nursery.cancel_scope.cancel()
    await meeting.aclose()
    for each in (*clients, *workers):
        each.close()


async def test_what_a_process_has_counted_that_ends_during_a_scrape_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trio_cluster.group.supervisor.PATIENCE", 60.0)
    (meeting,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    command = [sys.executable, "-S", "-c", RELAY, str(meeting.socket.getsockname()[1])]
    clients, workers = [listener()], [listener()]
    supervisor = Supervisor(3, "m", command, dict(os.environ), clients, workers)
    served = trio.Event()
    members: dict[int, tuple[trio.SocketStream, trio.MemoryReceiveChannel[bytes]]] = {}

    async def begin(stream: trio.SocketStream) -> None:
        async with stream, lines_of(stream) as lines:
            start = decode(await lines.receive())
            assert isinstance(start, Start)
            members[start.process] = stream, lines
            await stream.send_all(encode(UP) + b"\n")
            await trio.sleep_forever()

    async def send(process: int, message: Message) -> None:
        await members[process][0].send_all(encode(message) + b"\n")

    async def asked(process: int) -> int:
        message = decode(await members[process][1].receive())
        assert isinstance(message, Ask)
        return message.id

    async def replies() -> list[bytes]:
        message = decode(await members[0][1].receive())
        assert isinstance(message, Replies)
        return [
            message.retired,
            *(each.response.body for each in message.processes if each.response is not None),
        ]

    counted = Response(
        200,
        [],
        b"# HELP trio_cluster_n_total N.\n# TYPE trio_cluster_n_total counter\ntrio_cluster_n_total 1.0\n",
    )
    scrape = Ask(7, Request("GET", "/metrics"), own=counted)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.run, lambda _: served.set())
            for _ in range(3):
                nursery.start_soon(begin, await meeting.accept())
            await served.wait()
            await send(0, scrape)
            for process in (1, 2):
                await send(process, Reply(await asked(process), counted))
            assert b"trio_cluster_n_total 3.0" in merge_metrics(await replies())

            await send(0, scrape)
            await send(1, Reply(await asked(1), counted))
            await members[1][0].send_eof()
            # It is started again: its end has been noticed.
            async with await meeting.accept():
                await send(2, Reply(await asked(2), counted))
                assert b"trio_cluster_n_total 3.0" in merge_metrics(await replies())
            nursery.cancel_scope.cancel()
    await meeting.aclose()
    for each in (*clients, *workers):
        each.close()

"""The supervisor of a group, with small programs as its members."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from trio_cluster.group.messages import Up, encode
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
    up = encode(Up("http://127.0.0.1:1", [])).decode()
    clients, workers = [listener()], [listener()]
    command = [sys.executable, "-S", "-c", MEMBER, port, up]
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

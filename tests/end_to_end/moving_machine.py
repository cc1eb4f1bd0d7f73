"""A master and a worker on a machine that gets another address while their connection has fallen silent.

To be run in a network namespace of its own, by root: ``unshare -n python moving_machine.py``. Prints ``before`` when
the connection is silent, and nothing comes of it; ``after N`` when the address was added, and the stream goes on, on
connection number N.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

import trio

from trio_cluster import ChatRequest, ClusterServer, ClusterServerOptions, ServerOptions

#: So long that nothing here is found out by silence.
OPTIONS = {"heartbeat_interval": 60.0, "worker_timeout": 600.0}


def ip(*words: str) -> None:
    """Run ``ip``."""
    subprocess.run(["ip", *words], check=True)


class Way:
    """From the worker to the master; each connection can fall silent.

    Attributes:
        connections: how many there have been.
        silent: how many of them, from the first one on, pass nothing any more.
    """

    def __init__(self) -> None:
        self.connections = 0
        self.silent = 0

    async def join(self, near: trio.SocketStream) -> None:
        """Join a connection with one to the master."""
        self.connections += 1
        number = self.connections
        async with near, await trio.open_tcp_stream("127.0.0.1", 9080) as far, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, near, far, number)
            nursery.start_soon(self._copy, far, near, number)

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream, number: int) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some():
                if number > self.silent:
                    await sink.send_all(data)


async def numbers(request: ChatRequest) -> AsyncIterator[str]:
    """Count without an end."""
    number = 0
    while True:
        yield f"{number} "
        number += 1
        await trio.sleep(0.02)


async def read(port: int, arrived: list[bytes]) -> None:
    """Read a stream."""
    body = b'{"model": "numbers", "stream": true, "messages": [{"role": "user", "content": "?"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    while data := await stream.receive_some():
        arrived.append(data)


async def wait_for_more(arrived: list[bytes]) -> None:
    """Wait until something of the stream comes."""
    count = len(arrived)
    # Another task cannot set an event of ours.
    while len(arrived) == count:  # noqa: ASYNC110
        await trio.sleep(0.01)


async def main() -> None:
    """Move."""
    ip("link", "set", "lo", "up")
    master = ClusterServer(ClusterServerOptions(ServerOptions("127.0.0.1", 8080), **OPTIONS))
    worker = ClusterServer(ClusterServerOptions(ServerOptions(), **OPTIONS))
    worker.register_chat("numbers", numbers)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    way = Way()
    arrived: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, way.join, [listener])
        await nursery.start(master.run_as_master)
        await nursery.start(partial(worker.run_as_worker, "127.0.0.1", listener.socket.getsockname()[1]))
        nursery.start_soon(read, 8080, arrived)
        await wait_for_more(arrived)
        way.silent = 1
        # What was on its way comes, and then nothing.
        with suppress(trio.TooSlowError):
            while True:
                with trio.fail_after(0.3):
                    await wait_for_more(arrived)
        print("before", flush=True)
        ip("addr", "add", "10.215.0.1/32", "dev", "lo")
        with trio.fail_after(30):
            while way.connections == 1:  # noqa: ASYNC110
                await trio.sleep(0.01)
            await wait_for_more(arrived)
        print("after", way.connections, flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)

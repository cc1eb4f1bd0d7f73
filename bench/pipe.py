"""The floor under a relay: bytes from one socket to another on trio, with nothing read or decided in between.

Prints ``port N`` when it is there.

    python bench/pipe.py PORT
"""

from __future__ import annotations

import sys
from functools import partial

import trio


async def copy(source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Pass on what comes until either end is gone."""
    try:
        while data := await source.receive_some(65536):
            await sink.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()


async def join(port: int, client: trio.SocketStream) -> None:
    """Be one connection."""
    async with (
        client,
        await trio.open_tcp_stream("127.0.0.1", port) as server,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(copy, client, server, nursery.cancel_scope)
        nursery.start_soon(copy, server, client, nursery.cancel_scope)


async def main() -> None:
    """Serve until standard input ends."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print("port", listeners[0].socket.getsockname()[1], flush=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, partial(join, int(sys.argv[1])), listeners)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)

"""What lies between a worker and its master, and cuts the connections that pass it.

Prints ``port N`` when it is there. It reads what to do, one line for each, and prints at which moment it was done, in
nanoseconds of the monotonic clock:

- ``reset``: all connections are reset, to both sides. What was on its way is lost.
- ``swallow SECONDS``: nothing gets through for so long, in either direction. Connections that are there never pass
  anything again, and tell neither side that the other one has left, as with a router that has forgotten them. New ones
  are only let through when the time is over.

    python bench/cutter.py HOST PORT
"""

from __future__ import annotations

import math
import socket
import struct
import sys
import time
from functools import partial

import trio


class Cutter:
    """All connections between the two.

    Args:
        host, port: where the master listens.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._joined: dict[trio.CancelScope, tuple[trio.SocketStream, trio.SocketStream]] = {}
        self._swallowed: set[trio.CancelScope] = set()
        self._through_from = -math.inf

    async def join(self, near: trio.SocketStream) -> None:
        """Join a connection of a worker with one to the master, until either is over."""
        async with near:
            await trio.sleep_until(self._through_from)
            try:
                far = await trio.open_tcp_stream(self._host, self._port)
            except OSError:
                return
            async with far, trio.open_nursery() as nursery:
                scope = nursery.cancel_scope
                self._joined[scope] = near, far
                nursery.start_soon(self._copy, near, far, scope)
                nursery.start_soon(self._copy, far, near, scope)
            del self._joined[scope]
            self._swallowed.discard(scope)

    async def _copy(
        self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        try:
            while data := await source.receive_some(65536):
                if scope in self._swallowed:
                    # The kernel takes what fits into its buffers, as it keeps what nothing has acknowledged.
                    await trio.sleep_forever()
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        if scope not in self._swallowed:
            scope.cancel()

    def reset(self) -> None:
        """See above."""
        for scope, streams in self._joined.items():
            for stream in streams:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stream.socket.close()
            scope.cancel()

    def swallow(self, seconds: float) -> None:
        """See above."""
        self._swallowed.update(self._joined)
        self._through_from = trio.current_time() + seconds

    async def obey(self) -> None:
        """Do what standard input says, until it ends."""
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            word, *seconds = line.split()
            now = time.monotonic_ns()
            if word == "reset":
                self.reset()
            else:
                self.swallow(float(seconds[0]))
            print(now, flush=True)


async def main() -> None:
    """Cut until standard input ends."""
    cutter = Cutter(sys.argv[1], int(sys.argv[2]))
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print("port", listeners[0].socket.getsockname()[1], flush=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, cutter.join, listeners))
        await cutter.obey()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)

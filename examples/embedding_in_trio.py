"""The server as a part of a larger trio program.

    python embedding_in_trio.py [PORT]

A program that watches something, here a simulated thermometer, and answers questions about it through the OpenAI API.
Watching and serving are tasks in one tree. The model and the program share plain Python state, because everything runs
in one thread; and when one of them fails, both stop.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import AsyncIterator

import trio

from trio_cluster import ChatRequest, ClusterServer


class Thermometer:
    """A temperature that changes, and that tasks can wait for."""

    def __init__(self) -> None:
        self.celsius = 20.0
        self._changed = trio.Event()

    async def watch(self) -> None:
        """Take a reading ten times a second, for ever."""
        while True:
            self.celsius = 20.0 + 5.0 * math.sin(trio.current_time())
            self._changed.set()
            self._changed = trio.Event()
            await trio.sleep(0.1)

    async def next_reading(self) -> float:
        """Wait for the next reading and return it."""
        await self._changed.wait()
        return self.celsius


async def main(port: int) -> None:
    """Watch and serve until a signal arrives."""
    thermometer = Thermometer()
    server = ClusterServer()
    server.options.server.host = "127.0.0.1"

    @server.chat("thermometer")
    async def report(request: ChatRequest) -> AsyncIterator[str]:
        """Yield the next readings; the message is their number."""
        for _ in range(int(request.last_text) if request.last_text.isdecimal() else 1):
            yield f"{await thermometer.next_reading():.2f} °C\n"

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as program:
            program.start_soon(thermometer.watch)
            async with trio.open_nursery() as serving:
                await serving.start(server.run_as_standalone, port)
                print(f"serving {server.url}/v1", flush=True)
                await anext(signals)
                # The thermometer runs until the server has stopped, because running requests need its readings.
                server.stop()
            program.cancel_scope.cancel(reason="the server has stopped")


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8080)

"""A server inside an asyncio program, whose handlers are written for asyncio as well.

    python inside_asyncio.py [PORT]

The program waits for a signal on its own event loop. Beside it runs a server, in a thread, with a model that is written
for asyncio too. A FastAPI application does the same in its `lifespan`:

    @asynccontextmanager
    async def lifespan(app):
        thread = await asyncio.to_thread(serve_in_thread, server, port=8080)
        try:
            yield
        finally:
            await asyncio.to_thread(thread.stop)

What the handlers use, such as a session of aiohttp, belongs to the loop that they run on. So it is opened and closed by
the hooks of that loop.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator

from trio_cluster import AsyncioLoop, ChatRequest, ClusterServer, from_asyncio, serve_in_thread


class Session:
    """Stands for what belongs to one event loop: a client session, a pool of connections, an engine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    async def fetch(self, number: int) -> str:
        """Return a line, after a moment."""
        assert asyncio.get_running_loop() is self._loop
        await asyncio.sleep(0.01)
        return f"line {number}\n"

    async def close(self) -> None:
        """Close what was opened."""
        await asyncio.sleep(0)


class Lines:
    """A model of lines, and the session that it uses."""

    def __init__(self) -> None:
        self._session: Session | None = None

    async def open(self) -> None:
        """Open the session, before the server accepts requests."""
        self._session = Session()

    async def close(self) -> None:
        """Close the session, after the last handler has ended."""
        assert self._session is not None
        await self._session.close()

    async def answer(self, request: ChatRequest) -> AsyncIterator[str]:
        """Yield lines; the message is their number."""
        assert self._session is not None
        for number in range(int(request.last_text) if request.last_text.isdecimal() else 1):
            yield await self._session.fetch(number)


async def main(port: int) -> None:
    """Serve until a signal arrives."""
    lines = Lines()
    server = ClusterServer()
    server.options.server.host = "127.0.0.1"
    server.register_chat("lines", from_asyncio(lines.answer, AsyncioLoop(lines.open, lines.close)))

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # Both calls block, so they run in a thread, and the program's loop goes on.
    thread = await asyncio.to_thread(serve_in_thread, server, server.run_as_standalone, port)
    try:
        print(f"serving {thread.url}/v1", flush=True)
        await stop.wait()
    finally:
        await asyncio.to_thread(thread.stop)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8080))

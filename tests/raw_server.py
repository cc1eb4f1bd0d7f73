"""A server whose every byte belongs to the test: it shows what it got, and sends what it is told, however wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeAlias

import trio

__all__ = ["RawServer", "Received", "Script", "Visit", "open_raw_server", "reply"]


class Received:
    """A request as it came.

    Attributes:
        line: its first line.
        headers: names in lower case; of those that came more than once, the last.
        raw_head: all that came before the body.
        body: without its framing.
    """

    def __init__(self, raw_head: bytes) -> None:
        self.raw_head = raw_head
        self.line, *lines = raw_head.decode("latin-1").split("\r\n")
        self.headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        self.body = b""

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def target(self) -> str:
        return self.line.split(" ")[1]


class Visit:
    """One connection that a client has opened."""

    def __init__(self, server: RawServer, stream: trio.SocketStream) -> None:
        self._server = server
        self.stream = stream
        self.rest = b""

    async def head(self) -> Received:
        """Receive the head of the next request; ``trio.EndOfChannel`` if there is none."""
        while b"\r\n\r\n" not in self.rest:
            await self._more()
        raw, _, self.rest = self.rest.partition(b"\r\n\r\n")
        received = Received(raw)
        self._server.received.append(received)
        return received

    async def request(self) -> Received:
        """Receive the next request whole."""
        received = await self.head()
        if "chunked" in received.headers.get("transfer-encoding", ""):
            while (size := int(await self._line(), 16)) or await self._line():
                received.body += await self._exactly(size)
                assert await self._line() == b""
        else:
            received.body = await self._exactly(int(received.headers.get("content-length", "0")))
        return received

    def unread(self, received: Received) -> None:
        """Put the head that was just received back, for somebody else to receive."""
        self._server.received.remove(received)
        self.rest = received.raw_head + b"\r\n\r\n" + self.rest

    async def send(self, *parts: bytes) -> None:
        """Send each part on its own."""
        for part in parts:
            await self.stream.send_all(part)

    async def closed(self, within: float = 2, *, silent: bool = False) -> None:
        """Wait until the client has closed the connection; ``trio.TooSlowError`` if it does not.

        Args:
            within: seconds for that.
            silent: count them from the last thing that the client has sent.
        """
        with trio.fail_after(within) as scope:
            try:
                while await self.stream.receive_some(65536):
                    if silent:
                        scope.deadline = trio.current_time() + within
            except trio.BrokenResourceError:
                pass

    async def _more(self) -> None:
        try:
            data = await self.stream.receive_some(65536)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        if not data:
            raise trio.EndOfChannel
        self.rest += data

    async def _line(self) -> bytes:
        while b"\r\n" not in self.rest:
            await self._more()
        line, _, self.rest = self.rest.partition(b"\r\n")
        return line

    async def _exactly(self, size: int) -> bytes:
        pieces = []
        while len(self.rest) < size:
            pieces.append(self.rest)
            size -= len(self.rest)
            self.rest = b""
            await self._more()
        pieces.append(self.rest[:size])
        self.rest = self.rest[size:]
        return b"".join(pieces)


Script: TypeAlias = Callable[[Visit], Awaitable[None]]


class RawServer:
    """Runs its script for each connection, and closes that when the script has returned.

    Attributes:
        received: all requests, in the order of their heads.
        visits: all connections, those that are over included.
        at_end: called when the test is done with the server.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.received: list[Received] = []
        self.visits: list[Visit] = []
        self.at_end: list[Callable[[], None]] = []
        self.port = 0
        self._scope = trio.CancelScope()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        self._scope = trio.CancelScope()
        with self._scope:
            await trio.serve_listeners(self._serve_one, listeners, task_status=_Started(task_status))

    def stop(self) -> None:
        """Close everything, as the end of a process does."""
        self._scope.cancel()

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        visit = Visit(self, stream)
        self.visits.append(visit)
        async with stream:
            with suppress(trio.EndOfChannel, trio.BrokenResourceError):
                await self.script(visit)


class _Started:
    """Tells that the server is there, and not with what."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()


@asynccontextmanager
async def open_raw_server(script: Script) -> AsyncIterator[RawServer]:
    """Have such a server on a port of its own."""
    server = RawServer(script)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        try:
            yield server
        finally:
            for callback in server.at_end:
                callback()
        nursery.cancel_scope.cancel()


def reply(
    body: bytes, status: str = "200 OK", content_type: str = "application/json", *headers: str
) -> bytes:
    """Return a plain answer."""
    lines = [f"HTTP/1.1 {status}", f"content-type: {content_type}", f"content-length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body

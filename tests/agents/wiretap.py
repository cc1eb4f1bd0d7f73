"""What an agent sends: a relay in front of the server that keeps all requests, and a proxy that lets nothing out."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs
import h11
import trio

__all__ = ["Outbound", "SeenRequest", "Wiretap", "open_outbound", "open_wiretap"]

_STATUS: Final = re.compile(rb"^HTTP/1\.1 ([2-5]\d\d) ", re.M)


@attrs.frozen
class SeenRequest:
    """One request, as it was on the wire."""

    method: str
    target: str
    headers: dict[str, str]
    content: bytes = attrs.field(repr=False)

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def body(self) -> dict[str, Any]:
        """The body, if it is a JSON object."""
        try:
            body = json.loads(self.content)
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}


@attrs.define
class _Connection:
    """What both ends of one connection have sent."""

    sent: bytearray = attrs.field(factory=bytearray)
    received: bytearray = attrs.field(factory=bytearray)

    def requests(self) -> Iterator[SeenRequest]:
        """Yield the requests that are complete."""
        rest = bytes(self.sent)
        while rest:
            parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
            parser.receive_data(rest)
            head, content = None, bytearray()
            while not isinstance(event := parser.next_event(), h11.EndOfMessage):
                if event in (h11.NEED_DATA, h11.PAUSED) or isinstance(event, h11.ConnectionClosed):
                    return
                if isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    content += event.data
            assert head is not None
            headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
            yield SeenRequest(head.method.decode(), head.target.decode(), headers, bytes(content))
            rest = parser.trailing_data[0]


@attrs.define
class Wiretap:
    """A relay that keeps what passes through it.

    Attributes:
        url: where it listens; it relays to the server.
    """

    url: str
    _connections: list[_Connection] = attrs.field(factory=list)

    @property
    def requests(self) -> list[SeenRequest]:
        """All complete requests. Those of one connection are in order."""
        return [request for connection in self._connections for request in connection.requests()]

    @property
    def statuses(self) -> list[int]:
        """The status of every response."""
        return [
            int(found) for connection in self._connections for found in _STATUS.findall(connection.received)
        ]


@asynccontextmanager
async def open_wiretap(port: int) -> AsyncIterator[Wiretap]:
    """Relay to a port of this machine."""
    connections: list[_Connection] = []

    async def relay(client: trio.SocketStream) -> None:
        connection = _Connection()
        connections.append(connection)

        async def pump(source: trio.SocketStream, sink: trio.SocketStream, kept: bytearray) -> None:
            try:
                async for piece in source:
                    kept += piece
                    await sink.send_all(piece)
                await sink.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                nursery.cancel_scope.cancel()

        async with (
            client,
            await trio.open_tcp_stream("127.0.0.1", port) as server,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(pump, client, server, connection.sent)
            nursery.start_soon(pump, server, client, connection.received)

    async with _listener(relay) as url:
        yield Wiretap(url, connections)


@attrs.define
class Outbound:
    """A proxy that refuses everything.

    Attributes:
        url: where it listens.
        wanted: the addresses that were asked for.
    """

    url: str
    wanted: set[str] = attrs.field(factory=set)


@asynccontextmanager
async def open_outbound() -> AsyncIterator[Outbound]:
    """Be the only way to other machines, and refuse it."""
    wanted: set[str] = set()

    async def refuse(client: trio.SocketStream) -> None:
        async with client:
            try:
                head = (await client.receive_some()).decode("latin-1").split()
                if len(head) > 1:
                    wanted.add(head[1].removeprefix("http://").partition("/")[0])
                await client.send_all(
                    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            except trio.BrokenResourceError:
                pass

    async with _listener(refuse) as url:
        yield Outbound(url, wanted)


@asynccontextmanager
async def _listener(serve: Any) -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()

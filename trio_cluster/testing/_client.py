"""A client of a simulated cluster: HTTP/1.1 over a simulated stream, as patient or as rude as a test wants it.

It is no client for production and does not want to be one: each request has a connection of its own, and nothing is
followed, retried or decoded. What it is good at is saying exactly how an answer ended.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import attrs
import h11
import trio

from ..gateway.routes import MODEL_ROUTES
from ._grammar import StreamGrammarError, StreamReport, read_stream
from ._network import Host
from ._streams import SimulatedStream

__all__ = ["Answer", "SimulatedClient", "StreamingAnswer", "check_streams"]


@attrs.frozen
class Answer:
    """An answer, as far as it came."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    complete: bool
    """The answer ended as HTTP says an answer ends; otherwise the connection was lost in the middle of it."""

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What is inside the error envelope."""
        inside: dict[str, Any] = self.json()["error"]
        return inside

    def report(self) -> StreamReport:
        """Return what the grammar checker says of the body.

        Raises:
            StreamGrammarError: it breaks the grammar, or HTTP and the stream disagree about how it ended.
        """
        report = read_stream(self.body)
        if self.complete != (report.ending == "finished"):
            raise StreamGrammarError(
                f"a stream that was {report.ending}, in a body that was complete={self.complete}"
            )
        return report


class StreamingAnswer:
    """An answer that is being received. A client that is slow is one that does not call :meth:`receive`.

    Attributes:
        status: the HTTP status.
        headers: names in lower case.
        received: the bytes of the body so far.
        over: nothing more can come.
        complete: the answer ended as HTTP says an answer ends.
        path: what was asked for; empty if that is not known.
    """

    def __init__(
        self, stream: SimulatedStream, connection: h11.Connection, head: h11.Response, path: str = ""
    ) -> None:
        self.path = path
        self.status: int = head.status_code
        self.headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        self.received = b""
        self.complete = False
        self._stream = stream
        self._connection = connection
        self.over = False

    async def receive(self) -> bytes:
        """Return the next bytes of the body.

        Raises:
            trio.EndOfChannel: there are no more, because it is complete or because the connection is lost.
        """
        while not self.over:
            event = await _next_event(self._stream, self._connection)
            if isinstance(event, h11.Data):
                data = bytes(event.data)
                self.received += data
                return data
            self.over = True
            self.complete = isinstance(event, h11.EndOfMessage)
        raise trio.EndOfChannel

    async def receive_until(self, text: bytes) -> None:
        """Receive until ``text`` has been in the body.

        Raises:
            trio.EndOfChannel: it ended before.
        """
        while text not in self.received:
            await self.receive()

    async def finish(self) -> Answer:
        """Receive all the rest, and return the whole."""
        try:
            while True:
                await self.receive()
        except trio.EndOfChannel:
            return self.so_far()

    def so_far(self) -> Answer:
        """Return what has been received until now."""
        return Answer(self.status, self.headers, self.received, self.complete)

    def leave(self) -> None:
        """Close the connection, as a client does that has lost interest."""
        self._stream.close()

    def reset(self) -> None:
        """Reset the connection, as a client does that crashes with bytes unread."""
        self._stream.close(reset=True)


def check_streams(answers: Iterable[StreamingAnswer]) -> None:
    """Check everything that was received of streams of events: the grammar, and that HTTP agrees about the end.

    A stream that its client has left is checked as far as it came. What a route of the user's own streams has a grammar
    of its own, and is not checked.

    Raises:
        StreamGrammarError: one of them breaks the grammar, or is complete without having finished, or has finished
            without being complete.
    """
    for answer in answers:
        path = answer.path.partition("?")[0].rstrip("/")
        is_known = not path or path in MODEL_ROUTES
        if is_known and answer.headers.get("content-type", "").startswith("text/event-stream"):
            if answer.over:
                answer.so_far().report()
            else:
                read_stream(answer.received)


class SimulatedClient:
    """Somebody who asks a simulated node.

    Args:
        host: the machine that the client is on.
        server: the name of the machine to ask.
        port: its port.
        headers: sent with every request.
        on_answer: called with each answer when it begins.
    """

    def __init__(
        self,
        host: Host,
        server: str,
        port: int,
        headers: Mapping[str, str] | None = None,
        on_answer: Callable[[StreamingAnswer], None] = lambda _: None,
    ) -> None:
        self._host = host
        self._server = server
        self._port = port
        self._headers = dict(headers or {})
        self._on_answer = on_answer

    async def get(self, path: str, **headers: str) -> Answer:
        """Get ``path``."""
        async with self.open("GET", path, headers=headers) as answer:
            return await answer.finish()

    async def post(self, path: str, value: Any = None, *, headers: Mapping[str, str] | None = None) -> Answer:
        """Post ``value`` as JSON, or as it is if it is bytes, and return the answer.

        Raises:
            OSError: nobody there, or the connection was lost before there was any answer.
        """
        async with self.open("POST", path, value, headers=headers) as answer:
            return await answer.finish()

    async def chat(self, model: str, content: str = "hi", *, stream: bool = True, **fields: Any) -> Answer:
        """Ask a chat model, and return the answer when it is over."""
        async with self.open_chat(model, content, stream=stream, **fields) as answer:
            return await answer.finish()

    @asynccontextmanager
    async def open_chat(
        self,
        model: str,
        content: str = "hi",
        *,
        stream: bool = True,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> AsyncIterator[StreamingAnswer]:
        """Ask a chat model, and give the answer as it comes. Leaving the block leaves the answer."""
        message = {"role": "user", "content": content}
        body = {"model": model, "messages": [message], "stream": stream, **fields}
        async with self.open("POST", "/v1/chat/completions", body, headers=headers) as answer:
            yield answer

    @asynccontextmanager
    async def open(
        self, method: str, path: str, value: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[StreamingAnswer]:
        """Send a request, and give the answer as it comes. Leaving the block leaves the answer."""
        stream = await self._host.connect(self._server, self._port)
        try:
            yield await self._context(stream, method, path, value, headers or {})
        finally:
            stream.close()

    async def _context(
        self, stream: SimulatedStream, method: str, path: str, value: Any, headers: Mapping[str, str]
    ) -> StreamingAnswer:
        body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        named = {"host": self._server, **self._headers, **headers}
        if value is not None:
            named = {"content-type": "application/json", "content-length": str(len(body)), **named}
        connection = h11.Connection(h11.CLIENT)
        request = connection.send(h11.Request(method=method, target=path, headers=list(named.items())))
        assert request is not None
        end = (connection.send(h11.Data(body)) or b"") + (connection.send(h11.EndOfMessage()) or b"")
        # A server that refuses a request may have answered before it has read all of it.
        with suppress(trio.BrokenResourceError):
            await stream.send_all(request + end)
        event = await _next_event(stream, connection)
        while isinstance(event, h11.InformationalResponse):
            event = await _next_event(stream, connection)
        if not isinstance(event, h11.Response):
            raise ConnectionResetError(104, "Connection reset by peer")
        answer = StreamingAnswer(stream, connection, event, path)
        self._on_answer(answer)
        return answer


async def _next_event(stream: SimulatedStream, connection: h11.Connection) -> Any:
    """Return the next event, or ``None`` if the connection was lost instead."""
    while True:
        try:
            event = connection.next_event()
            if event is not h11.NEED_DATA:
                return event
            connection.receive_data(await stream.receive_some())
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            return None

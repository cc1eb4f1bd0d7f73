"""A client of a simulated cluster: HTTP/1.1 over a simulated stream, which may read slowly, leave, or reset.

It is not a client for production: each request has a connection of its own, and nothing is followed, retried or
decoded. Its purpose is to report exactly how a response ended.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import attrs
import h11
import trio

from ..gateway.routes import MODEL_ROUTES
from ..net.sockets import Network
from ..net.streams import ByteStream
from ._deprecation import warn_renamed
from ._grammar import StreamGrammarError, StreamReport, read_stream

__all__ = ["Response", "SimulatedClient", "StreamingResponse", "check_streams"]

#: Bytes that are read at a time.
_RECEIVE: Final = 64 * 1024


@attrs.frozen
class Response:
    """A response, as far as it was received."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    complete: bool
    """The body ended as its HTTP framing says; otherwise the connection was lost in the middle of it."""

    def json(self) -> Any:
        """Return the body, decoded as JSON.

        Raises:
            ValueError: it is not JSON.
        """
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The members of the error envelope: ``message``, ``type``, ``param``, ``code``."""
        inside: dict[str, Any] = self.json()["error"]
        return inside

    def report(self) -> StreamReport:
        """Return what :func:`read_stream` reports of the body.

        Raises:
            StreamGrammarError: it breaks the grammar, or HTTP and the stream disagree about how it ended.
        """
        report = read_stream(self.body)
        # How the body of a failed stream ends is an option.
        if report.ending != "failed" and self.complete != (report.ending == "finished"):
            raise StreamGrammarError(
                f"a stream that was {report.ending}, in a body that was complete={self.complete}"
            )
        return report


class StreamingResponse:
    """A response that is being received. A client that reads slowly is one that rarely calls :meth:`receive`.

    Attributes:
        status: the HTTP status.
        headers: names in lower case.
        received: the bytes of the body so far.
        over: nothing more can come.
        complete: the body ended as its HTTP framing says.
        path: the path of the request; empty if that is not known.
    """

    def __init__(
        self, stream: ByteStream, connection: h11.Connection, head: h11.Response, path: str = ""
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
        """Return the next bytes of the body. A checkpoint, unless the response is over.

        Raises:
            trio.EndOfChannel: there are no more: the body is complete, or the connection was lost.
            trio.ClosedResourceError: the client has left.
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
        """Receive until the body contains ``text``. A checkpoint, unless it does already.

        Raises:
            trio.EndOfChannel: the body ended before.
        """
        while text not in self.received:
            await self.receive()

    async def finish(self) -> Response:
        """Receive the rest, and return the whole response. A checkpoint, unless the response is over."""
        try:
            while True:
                await self.receive()
        except trio.EndOfChannel:
            return self.so_far()

    def so_far(self) -> Response:
        """Return what has been received until now. Synchronous."""
        return Response(self.status, self.headers, self.received, self.complete)

    def leave(self) -> None:
        """Close the connection, as a client does that no longer wants the response. Synchronous."""
        self._stream.close()

    def reset(self) -> None:
        """Reset the connection, as a client does that crashes with bytes unread. Synchronous."""
        self._stream.abort()


def check_streams(responses: Iterable[StreamingResponse]) -> None:
    """Check every received stream of events: its grammar, and that HTTP agrees about how it ended.

    A stream that its client has left is checked as far as it was received. Streams of routes that the OpenAI API does
    not have follow a grammar of their own, and are not checked.

    Raises:
        StreamGrammarError: one of them breaks the grammar, or is complete without having finished, or has finished
            without being complete.
    """
    for response in responses:
        path = response.path.partition("?")[0].rstrip("/")
        is_known = not path or path in MODEL_ROUTES
        if is_known and response.headers.get("content-type", "").startswith("text/event-stream"):
            if response.over:
                response.so_far().report()
            else:
                read_stream(response.received)


class SimulatedClient:
    """A client of one simulated node.

    Args:
        network: that of the machine that the client runs on.
        server: the name of the node's machine.
        port: the node's port.
        headers: sent with every request.
        on_response: called with each response when its head has been received.
        on_answer: deprecated, the former name of ``on_response``.
    """

    def __init__(
        self,
        network: Network,
        server: str,
        port: int,
        headers: Mapping[str, str] | None = None,
        on_response: Callable[[StreamingResponse], None] = lambda _: None,
        *,
        on_answer: Callable[[StreamingResponse], None] | None = None,
    ) -> None:
        if on_answer is not None:
            warn_renamed("SimulatedClient(on_answer=...)", "on_response=")
            on_response = on_answer
        self._network = network
        self._server = server
        self._port = port
        self._headers = dict(headers or {})
        self._on_response = on_response

    async def get(self, path: str, **headers: str) -> Response:
        """Send a GET request, and return the response when it is over. A checkpoint.

        Raises:
            OSError: nothing listens, or the connection was lost before the response.
        """
        async with self.open("GET", path, headers=headers) as response:
            return await response.finish()

    async def post(
        self, path: str, value: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send a POST request, and return the response when it is over. A checkpoint.

        Args:
            path: with the query, if there is one.
            value: sent as JSON; ``bytes`` are sent as they are.
            headers: replace those that the client sends by itself.

        Raises:
            OSError: nothing listens, or the connection was lost before the response.
        """
        async with self.open("POST", path, value, headers=headers) as response:
            return await response.finish()

    async def chat(self, model: str, content: str = "hi", *, stream: bool = True, **fields: Any) -> Response:
        """Send a chat request, and return the response when it is over. A checkpoint.

        Args:
            model: the name of the model.
            content: the text of the only message.
            stream: ask for a stream.
            fields: more fields of the request.

        Raises:
            OSError: nothing listens, or the connection was lost before the response.
        """
        async with self.open_chat(model, content, stream=stream, **fields) as response:
            return await response.finish()

    @asynccontextmanager
    async def open_chat(
        self,
        model: str,
        content: str = "hi",
        *,
        stream: bool = True,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> AsyncIterator[StreamingResponse]:
        """Send a chat request, and yield the response while it is received. See :meth:`chat` and :meth:`open`."""
        message = {"role": "user", "content": content}
        body = {"model": model, "messages": [message], "stream": stream, **fields}
        async with self.open("POST", "/v1/chat/completions", body, headers=headers) as response:
            yield response

    @asynccontextmanager
    async def open(
        self, method: str, path: str, value: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[StreamingResponse]:
        """Send a request, and yield the response while it is received; the end of the block closes the connection.

        Raises:
            OSError: nothing listens, or the connection was lost before the response.
        """
        stream = await self._network.connect(self._server, self._port)
        try:
            yield await self._send_request(stream, method, path, value, headers or {})
        finally:
            stream.close()

    async def _send_request(
        self, stream: ByteStream, method: str, path: str, value: Any, headers: Mapping[str, str]
    ) -> StreamingResponse:
        body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        named = {"host": "localhost", **self._headers, **headers}
        if value is not None:
            named = {"content-type": "application/json", "content-length": str(len(body)), **named}
        connection = h11.Connection(h11.CLIENT)
        request = connection.send(h11.Request(method=method, target=path, headers=list(named.items())))
        assert request is not None
        end = (connection.send(h11.Data(body)) or b"") + (connection.send(h11.EndOfMessage()) or b"")
        # A server that refuses a request may have answered before it has read all of it.
        with suppress(trio.BrokenResourceError):
            await stream.write(request + end)
        event = await _next_event(stream, connection)
        while isinstance(event, h11.InformationalResponse):
            event = await _next_event(stream, connection)
        if not isinstance(event, h11.Response):
            raise ConnectionResetError(104, "Connection reset by peer")
        response = StreamingResponse(stream, connection, event, path)
        self._on_response(response)
        return response


async def _next_event(stream: ByteStream, connection: h11.Connection) -> Any:
    """Return the next event, or ``None`` if the connection was lost instead."""
    while True:
        try:
            event = connection.next_event()
            if event is not h11.NEED_DATA:
                return event
            connection.receive_data(await stream.read(_RECEIVE))
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            return None

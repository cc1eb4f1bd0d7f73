"""One HTTP/1.1 connection, served to an ASGI application.

Theory of operation
===================

Two tasks live as long as the connection. One reads, and does nothing else: it feeds the parser, which hands what it
finds to the requests it belongs to. The other takes one request after the other and runs the application for it. So
the connection is always being read while an answer is under way, which is how it is known at once that a client has
left, whatever the application is doing; it is told, and it is cancelled.

Reading stops only while more than :data:`UNREAD` bytes wait for the application, be they a body that it does not take
or requests that came too early. That is the backpressure on uploads.

Writing. The head of an answer is kept until there is a body to go with it, since one write costs as much as two
halves. Writes are ordinary trio: they wait for a slow client, and can be cancelled. A connection whose write was
cancelled or failed is never written to again.

How an answer is framed is decided in ``_framing``. An answer that the application does not end is not
ended here either: the connection is closed, and a client that knows HTTP sees that something is missing.

Why not hypercorn's own connection, under the same roof? It awaits in the middle of its state changes, shields its
writes, spawns tasks for each request and writes a head and a body as two segments: 550 microseconds for a request
that needs 150, and half of the cures in the gate. ``docs/design.md`` has the measurements.
"""

from __future__ import annotations

import functools
import math
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote

import httptools
import trio

from .._errors import ApiError, InvalidRequest
from .._ports import receive_when_ready
from ._exchange import Exchange
from ._framing import RequestState, answer_head, chunk, pieces_to_write, refusal
from ._gate import App, Message
from ._reply import error_reply

__all__ = ["HEAD_LIMIT", "UNREAD", "Http1Connection"]

#: Bytes that may wait for the application before the connection is read no further.
UNREAD: Final = 256 * 1024
#: Bytes that the head of a request may have.
HEAD_LIMIT: Final = 64 * 1024

_RECEIVE: Final = 64 * 1024
#: What a request counts for beside its body, so that a flood of small ones is held back too.
_REQUEST_WEIGHT: Final = 1024
#: Seconds that a client has to read a refusal before the connection is closed.
_LINGER_TIME: Final = 2.0
_NO_LINGER: Final = struct.pack("ii", 1, 0)
_HTTP2: Final = b"PRI * HTTP/2"
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}


class Http1Connection:
    """One connection.

    Args:
        stream: the accepted connection; closed when it is over.
        app: the ASGI application.
        state: the application's lifespan state, given to each request with this connection in it.
        state_key: under which key.
        idle_timeout: seconds between requests, and for the head of one.
    """

    def __init__(
        self, stream: Any, app: App, state: dict[str, Any], state_key: str, idle_timeout: float
    ) -> None:
        self._stream = stream
        self._app = app
        self._state = {**state, state_key: self}
        self._idle_timeout = idle_timeout
        # Of an IPv6 address only the first two parts.
        self._client = tuple(stream.socket.getpeername()[:2])
        self._server = tuple(stream.socket.getsockname()[:2])
        self._parser = httptools.HttpRequestParser(self)
        self._incoming = RequestState()
        self._head_size = 0
        self._requests: deque[RequestState] = deque()
        self._current: RequestState | None = None
        self._unread = 0
        self._reader = trio.lowlevel.ParkingLot()
        self._responder = trio.lowlevel.ParkingLot()
        self._idle = trio.CancelScope()
        self._serving = trio.CancelScope()
        self._refused: ApiError | None = None
        # No request is taken any more; and none is answered any more, not even one that has come.
        self._no_more = self._closing = False
        self._is_socket = isinstance(stream, trio.SocketStream)
        self._write_now = _write_now(stream)
        self._left_over = b""
        # An answer has begun and not ended; a write has.
        self._begun = self._torn = False
        self.gone = False

    # What others do to it

    def close_when_idle(self) -> None:
        """Take no more requests: close now if none is being answered, otherwise after it."""
        self._no_more = self._closing = True
        if self._current is None and not self._requests:
            self.close()

    def close(self) -> None:
        """Close it now. What has been written is still delivered; whoever waits for it gets an error."""
        # Its descriptor may soon be another connection's.
        self._write_now = None
        self._stream.socket.close()

    def reset(self) -> None:
        """Break it, so that the peer sees an error and not an end."""
        self._write_now = None
        self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._stream.socket.close()

    @property
    def arrived(self) -> bool:
        """Whether something of the body of the request that is being answered waits to be received, or all has come."""
        request = self._current
        return request is not None and (bool(request.body) or request.complete)

    # The short way for the pieces of a body, past tasks and ASGI

    @property
    def ready(self) -> bool:
        """Whether the next piece of the body that is being sent can be given to :meth:`send_nowait`.

        Not before the answer has begun, nor while a write is under way or has left something over.
        """
        request = self._current
        return not (
            request is None
            or request.answered
            or not request.chunked
            or self._torn
            or self._left_over
            or self.gone
            or self._write_now is None
        )

    def send_nowait(self, body: bytes | memoryview) -> bool:
        """Send a piece of the body, which must not be empty, without waking a task.

        Returns:
            Whether all of it has gone. If not, the rest is kept here, and the next ordinary ``send`` takes it along;
            until then nothing more can be sent this way.

        Raises:
            trio.WouldBlock: the connection is not :attr:`ready`.
        """
        write = self._write_now
        if write is None or not self.ready:
            raise trio.WouldBlock
        data = chunk(body)
        try:
            sent = write(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lose()
            return False
        if sent == len(data):
            return True
        self._left_over = data[sent:]
        return False

    async def serve(self) -> None:
        """Serve the connection until it is over."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._respond, nursery.cancel_scope)
                await self._read()
        finally:
            self.close()
            # Both refer to this: without them it is gone now, and not when the garbage collector comes.
            del self._parser, self._state

    # Reading

    async def _read(self) -> None:
        self._idle.deadline = trio.current_time() + self._idle_timeout
        with self._idle:
            while self._refused is None:
                try:
                    data = await self._receive_some()
                except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, ValueError):
                    # The last one: there is no descriptor any more, since it was closed while nobody was reading.
                    break
                if not data:
                    break
                # What follows the last request is nobody's; reading it shows when the client leaves.
                if not (self._no_more and self._incoming.complete):
                    self._feed(data)
                while self._unread > UNREAD:
                    await self._reader.park()
        if self._refused is not None:
            # The responder answers what came before, says what is wrong, and ends the connection.
            await trio.sleep_forever()
        self._lose()

    async def _receive_some(self) -> bytes:
        if self._is_socket:
            return await receive_when_ready(self._stream.socket, _RECEIVE)
        return bytes(await self._stream.receive_some(_RECEIVE))

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Nobody here speaks anything else. The request is answered like any other, and is the last one.
            self._no_more = True
            self._incoming.keep_alive = False
        except httptools.HttpParserInvalidMethodError:
            self._refuse(InvalidRequest("The method of this request is not known here", status=501))
        except httptools.HttpParserError as error:
            if data.startswith(_HTTP2):
                self._refuse(InvalidRequest("HTTP/2 is not spoken here; use HTTP/1.1", status=505))
            elif not (self._no_more and self._incoming.complete):
                self._refuse(InvalidRequest(f"This is not a request in HTTP/1.1: {error}"))
        # A head that was read in one piece is done with, whatever its size; this ends one that goes on and on.
        if self._head_size > HEAD_LIMIT:
            limit = f"The head of the request has more than {HEAD_LIMIT} bytes"
            self._refuse(InvalidRequest(limit, status=431))
        if self._responder:
            self._responder.unpark_all()

    def _refuse(self, error: ApiError) -> None:
        if self._refused is None:
            self._refused = error
            if self._incoming is self._current:
                # It is the body of the request that is being answered that makes no sense; there will be no more.
                self._serving.cancel(reason="the request is malformed")
            self._responder.unpark_all()

    def _lose(self) -> None:
        """Tell whoever works for the client that it has left."""
        self.gone = True
        self._serving.cancel(reason="client left")

    # The parser's callbacks

    def on_message_begin(self) -> None:
        """See httptools."""
        self._incoming = RequestState()

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        self._incoming.target += url
        self._head_size += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        name = name.lower()
        self._incoming.headers.append((name, value))
        if name == b"expect" and value.lower() == b"100-continue":
            self._incoming.expects_continue = True
        self._head_size += len(name) + len(value)

    def on_headers_complete(self) -> None:
        """See httptools."""
        request = self._incoming
        request.method = self._parser.get_method().decode("ascii")
        request.version = self._parser.get_http_version()
        request.keep_alive = self._parser.should_keep_alive()
        self._head_size = 0
        if self._no_more:
            return
        if any(
            name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in request.headers
        ):
            # The parser would take everything up to the end of the connection for the body.
            self._refuse(InvalidRequest("The only transfer encoding known here is 'chunked'", status=501))
            return
        self._no_more = not request.keep_alive
        self._idle.deadline = math.inf
        self._unread += _REQUEST_WEIGHT
        self._requests.append(request)

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._incoming.body.append(body)
        self._unread += len(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self._incoming.complete = True

    # Answering

    async def _respond(self, connection: trio.CancelScope) -> None:
        try:
            with self._serving:
                while (request := await self._next_request()) is not None:
                    await self._answer(request)
                    if not (request.answered and request.complete) or self._torn:
                        break
                    self._idle.deadline = trio.current_time() + self._idle_timeout
            if self._refused is not None and not (self._begun or self._torn or self.gone):
                await self._send_refusal(self._refused)
        finally:
            connection.cancel(reason="the connection is over")

    async def _next_request(self) -> RequestState | None:
        while not self._requests or self._closing:
            if self._closing or self._refused is not None:
                return None
            await self._responder.park()
        request = self._requests.popleft()
        if self._refused is not None and not request.complete:
            return None
        self._current = request
        return request

    async def _answer(self, request: RequestState) -> None:
        async def receive() -> Message:
            return await self._receive(request)

        async def send(message: Message) -> None:
            await self._send(request, message)

        try:
            await self._app(self._scope(request), receive, send)
        finally:
            self._current = None
            self._unread -= _REQUEST_WEIGHT + sum(map(len, request.body))
            request.body.clear()
            self._reader.unpark_all()

    def _scope(self, request: RequestState) -> dict[str, Any]:
        target, _, query = request.target.partition(b"?")
        path = target.decode("latin-1")
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": request.version,
            "method": request.method,
            "scheme": "http",
            "path": unquote(path) if "%" in path else path,
            "raw_path": target,
            "query_string": query,
            "root_path": "",
            "headers": request.headers,
            "client": self._client,
            "server": self._server,
            "state": self._state,
            "extensions": {},
        }

    async def _receive(self, request: RequestState) -> Message:
        if request.expects_continue and not (request.complete or request.body or request.head_sent):
            request.expects_continue = False
            await self._write(_CONTINUE)
        while not self.gone and not request.answered:
            if request.body or (request.complete and not request.handed_over):
                body = request.body[0] if len(request.body) == 1 else b"".join(request.body)
                request.body.clear()
                self._unread -= len(body)
                self._reader.unpark_all()
                request.handed_over = request.complete
                return {"type": "http.request", "body": body, "more_body": not request.complete}
            await self._responder.park()
        await trio.lowlevel.checkpoint()
        return {"type": "http.disconnect"}

    async def _send(self, request: RequestState, message: Message) -> None:
        kind = message["type"]
        if self.gone:
            # The application is cancelled; it must not run on because it never waits for anything but us.
            await trio.lowlevel.checkpoint()
        elif kind == "http.response.start":
            request.start = message
        elif kind == "http.response.body":
            body, more = message.get("body", b""), message.get("more_body", False)
            head = b""
            if not request.head_sent:
                head, self._closing = answer_head(request, len(body), more, self._closing)
                self._begun = True
            if request.bodiless:
                body = b""
            for data in pieces_to_write(head, body, chunked=request.chunked, last=not more):
                if data or self._left_over:
                    await self._write(data)
            if not more:
                request.answered = True
                self._begun = False
                self._responder.unpark_all()

    async def _write(self, data: bytes) -> None:
        if self._torn:
            # The last write was cut off, so nothing that is written now would be read as what it is.
            self._lose()
            await trio.lowlevel.checkpoint()
            return
        if self._left_over:
            data, self._left_over = self._left_over + data, b""
        self._torn = True
        # Of a large piece that is not taken at once, no copies are made.
        rest: bytes | memoryview = memoryview(data) if self._is_socket else data
        try:
            if self._is_socket and self._write_now is not None:
                # Nearly always the socket takes it all, and then there is nothing to wait for.
                try:
                    rest = rest[self._write_now(rest) :]
                except BlockingIOError:
                    pass
                except OSError as error:
                    raise trio.BrokenResourceError from error
            if rest:
                await self._stream.send_all(rest)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lose()
            await trio.lowlevel.checkpoint()
            return
        self._torn = False

    async def _send_refusal(self, error: ApiError) -> None:
        """Say what is wrong with what came, and see to it that the client can read that before the end."""
        await self._write(refusal(error_reply(error), Exchange(()).request_id))
        with trio.move_on_after(_LINGER_TIME):
            try:
                await self._stream.send_eof()
                while await self._stream.receive_some(_RECEIVE):
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass


def _write_now(stream: Any) -> Callable[[bytes | memoryview], int] | None:
    """Return what writes to the connection without waiting, as ``os.write`` does; ``None`` if nothing can."""
    if isinstance(stream, trio.SocketStream):
        return functools.partial(os.write, stream.socket.fileno())
    write: Callable[[bytes | memoryview], int] | None = getattr(stream.socket, "send_nowait", None)
    return write

"""One HTTP/1.1 connection, served to an ASGI application.

Theory of operation
===================

*One task answers.* A connection has one task, which takes one request after the other and runs the application for it.

*Another task reads.* A reader (``net/readers.py``) passes what arrives to :meth:`Http1Connection.data_received`, which
runs the parser (``parser.py``) and wakes the connection's task. So the connection is read also while an answer is being
sent, whatever the application is doing; if the client leaves, the application is cancelled at once.

*Backpressure on uploads.* Reading stops while more than :data:`UNREAD` bytes wait for the application, be they a body
that it does not take or further requests.

*Writing.* The head of an answer is kept until the first piece of its body, so that both are one write. Writes wait for
a slow client, and can be cancelled. A connection whose write was cancelled or failed is never written to again. Pieces
of a body may also be written past the task, on the fast path (:meth:`Http1Connection.send_nowait`).

*The end.* How an answer is framed is decided in ``framing.py``. An answer that the application does not end is not
ended here either: the connection is closed, and an HTTP client sees that something is missing.

Why not hypercorn's connection? It awaits in the middle of its state changes, shields its writes, starts tasks for each
request and writes a head and a body as two segments: 550 microseconds for a request that takes 150 here.
``docs/design.md`` has the measurements. Where HTTP/2 is needed, ``hypercorn_server/`` takes the place of this folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote

import attrs
import trio

from ..net.idle import IdleTimeout
from ..net.readers import Reader
from ..net.streams import ByteStream
from .asgi import CONNECTION_KEY, App, Message
from .framing import RequestState, pieces_to_write, refusal_response, response_head
from .parser import RequestParser
from .refusal import HttpRefusal, RenderRefusal, render_as_text

__all__ = ["UNREAD", "Http1Connection"]

#: Bytes that may wait for the application before the connection is read no further.
UNREAD: Final = 256 * 1024

#: Bytes that are read at a time, and dropped, after a refusal.
_RECEIVE: Final = 64 * 1024
#: Seconds that a client has to read a refusal before the connection is closed.
_LINGER_TIME: Final = 2.0
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}


class Http1Connection:
    """One connection.

    Args:
        stream: the accepted connection; closed when it is over.
        app: the ASGI application.
        state: the application's lifespan state, given to each request, with this connection under ``CONNECTION_KEY``.
        reader: reads the connection; must run until it is over.
        idle: bounds the time between requests, and the time that the head of one may take; must run as well.
        render_refusal: makes the answer to what is not a request.

    Attributes:
        gone: whether the client has left, or the connection was closed here.
        closed: whether it was closed here before the client had left.

    Raises:
        OSError: the client has left already.
    """

    def __init__(
        self,
        stream: ByteStream,
        app: App,
        state: dict[str, Any],
        reader: Reader,
        idle: IdleTimeout,
        render_refusal: RenderRefusal = render_as_text,
    ) -> None:
        self._stream = stream
        self._app = app
        self._state = {**state, CONNECTION_KEY: self}
        self._render_refusal = render_refusal
        self._client = stream.peer_address
        self._server = stream.local_address
        self._scheme = "http" if stream.tls is None else "https"
        self._parser = RequestParser()
        self._reading = reader.reading(stream, self)
        self._is_paused = False
        self._idle = idle
        self._current: RequestState | None = None
        self._responder = trio.lowlevel.ParkingLot()
        self._serving = trio.CancelScope()
        # No further request is answered, not even one that has arrived.
        self._closing = False
        # The next answer is the last one; as long as none has begun, the connection stays open.
        self._last = False
        self._error: Exception | None = None
        self._left_over = b""
        # Writes to the stream, while a piece of a body may be written past the task: between two writes of a body that
        # is in chunks.
        self._direct_write: Callable[[bytes | memoryview], int] | None = None
        # An answer has begun and not ended.
        self._begun = False
        # A write has begun and not ended, or was cut off.
        self._torn = False
        self.gone = self.closed = False

    # For the server

    def close_when_idle(self) -> None:
        """Take no more requests: close now if none is being answered, otherwise after it. Synchronous."""
        self._parser.no_more = self._closing = True
        if self._current is None and not self._parser.requests:
            self.close()

    def close_after_next(self) -> None:
        """Announce the end of the connection with the next answer, and close it then. Synchronous, idempotent."""
        self._last = True

    def close(self) -> None:
        """Close the connection now. Synchronous, idempotent.

        What has been written is still delivered. The application is cancelled if it is answering a request.
        """
        self.closed = self.closed or not self.gone
        self._connection_lost()
        self._stream.close()

    def expire(self) -> None:
        """End the connection, which has been idle for too long. Synchronous."""
        self._connection_lost()

    # For the application

    def reset(self) -> None:
        """Break the connection, so that the peer gets an error instead of an end of file. Synchronous, idempotent."""
        self._connection_lost()
        self._stream.abort()

    @property
    def arrived(self) -> bool:
        """Whether ``receive`` has something at once: a part of the current request's body, or the end of it."""
        request = self._current
        return request is not None and (bool(request.body) or request.complete)

    # The fast path for the pieces of a body, past tasks and ASGI

    @property
    def ready(self) -> bool:
        """Whether the next piece of the body that is being sent may be passed to :meth:`send_nowait`.

        It may not before the answer has begun, nor while a write is in progress or has left a rest.
        """
        return self._direct_write is not None

    def send_nowait(self, body: bytes | memoryview, *, droppable: bool = False) -> bool:
        """Send a piece of the body without waking a task. Synchronous.

        Args:
            body: the piece; must not be empty.
            droppable: drop the piece if the client has not read what was sent before, so that nothing of it can be
                written. With TLS it is kept nevertheless, since it is encrypted already.

        Returns:
            Whether all of it was written, or it was dropped. If not, the rest is kept here, and written before whatever
            the next ``send`` of the application sends; until then the connection is not :attr:`ready`.

        Raises:
            trio.WouldBlock: the connection is not :attr:`ready`.
        """
        write = self._direct_write
        if write is None:
            raise trio.WouldBlock
        data: bytes = b"%x\r\n%b\r\n" % (len(body), body)  # type: ignore[str-format]  # it takes both
        try:
            sent = write(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._connection_lost()
            return False
        if sent == len(data) or (droppable and not sent and self._stream.tls is None):
            return True
        self._left_over = data[sent:]
        self._direct_write = None
        return False

    async def serve(self) -> None:
        """Serve the connection until it is over.

        Cancelled, it closes the connection, and cancels the application.

        Raises:
            Exception: the parser or the application failed, which is a bug.
        """
        try:
            self._reading.begin()
            with self._serving:
                await self._respond()
            if self._error is not None:
                raise self._error
            refused = self._parser.refused
            if refused is not None and not (self._begun or self._torn or self._closing or self.gone):
                await self._send_refusal(refused)
        finally:
            self.close()
            # Cycles of references would stay until the garbage collector runs.
            self._parser.close()
            self._state, self._error = {}, None

    # Reading

    def data_received(self, data: bytes) -> None:
        """See ``Receiver``."""
        if not data:
            self._connection_lost()
            return
        parser = self._parser
        # What follows the last request is read, too, though it is ignored: reading shows when the client leaves.
        parser.feed(data)
        if parser.refused is not None:
            # The task answers what came before, then sends the refusal, and closes the connection.
            self._reading.end()
            if parser.latest is self._current:
                # The body of the request that is being answered is malformed; the rest of it will never come.
                self._serving.cancel(reason="the request is malformed")
        elif parser.unread > UNREAD:
            self._reading.pause()
            self._is_paused = True
        if self._responder:
            self._responder.unpark_all()

    def _read_on(self) -> None:
        if self._is_paused and self._parser.unread <= UNREAD:
            self._is_paused = False
            self._reading.resume()

    def read_failed(self, error: Exception) -> None:
        """See ``Receiver``."""
        self._error = error
        self._connection_lost()

    def _connection_lost(self) -> None:
        """Cancel the application, or wake the task that waits for a request: the client has left."""
        if self.gone:
            return
        self.gone = True
        self._direct_write = None
        self._reading.end()
        if self._current is None:
            # The task waits for a request.
            self._responder.unpark_all()
        else:
            self._serving.cancel(reason="client left")

    # Answering

    async def _respond(self) -> None:
        while (request := await self._next_request()) is not None:
            await self._run_app(request)
            if not (request.answered and request.complete) or self._torn:
                break

    @property
    def _is_idle(self) -> bool:
        """Whether there is nothing to do until data arrives or the connection is closed."""
        parser = self._parser
        return not (parser.requests or parser.refused or self._closing or self.gone)

    async def _next_request(self) -> RequestState | None:
        parser = self._parser
        if self._is_idle:
            self._idle.begin(self)
            try:
                while self._is_idle:
                    await self._responder.park()
            finally:
                self._idle.end(self)
        if self._closing or self.gone or not parser.requests:
            return None
        request = parser.requests.pop(0)
        if parser.refused is not None and not request.complete:
            return None
        self._current = request
        return request

    async def _run_app(self, request: RequestState) -> None:
        receive, send = functools.partial(self._receive, request), functools.partial(self._send, request)
        try:
            await self._app(self._scope(request), receive, send)
        finally:
            self._current = None
            self._parser.discard(request)
            self._read_on()

    def _scope(self, request: RequestState) -> dict[str, Any]:
        target, _, query = request.target.partition(b"?")
        path = target.decode("latin-1")
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": request.version,
            "method": request.method,
            "scheme": self._scheme,
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
                body = self._parser.take_body(request)
                self._read_on()
                request.handed_over = request.complete
                return {"type": "http.request", "body": body, "more_body": not request.complete}
            await self._responder.park()
        await trio.lowlevel.checkpoint()
        return {"type": "http.disconnect"}

    async def _send(self, request: RequestState, message: Message) -> None:
        kind = message["type"]
        if self.gone:
            # The application is cancelled; this lets it notice, even if it never waits for anything else.
            await trio.lowlevel.checkpoint()
        elif kind == "http.response.start":
            request.start = message
        elif kind == "http.response.body":
            body, more = message.get("body", b""), message.get("more_body", False)
            head = b""
            if not request.head_sent:
                head, self._closing = response_head(request, len(body), more, self._closing or self._last)
                self._begun = True
            if request.bodiless:
                body = b""
            for data in pieces_to_write(head, body, chunked=request.chunked, last=not more):
                if data or self._left_over:
                    await self._write(data)
            if more and request.chunked and not (self._torn or self.gone):
                self._direct_write = self._stream.try_write if self._stream.writes_directly else None
            if not more:
                request.answered = True
                self._begun = False
                if self._responder:
                    self._responder.unpark_all()

    async def _write(self, data: bytes) -> None:
        self._direct_write = None
        if self._torn:
            # The last write was cut off, so the client would misread whatever is written now.
            self._connection_lost()
            await trio.lowlevel.checkpoint()
            return
        if self._left_over:
            data, self._left_over = self._left_over + data, b""
        self._torn = True
        try:
            # Nearly always the connection takes it all, and then there is nothing to wait for.
            sent = self._stream.try_write(data)
            if sent < len(data):
                # Large pieces are not copied.
                await self._stream.write(memoryview(data)[sent:])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._connection_lost()
            await trio.lowlevel.checkpoint()
            return
        self._torn = False

    async def _send_refusal(self, refusal: HttpRefusal) -> None:
        """Answer what is not a request, and give the client time to read the answer before the connection is closed."""
        headers, body = self._render_refusal(attrs.evolve(refusal, client=self._client))
        await self._write(refusal_response(refusal.status, headers, body))
        with trio.move_on_after(_LINGER_TIME):
            try:
                await self._stream.write_eof()
                while await self._stream.read(_RECEIVE):
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

"""One connection on which hypercorn speaks HTTP.

Theory of operation
===================

hypercorn is given something that looks like trio's stream of a socket, and reads and writes a
:class:`~trio_cluster.net.streams.ByteStream` through it. What the law of lifetimes asks for and hypercorn does not do
is done around that:

- *It does not always read.* While a pipelined request waits, hypercorn reads no further, and does not learn that the
  client has left. So the connection is read here, by a task of its own, at most :data:`_READ_AHEAD` bytes ahead of
  hypercorn. When the connection ends, all of its requests are cancelled at once, whatever hypercorn is waiting for.
- *It knows no end of a connection on HTTP/2 that loses no request.* A connection that is to end does so when it has no
  request, with ``GOAWAY``; what the client sends before it has read that is dropped, and the frame tells it so. If the
  connection always has a request, the client is asked after a while to send no more; the running ones go on. That is
  not done at once, since many clients fail all their running requests at any ``GOAWAY``.
- *Its writes are shielded from cancellation.* Closing the stream under a write ends it. The kernel does that for a
  client that stops reading (see :meth:`~trio_cluster.net.streams.Listener.limit_unread_time`), and the server when it
  has stopped.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import Any, Final

import trio

from ..http1.asgi import App, Message, Receive, Scope, Send
from ..net.streams import Address, ByteStream
from .library import (
    Config,
    ConnectionState,
    TCPServer,
    WorkerContext,
    announce_goodbye,
    count_streams,
    say_goodbye,
)
from .request import HypercornRequest

__all__ = ["HypercornConnection"]

#: Bytes that may have been read and not been taken by hypercorn, before the connection is read no further.
_READ_AHEAD: Final = 256 * 1024
_RECEIVE: Final = 64 * 1024
#: Seconds after which a connection is closed whose end was announced on HTTP/2, and whose client has not closed it. A
#: client that runs on a busy machine may read the announcement late, and would write to a connection that is closed.
_GOODBYE_TIME: Final = 3.0


class HypercornConnection:
    """One connection.

    Args:
        stream: the accepted connection; closed when it is over.
        app: the ASGI application.
        state: the application's lifespan state, given to each request.
        config: hypercorn's configuration.
        context: what hypercorn's connections have in common.

    Attributes:
        gone: the client has left, or the connection was closed here.

    Raises:
        OSError: the client has left already.
    """

    def __init__(
        self,
        stream: ByteStream,
        app: App,
        state: dict[str, Any],
        config: Config,
        context: WorkerContext,
    ) -> None:
        self.gone = False
        self._stream = stream
        self._app = app
        self._requests: dict[HypercornRequest, None] = {}
        # How many were begun, on HTTP/2.
        self._begun = 0
        transport = _Transport if stream.tls is None else _TlsTransport
        self._transport = transport(self, stream.peer_address, stream.local_address)
        self._server = TCPServer(
            self._run_app,  # type: ignore[arg-type]
            config,
            context,
            ConnectionState(state),
            self._transport,  # type: ignore[arg-type]
        )
        self._ahead = bytearray()
        self._retiring = False
        # No request is to be waited for any longer before the end is announced.
        self._retiring_now = False
        self._goodbye_said = False
        self._changed = trio.lowlevel.ParkingLot()

    async def serve(self) -> None:
        """Serve the connection until it is over.

        Raises:
            Exception: hypercorn could not handle what came in; perhaps in an exception group.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_ahead)
                nursery.start_soon(self._end_when_gone, nursery.cancel_scope)
                nursery.start_soon(self._say_goodbye)
                await self._server.run()
                nursery.cancel_scope.cancel(reason="the connection is over")
        finally:
            self.close()

    def close_when_idle(self) -> None:
        """Close it if its end is announced and it is idle; otherwise hypercorn's own context tells it to do that.

        On HTTP/2, if its end is to be announced and it is not idle, that is done now.
        """
        if not self._retiring:
            return
        if not (self._requests or self._ahead):
            self.close()
        self._retiring_now = True
        self._changed.unpark_all()

    def close_after_next(self) -> None:
        """Announce the end of the connection with the next answer. Synchronous, idempotent.

        On HTTP/2, that is done between two requests, when there is none, or by :meth:`close_when_idle`.
        """
        self._retiring = True
        self._changed.unpark_all()

    def close(self) -> None:
        """Close it now. Synchronous, idempotent. Requests that are being answered are cancelled."""
        self._lose(closed=True)
        self._stream.close()

    def hang_up(self) -> None:
        """Close it, since its client has left or takes nothing. Synchronous, idempotent."""
        self._lose()
        self._stream.close()

    def abort(self) -> None:
        """Break it, so that the peer gets an error instead of an end of file. Synchronous, idempotent."""
        self._lose(closed=True)
        self._stream.abort()

    async def _read_ahead(self) -> None:
        data = b"?"
        while data:
            while len(self._ahead) > _READ_AHEAD:
                await self._changed.park()
            try:
                data = await self._stream.read(_RECEIVE)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not self._goodbye_said:
                self._ahead += data
            self._changed.unpark_all()
        # An answer that is being written now is of no use to anybody, and would wait for a client that does not read.
        self.hang_up()

    async def _end_when_gone(self, scope: trio.CancelScope) -> None:
        """End hypercorn's part, which would still wait for as long as a connection may be idle."""
        while self._requests or not self.gone:
            await self._changed.park()
        scope.cancel(reason="the client has left")

    async def _say_goodbye(self) -> None:
        """End an HTTP/2 connection that is to end, as soon as it has had a request and has none."""
        announced = False
        while not (self._retiring and self._may_say_goodbye):
            if self._retiring_now and not announced and count_streams(self._server):
                announced = True
                await announce_goodbye(self._server)
            else:
                await self._changed.park()
        self._goodbye_said = True
        await say_goodbye(self._server)
        # The client opens another connection for what it has sent meanwhile. That is read and dropped, since a
        # connection that is closed with unread bytes is reset, and the client may lose the frame by that.
        with trio.move_on_after(_GOODBYE_TIME):
            while not self.gone:
                await self._changed.park()
        self.close()

    @property
    def _may_say_goodbye(self) -> bool:
        # A connection without any request may be one whose first request is under way: that is waited for. And
        # hypercorn may have taken a request whose task has not begun yet.
        return not self._requests and 0 < count_streams(self._server) == self._begun

    def _lose(self, *, closed: bool = False) -> None:
        """Cancel the requests: the client has left, or the connection is closed here."""
        if self.gone:
            return
        self.gone = True
        self._changed.unpark_all()
        for request in list(self._requests):
            request.closed = closed
            request.lose("client left")

    async def _run_app(self, scope: Scope, receive: Receive, send: Send, *_: object) -> None:
        """Run the application for one request, or for a websocket, which it refuses."""
        if scope["http_version"] == "2":
            self._begun += 1
        if scope["type"] != "http":
            try:
                await self._app(scope, receive, send)
            finally:
                self._changed.unpark_all()
            return
        if self.gone:
            return
        if scope["http_version"] != "2":
            send = partial(self._send, send)
        request = HypercornRequest(self._app, scope, receive, send, self.abort)
        self._requests[request] = None
        try:
            await request.run()
        finally:
            del self._requests[request]
            self._changed.unpark_all()

    async def _send(self, send: Send, message: Message) -> None:
        if self._retiring and message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    @property
    def alpn(self) -> str | None:
        """The protocol that TLS has negotiated."""
        return None if self._stream.tls is None else self._stream.tls.alpn

    # What hypercorn reads and writes

    async def read(self, limit: int) -> bytes:
        """Return what has been read ahead, waiting for it if need be; empty at the end. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while not (self._ahead or self.gone):
            await self._changed.park()
        data = bytes(self._ahead[:limit])
        del self._ahead[:limit]
        self._changed.unpark_all()
        return data

    async def write(self, data: bytes) -> None:
        """Write all of ``data``. A checkpoint.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is over.
        """
        try:
            await self._stream.write(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.hang_up()
            raise

    async def write_eof(self) -> None:
        """See :meth:`ByteStream.write_eof <trio_cluster.net.streams.ByteStream.write_eof>`."""
        await self._stream.write_eof()


class _Transport:
    """A connection under the names that hypercorn uses: those of ``trio.SocketStream``, as far as it needs them."""

    def __init__(self, connection: HypercornConnection, peer: Address, local: Address) -> None:
        self.socket = _Socket(peer, local)
        self._connection = connection

    async def receive_some(self, max_bytes: int) -> bytes:
        return await self._connection.read(max_bytes)

    async def send_all(self, data: bytes) -> None:
        await self._connection.write(data)

    async def send_eof(self) -> None:
        await self._connection.write_eof()

    async def aclose(self) -> None:
        self._connection.hang_up()
        await trio.lowlevel.checkpoint()


class _TlsTransport(_Transport):
    """A connection with TLS, under the names of ``trio.SSLStream``. Its handshake has been done."""

    @property
    def transport_stream(self) -> _TlsTransport:
        return self

    async def do_handshake(self) -> None:
        pass

    def selected_alpn_protocol(self) -> str | None:
        return self._connection.alpn


class _Socket:
    """The addresses of a connection."""

    family = socket.AF_INET

    def __init__(self, peer: Address, local: Address) -> None:
        self._peer = peer
        self._local = local

    def getpeername(self) -> Address:
        return self._peer

    def getsockname(self) -> Address:
        return self._local

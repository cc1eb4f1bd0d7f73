"""An HTTP/1.1 client for one server, made for relays: bodies pass in both directions as they are.

Theory of operation
===================

*Lifetimes.* A request and its response belong to the task that calls :meth:`HttpClient.send`. However that call ends,
by an error, by cancellation, or because the caller did not read the whole response, the connection is closed at once
and synchronously. This is how the server learns that its work is not needed any more. A connection is kept alive for
the next request only if the whole request was sent and the whole response was received, and, after a request with a
body, only if the response is a 2xx: a server may refuse a request without reading its body, keep the connection, and
take that body for the next request.

*Stale connections.* An idle connection may have been closed by the server meanwhile. One that is readable (an EOF, or
bytes without a request) is dropped before use. One that fails after the request was sent, but before any byte of a
response, is replaced by a new connection, once, and only if the body is in memory and can be sent again; a streamed
body always gets a new connection. The keep-alive expiry is shorter than that of the usual servers, so that this hardly
ever happens.

*Early responses.* A large or streamed body is sent by a second task while the response is awaited, so that an early
refusal by the server is seen and the rest of the body is not sent. A small body fits into the kernel's buffer and needs
no task.

*No response timeout.* Only connecting has a time limit; the caller's deadlines bound the rest. Redirects are not
followed.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import select
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias

import attrs
import trio

from trio_cluster.core.exhaustion import ExhaustionLog, exhausted_resource
from trio_cluster.net.sockets import receive_when_ready

from ._base_url import BaseURL
from ._http_response import HttpError, IncompleteResponse, ResponseReader

__all__ = [
    "Body",
    "ConnectFailed",
    "ConnectTimeout",
    "HttpClient",
    "HttpRequest",
    "HttpResponse",
    "LocalExhaustion",
]

logger = logging.getLogger("trio_cluster.engines")

#: A body in memory, or a function that returns the next piece of a streamed one, and ``b""`` at its end.
Body: TypeAlias = bytes | Callable[[], Awaitable[bytes]]

#: Bytes per read from the socket, at most.
_READ_SIZE: Final = 64 * 1024
#: Bytes of a body in memory that are sent before the response is awaited, without a task of their own.
_INLINE_BODY: Final = 64 * 1024


class ConnectFailed(HttpError):
    """No connection could be made; nothing of the request was sent."""


class ConnectTimeout(ConnectFailed):
    """The server did not accept the connection in time. It may be gone, or too busy to accept."""


class LocalExhaustion(HttpError):
    """This machine has no descriptor, memory or local port left. It says nothing about the server."""


@attrs.frozen
class HttpRequest:
    """A request.

    Attributes:
        method: in capitals.
        path: what follows the base URL's path, percent-encoded.
        query: added to the base URL's query, percent-encoded; without a question mark.
        headers: (name, value) pairs. The client adds ``Host``, ``Accept-Encoding`` and the framing headers.
        body: in memory, or streamed.
        size: the length of a streamed body in bytes; -1 if it is not known. Ignored for a body in memory.
    """

    method: str
    path: str
    headers: Sequence[tuple[str, str]] = ()
    body: Body = b""
    size: int = -1
    query: str = ""


@attrs.frozen
class HttpResponse:
    """The head of a response, and access to its body.

    Attributes:
        status: 200 to 999.
        headers: (name, value) pairs in the order received; names in lower case.
        close_delimited: the body ends with the connection, so that a truncated body looks complete.
        receive: returns the next piece of the body, and ``b""`` at its end. A checkpoint. Raises :class:`HttpError` if
            the connection ends too early.
    """

    status: int
    headers: Sequence[tuple[str, str]]
    close_delimited: bool
    receive: Callable[[], Awaitable[bytes]]

    def header(self, name: str) -> str:
        """Return the value of the first header called ``name`` (in lower case); empty if there is none."""
        return next((value for key, value in self.headers if key == name), "")


#: Handles a response. The connection is released when it returns.
ResponseHandler: TypeAlias = Callable[[HttpResponse], Awaitable[None]]


class HttpClient:
    """Sends requests to one server, and keeps its idle connections. See the top of this module.

    Args:
        base: the server's base URL.
        connect_timeout: seconds for making a connection, including the TLS handshake.
        max_keepalive: idle connections that are kept, at most.
        keepalive_expiry: seconds after which an idle connection is dropped, the next time that the client is used.
        tls: whom to trust, if the base URL is ``https``; ``None``: the authorities of the system.

    Attributes:
        base: as given.
        in_use: connections on which a request is under way.
    """

    def __init__(
        self,
        base: BaseURL,
        *,
        connect_timeout: float = 5.0,
        max_keepalive: int = 64,
        keepalive_expiry: float = 4.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.base = base
        self.in_use = 0
        self._connect_timeout = connect_timeout
        self._max_keepalive = max_keepalive
        self._keepalive_expiry = keepalive_expiry
        # From the one that has been idle longest.
        self._idle: list[_Connection] = []
        self._closed = False
        self._tls = None
        if base.scheme == "https":
            self._tls = ssl.create_default_context() if tls is None else tls
        self._family = _family(base.host)
        self._exhaustion = ExhaustionLog(logger, f"connections to {base}")

    async def send(self, request: HttpRequest, handle_response: ResponseHandler) -> None:
        """Send a request, and call ``handle_response`` with the response, at most once.

        A checkpoint. Cancellation closes the connection at once, and so does any error, those of ``handle_response``
        and of a streamed body included. So does a ``handle_response`` that returns before the end of the body.

        Args:
            request: what to send.
            handle_response: awaited with the response when its head has been received.

        Raises:
            ConnectFailed: no connection could be made; ``handle_response`` was not called.
            LocalExhaustion: this machine has no descriptor, memory or local port left. Logged here when it begins and
                when it is over.
            IncompleteResponse: the connection ended before the response was complete.
            MalformedResponse: the server does not answer with HTTP/1.1.
            ValueError: a header of the request has a line break in it.
        """
        if isinstance(request.body, bytes) and (connection := self._take_idle()) is not None:
            try:
                await self._send_on(connection, request, handle_response)
                return
            except IncompleteResponse:
                if connection.reader.started:
                    raise
        await self._send_on(await self._connect(), request, handle_response)

    async def fetch(self, request: HttpRequest, limit: int) -> tuple[int, bytes]:
        """Send a request, and return the status and the whole body of its response.

        Args:
            request: what to send.
            limit: the largest body that is accepted, in bytes.

        Raises:
            HttpError: see :meth:`send`; also if the body is larger than ``limit``.
        """
        status, body = 0, bytearray()

        async def collect(response: HttpResponse) -> None:
            nonlocal status
            status = response.status
            while piece := await response.receive():
                body.extend(piece)
                if len(body) > limit:
                    raise HttpError(f"the response has more than {limit} bytes")

        await self.send(request, collect)
        return status, bytes(body)

    def close(self) -> None:
        """Close the idle connections, and keep no others. Requests that are under way are not affected. Synchronous."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    # Connections

    def _take_idle(self) -> _Connection | None:
        self._drop_expired()
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_readable():
                return connection
            connection.close()
        return None

    def _keep(self, connection: _Connection) -> None:
        self._drop_expired()
        if len(self._idle) < self._max_keepalive and not self._closed:
            connection.idle_since = trio.current_time()
            self._idle.append(connection)
        else:
            connection.close()

    def _drop_expired(self) -> None:
        oldest = trio.current_time() - self._keepalive_expiry
        while self._idle and self._idle[0].idle_since < oldest:
            self._idle.pop(0).close()

    async def _connect(self) -> _Connection:
        raw: trio.SocketStream | None = None
        connected = False
        try:
            with trio.fail_after(self._connect_timeout):
                raw = await self._open_stream()
                stream: trio.SocketStream | trio.SSLStream[trio.SocketStream] = raw
                if self._tls is not None:
                    stream = trio.SSLStream(
                        raw, self._tls, server_hostname=self.base.host, https_compatible=True
                    )
                    await stream.do_handshake()
            connected = True
            self._exhaustion.succeeded()
            return _Connection(stream, raw)
        except trio.TooSlowError:
            raise ConnectTimeout(f"no connection within {self._connect_timeout:g} s") from None
        except (OSError, trio.BrokenResourceError, RuntimeError) as error:
            # A RuntimeError: names are resolved in a thread.
            if resource := exhausted_resource(error):
                self._exhaustion.failed(resource)
                raise LocalExhaustion(resource) from error
            if isinstance(error, RuntimeError):
                raise
            raise ConnectFailed(_reason(error)) from error
        finally:
            if raw is not None and not connected:
                raw.socket.close()

    async def _open_stream(self) -> trio.SocketStream:
        if self._family is None:
            return await trio.open_tcp_stream(self.base.host, self.base.port)
        # A numeric address needs no name resolution and no racing attempts ("happy eyeballs"), whose setup costs as
        # much as the connection.
        sock = trio.socket.socket(self._family)
        try:
            await sock.connect((self.base.host, self.base.port))
            return trio.SocketStream(sock)
        except BaseException:
            sock.close()
            raise

    # One request

    async def _send_on(
        self, connection: _Connection, request: HttpRequest, handle_response: ResponseHandler
    ) -> None:
        body = request.body
        reader = connection.reader
        reader.start_next()
        connection.request_sent = False
        self.in_use += 1
        try:
            if isinstance(body, bytes) and len(body) <= _INLINE_BODY:
                await connection.send(self._head(request) + body)
                connection.request_sent = True
                await handle_response(await connection.receive_head())
            else:
                await self._send_full_duplex(connection, request, handle_response)
        finally:
            self.in_use -= 1
            if (
                connection.request_sent
                and reader.complete
                and (body == b"" or 200 <= reader.status < 300)
                and reader.keep_alive
                and not connection.write_failed
            ):
                self._keep(connection)
            else:
                connection.close()

    async def _send_full_duplex(
        self, connection: _Connection, request: HttpRequest, handle_response: ResponseHandler
    ) -> None:
        """Send the request and receive the response at the same time."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            upload_scope = trio.CancelScope()

            async def upload() -> None:
                nonlocal failure
                try:
                    with upload_scope:
                        await self._upload(connection, request)
                except Exception as error:
                    # The source of the body has failed. The server will wait for the rest, so there is no response to
                    # wait for.
                    failure = error
                    nursery.cancel_scope.cancel(reason="the body of the request has failed")

            nursery.start_soon(upload)
            try:
                response = await connection.receive_head()
                if response.status >= 300:
                    # The server does not want the body; the rest would be wasted.
                    upload_scope.cancel(reason="the server has refused the request")
                await handle_response(response)
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel(reason="the request is over")
        # Raised outside of the nursery, which would wrap it in an ExceptionGroup.
        if failure is not None:
            raise failure

    async def _upload(self, connection: _Connection, request: HttpRequest) -> None:
        await connection.send(self._head(request))
        if isinstance(request.body, bytes):
            await connection.send(request.body)
        else:
            left = request.size
            while piece := await request.body():
                if left < 0:
                    piece = b"%x\r\n%b\r\n" % (len(piece), piece)
                elif len(piece) > left:
                    raise HttpError("the body of the request has more bytes than its size says")
                else:
                    left -= len(piece)
                await connection.send(piece)
            if left < 0:
                await connection.send(b"0\r\n\r\n")
            elif left:
                raise HttpError("the body of the request has fewer bytes than its size says")
        connection.request_sent = True

    def _head(self, request: HttpRequest) -> bytes:
        size = len(request.body) if isinstance(request.body, bytes) else request.size
        lines = [
            f"{request.method} {self.base.target(request.path, request.query)} HTTP/1.1",
            f"host: {self.base.authority}",
            "accept-encoding: identity",
        ]
        for name, value in request.headers:
            if "\n" in value or "\r" in value:
                raise ValueError(f"a line break in the header {name}")
            lines.append(f"{name}: {value}")
        if size < 0:
            lines.append("transfer-encoding: chunked")
        elif request.method != "GET":
            lines.append(f"content-length: {size}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _Connection:
    """One connection, with the parser of its responses.

    Attributes:
        reader: the parser.
        request_sent: the whole request has been sent.
        write_failed: a write failed or was cancelled; nothing more can be sent.
        idle_since: when the last response was complete, by trio's clock.
    """

    __slots__ = ("_send_all", "_socket", "_tls", "idle_since", "reader", "request_sent", "write_failed")

    def __init__(
        self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream], raw: trio.SocketStream
    ) -> None:
        self._socket = raw.socket
        self._send_all = stream.send_all
        self._tls = stream if isinstance(stream, trio.SSLStream) else None
        self.reader = ResponseReader()
        self.request_sent = False
        self.write_failed = False
        self.idle_since = 0.0

    def is_readable(self) -> bool:
        """Tell whether bytes or an EOF wait to be read; on an idle connection, either means that it is unusable."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the socket at once, also while a task uses it. TLS's close_notify is not sent: it would block."""
        self._socket.close()

    async def send(self, data: bytes) -> None:
        """Send bytes. A checkpoint.

        A failed write is not an error: the server may have sent a response that says why it reads no more. Only
        :attr:`write_failed` is set, and later calls send nothing.
        """
        if self.write_failed or not data:
            await trio.lowlevel.checkpoint()
            return
        # Stays set if the write is cancelled, which may leave half of the data on the wire.
        self.write_failed = True
        try:
            await self._send_all(data)
        except trio.BrokenResourceError:
            return
        self.write_failed = False

    async def receive_head(self) -> HttpResponse:
        """Wait for the head of the response. Raises :class:`HttpError` if there is none."""
        reader = self.reader
        while not reader.status:
            await self._read()
        return HttpResponse(reader.status, reader.headers, reader.close_delimited, self.receive)

    async def receive(self) -> bytes:
        """See :attr:`HttpResponse.receive`."""
        reader = self.reader
        while True:
            if piece := reader.take():
                return piece
            if reader.complete:
                await trio.lowlevel.checkpoint()
                return b""
            await self._read()

    async def _read(self) -> None:
        """Wait for bytes and feed them to the parser, which may need more of them to make progress."""
        try:
            if self._tls is not None:
                data = bytes(await self._tls.receive_some(_READ_SIZE))
            else:
                data = await receive_when_ready(self._socket, _READ_SIZE)
        except (trio.BrokenResourceError, OSError) as error:
            if resource := exhausted_resource(error):
                raise LocalExhaustion(resource) from error
            raise IncompleteResponse("the connection was lost") from error
        if data:
            self.reader.feed(data)
        else:
            self.reader.feed_eof()


def _reason(error: BaseException) -> str:
    """Return why there is no connection, without the server's address, which clients need not know."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'verify_message', '') or error.reason or error}"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _family(host: str) -> socket.AddressFamily | None:
    """Return the address family of a numeric address; ``None`` for a name."""
    try:
        return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return None

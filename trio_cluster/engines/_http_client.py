"""A client for one HTTP/1.1 server, made for relays: what it sends and what it gives out are bytes as they are.

Theory of operation
===================

An exchange is one request and its answer, and belongs to the task that makes it. However it ends, by an error, a
cancellation, or with an answer that nobody wanted to the end, its socket is closed there and then, without waiting for
anything; that is how the server learns that nobody needs its work any more. Only a connection whose request has gone
out whole, and whose answer has come whole, is kept for the next one.

A kept connection may have died meanwhile. Those that show it are dropped before use. One that dies when the request is
already on its way, without a byte of an answer, is replaced by a fresh one, once, and only if the body is at hand to be
sent again; a body that can be had only once always gets a fresh one. Connections are kept for less time than the usual
servers keep theirs, so that this hardly ever matters.

A large body is sent by a task beside the one that reads, so that a server which refuses it early is heard; what is left
of the body is not sent then. A small one fits into what the kernel buffers, and needs no task.

There is no limit on how long an answer may take: that is for the caller's deadlines. Redirections are not followed.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias
from urllib.parse import urlsplit

import attrs
import trio

from trio_cluster.net.sockets import receive_when_ready

from ._http_response import AnswerCut, HttpError, ResponseReader

__all__ = ["Answer", "BaseURL", "Body", "ConnectFailed", "HttpClient", "Question"]

#: A body that is at hand, or the function that gives its next piece, and nothing at its end.
Body: TypeAlias = bytes | Callable[[], Awaitable[bytes]]

_RECEIVE: Final = 64 * 1024
#: Bytes that are sent without listening for an answer meanwhile.
_AT_ONCE: Final = 64 * 1024


class ConnectFailed(HttpError):
    """There is no connection to be had; the server has not been asked anything."""


@attrs.frozen
class BaseURL:
    """Where a server's API is: ``http://host:port/some/prefix``."""

    scheme: str
    host: str
    port: int
    path: str
    """Percent-encoded as it was given, without a slash at its end."""

    @classmethod
    def parse(cls, url: str) -> BaseURL:
        """Read a URL.

        Raises:
            ValueError: it is not one that could be the base of an API; the message says why.
        """
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError(f"a URL has no spaces and only ASCII characters: {url!r}")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected a URL such as http://127.0.0.1:8000/v1, got '{url}'")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(f"a user, a query or a fragment has no place in this URL: '{url}'")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if port == 0:
            raise ValueError(f"the port is not one: '{url}'")
        default = 443 if parts.scheme == "https" else 80
        return cls(parts.scheme, parts.hostname, port or default, parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        """The host as the header of this name wants it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


@attrs.frozen
class Question:
    """A request."""

    method: str
    path: str
    """What follows the base's path, percent-encoded."""
    headers: Sequence[tuple[str, str]] = ()
    """Those that describe the connection and the framing are added."""
    body: Body = b""
    size: int = -1
    """How many bytes a body will have that is not at hand; -1 if nobody knows."""


@attrs.frozen
class Answer:
    """The head of an answer, and the way to its body."""

    status: int
    headers: Sequence[tuple[str, str]]
    """Names in lower case."""
    framed: bool
    """Whether the answer itself says where it ends. If not, it looks complete even where it was cut off."""
    receive: Callable[[], Awaitable[bytes]]
    """Gives the next piece of the body, and nothing at its end; raises ``HttpError`` where it was cut off."""

    def header(self, name: str) -> str:
        """Return the first header of this name (lower case), or nothing."""
        return next((value for key, value in self.headers if key == name), "")


class HttpClient:
    """See the top of this module.

    Args:
        base: which server.
        connect_timeout: seconds for a connection, its encryption included.
        max_idle: connections that are kept at most.
        idle_time: seconds for which one is kept. It is given up when the client is next used.
    """

    def __init__(
        self, base: BaseURL, *, connect_timeout: float = 5.0, max_idle: int = 64, idle_time: float = 4.0
    ) -> None:
        self.base = base
        self._connect_timeout = connect_timeout
        self._max_idle = max_idle
        self._idle_time = idle_time
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if base.scheme == "https" else None
        self._family = _family(base.host)

    async def exchange(self, question: Question, answer: Callable[[Answer], Awaitable[None]]) -> None:
        """Ask, and have ``answer`` deal with what comes back; it may be called only once.

        Cancellation closes the connection at once, and so does any error, those of ``answer`` included.

        Raises:
            ConnectFailed: the server cannot be reached; ``answer`` was not called.
            AnswerCut: the connection was lost before the answer was complete.
            MalformedAnswer: what came is not HTTP.
        """
        if isinstance(question.body, bytes) and (kept := self._kept()) is not None:
            try:
                await self._ask(kept, question, answer)
                return
            except AnswerCut:
                if kept.reader.heard:
                    raise
        await self._ask(await self._connect(), question, answer)

    async def fetch(self, question: Question, limit: int) -> tuple[int, bytes]:
        """Return the status and the whole body of an answer.

        Raises:
            HttpError: see :meth:`exchange`; also if the body has more than ``limit`` bytes.
        """
        status, body = 0, bytearray()

        async def collect(answer: Answer) -> None:
            nonlocal status
            status = answer.status
            while piece := await answer.receive():
                body.extend(piece)
                if len(body) > limit:
                    raise HttpError(f"the answer has more than {limit} bytes")

        await self.exchange(question, collect)
        return status, bytes(body)

    def close(self) -> None:
        """Close the connections that are kept; exchanges that are under way are not touched."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    # Connections

    def _kept(self) -> _Connection | None:
        self._drop_old()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_quiet():
                return connection
            connection.close()
        return None

    def _keep(self, connection: _Connection) -> None:
        self._drop_old()
        if len(self._idle) < self._max_idle:
            connection.idle_since = trio.current_time()
            self._idle.append(connection)
        else:
            connection.close()

    def _drop_old(self) -> None:
        oldest = trio.current_time() - self._idle_time
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
            return _Connection(stream, raw)
        except trio.TooSlowError:
            raise ConnectFailed(f"no connection within {self._connect_timeout:g} s") from None
        except (OSError, trio.BrokenResourceError) as error:
            raise ConnectFailed(_reason(error)) from error
        finally:
            if raw is not None and not connected:
                raw.socket.close()

    async def _open_stream(self) -> trio.SocketStream:
        if self._family is None:
            return await trio.open_tcp_stream(self.base.host, self.base.port)
        # A numeric address is the only one, so that nothing has to be found out, and no two attempts can race each
        # other; getting ready for that costs as much as the connection.
        sock = trio.socket.socket(self._family)
        try:
            await sock.connect((self.base.host, self.base.port))
            return trio.SocketStream(sock)
        except BaseException:
            sock.close()
            raise

    # One exchange

    async def _ask(
        self, connection: _Connection, question: Question, answer: Callable[[Answer], Awaitable[None]]
    ) -> None:
        body = question.body
        reader = connection.reader
        reader.begin()
        connection.sent = False
        try:
            if isinstance(body, bytes) and len(body) <= _AT_ONCE:
                await connection.send(self._head(question) + body)
                connection.sent = True
                await answer(await connection.receive_head())
            else:
                await self._ask_both_ways(connection, question, answer)
        finally:
            if connection.sent and reader.complete and reader.keep_alive and not connection.broken:
                self._keep(connection)
            else:
                connection.close()

    async def _ask_both_ways(
        self, connection: _Connection, question: Question, answer: Callable[[Answer], Awaitable[None]]
    ) -> None:
        """Send and listen at the same time."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            uploading = trio.CancelScope()

            async def upload() -> None:
                nonlocal failure
                try:
                    with uploading:
                        await self._upload(connection, question)
                except Exception as error:
                    # The body's own: there will be no more of it, and so there is nothing to wait for.
                    failure = error
                    nursery.cancel_scope.cancel(reason="the body of the request has failed")

            nursery.start_soon(upload)
            try:
                head = await connection.receive_head()
                if head.status >= 300:
                    # It does not want the rest, which would be lost on it.
                    uploading.cancel(reason="the server has refused the request")
                await answer(head)
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel(reason="the exchange is over")
        # Raised here, where it is nobody's group.
        if failure is not None:
            raise failure

    async def _upload(self, connection: _Connection, question: Question) -> None:
        await connection.send(self._head(question))
        if isinstance(question.body, bytes):
            await connection.send(question.body)
        else:
            left = question.size
            while piece := await question.body():
                if left < 0:
                    piece = b"%x\r\n%b\r\n" % (len(piece), piece)
                elif len(piece) > left:
                    raise HttpError("the body of the request has more bytes than were announced")
                else:
                    left -= len(piece)
                await connection.send(piece)
            if left < 0:
                await connection.send(b"0\r\n\r\n")
            elif left:
                raise HttpError("the body of the request has fewer bytes than were announced")
        connection.sent = True

    def _head(self, question: Question) -> bytes:
        size = len(question.body) if isinstance(question.body, bytes) else question.size
        lines = [
            f"{question.method} {self.base.path}{question.path} HTTP/1.1",
            f"host: {self.base.authority}",
            "accept-encoding: identity",
        ]
        for name, value in question.headers:
            if "\n" in value or "\r" in value:
                raise ValueError(f"a line break in the header {name}")
            lines.append(f"{name}: {value}")
        if size < 0:
            lines.append("transfer-encoding: chunked")
        elif question.method != "GET":
            lines.append(f"content-length: {size}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _Connection:
    """One connection, and what is being read on it.

    Attributes:
        sent: the request has gone out whole.
        broken: it cannot be written to any more.
        idle_since: when it was last used.
    """

    __slots__ = ("_encrypted", "_send_all", "_socket", "broken", "idle_since", "reader", "sent")

    def __init__(
        self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream], raw: trio.SocketStream
    ) -> None:
        self._socket = raw.socket
        self._send_all = stream.send_all
        self._encrypted = stream if isinstance(stream, trio.SSLStream) else None
        self.reader = ResponseReader()
        self.sent = False
        self.broken = False
        self.idle_since = 0.0

    def is_quiet(self) -> bool:
        """Tell whether nothing has come since the last answer; an end would be something, too."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Close it now, whoever uses it. Encryption's own farewell is left out: nobody could wait for it."""
        self._socket.close()

    async def send(self, data: bytes) -> None:
        """Send something, unless the server does not take any more: its answer may say why."""
        if self.broken or not data:
            await trio.lowlevel.checkpoint()
            return
        self.broken = True
        try:
            await self._send_all(data)
        except trio.BrokenResourceError:
            return
        self.broken = False

    async def receive_head(self) -> Answer:
        """Wait for the head of the answer."""
        reader = self.reader
        while not reader.status:
            await self._read()
        return Answer(reader.status, reader.headers, reader.framed, self.receive)

    async def receive(self) -> bytes:
        """See :attr:`Answer.receive`."""
        reader = self.reader
        while True:
            if piece := reader.take():
                return piece
            if reader.complete:
                await trio.lowlevel.checkpoint()
                return b""
            await self._read()

    async def _read(self) -> None:
        """Wait for something to come, and read it; sometimes it is nothing."""
        try:
            if self._encrypted is not None:
                data = bytes(await self._encrypted.receive_some(_RECEIVE))
            else:
                data = await receive_when_ready(self._socket, _RECEIVE)
        except (trio.BrokenResourceError, OSError) as error:
            raise AnswerCut("the connection was broken") from error
        if data:
            self.reader.feed(data)
        else:
            self.reader.end()


def _reason(error: BaseException) -> str:
    """Return why there is no connection, without the address, which clients need not see."""
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
    """Return of which family a numeric address is; ``None`` for a name."""
    try:
        return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return None

"""Opening and closing a websocket with trio-websocket, and everything that is assumed about that library.

Theory of operation
===================

trio-websocket implements the opening handshake, pings and the closing handshake well, but it was not written for a
program that has to survive every way in which a connection can end. This is the only module that imports it. Its users
see :class:`WebSocket`, and a single exception, :class:`LinkClosed`. The text of that is one line: why the opening
handshake failed, or why the websocket ended.

What has to be worked around:

- *The reader task can raise into the nursery of the caller.* A ping that crosses our close frame, and a rejected
  handshake, raise inside it. So it is started in a :class:`NurseryShim`, which stores the exception and does not let it
  propagate.
- *The opening handshake waits forever* if the peer closes the connection in the middle of it. The shim knows when the
  reader task has ended, and :func:`open_websocket` has a deadline.
- *The closing handshake waits for the peer without limit.* The caller of :meth:`WebSocket.aclose` sets a deadline.
- *Each message takes two more task switches and a general parser.* So messages bypass the library: it is given a
  :class:`~trio_cluster.link.demux.FrameDemux` in place of the connection.

What is assumed without being documented
========================================

``tests/link/test_websocket_library.py`` checks each of these against the installed version:

1. ``wrap_client_stream`` and ``wrap_server_stream`` do one thing with their nursery: they call
   ``nursery.start_soon(reader)`` once, without further arguments.
2. Of the stream only ``receive_some``, ``send_all`` and ``aclose`` are used. Everything is read through
   ``receive_some``, by the reader task alone; each ``send_all`` is given a whole HTTP head, or whole frames.
3. ``receive_some`` may return more bytes than it was asked for.
4. The head of the opening handshake ends at the first empty line, whether lines end in CRLF or in a bare LF. The
   handshake is complete as soon as the head has been read: no byte that follows it is needed.
5. The reader task answers pings and close frames by itself. It does not need to see the messages between them.
6. ``get_message`` does not return while no message reaches the library. When the websocket closes, it raises
   ``ConnectionClosed``, whose ``reason`` has the ``code`` and the ``reason`` of the peer's close frame; the code is
   1006 if there was none.
7. A message may be continued by a frame with another masking key; a key of zeros is accepted.
8. After ``aclose`` has sent the close frame, any number of messages that still come in are discarded, up to the peer's
   close frame.
9. When the opening handshake fails, the reader task ends. It raises ``ConnectionRejected`` with the ``status_code`` and
   the complete ``body`` if the server rejected the handshake.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import attrs
import trio
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    WebSocketConnection,
    WebSocketRequest,
    wrap_client_stream,
    wrap_server_stream,
)

from ..net.addressing import PROCESS_HEADER
from ..net.watchdog import InjectableStream
from ..protocol import SUBPROTOCOL
from .demux import FrameDemux
from .frames import truncate_reason

__all__ = [
    "END_HEADER",
    "PATH",
    "PROBE_PATH",
    "LinkClosed",
    "NurseryShim",
    "Opener",
    "Refusal",
    "WebSocket",
    "accept",
    "dial",
    "open_websocket",
    "request_of_end",
]

#: The path to which workers connect.
PATH: Final = "/cluster"
#: The path for a client that only checks whether this is a master: it reads the handshake and closes the connection.
PROBE_PATH: Final = "/probe"

#: A header of a request for :data:`PATH` that asks for no link: the proof that the process of a session has ended.
END_HEADER: Final = "x-trio-cluster-ended"

#: The code that stands for "no close frame was received".
_ABNORMAL_CLOSURE: Final = 1006


class LinkClosed(Exception):
    """The link is over, or was never opened.

    Attributes:
        why: the reason, in one line for a log.
        by_peer: whether the peer closed the link and gave this reason.
        status: the HTTP status with which the opening handshake was rejected, if it was.
        incompatible: the two ends do not speak the same protocol; another attempt would fail as well.
        was_reset: the connection was reset, which may be a cut, or the end of a process.
        has_ended: the connection has ended without a close frame: as a kernel ends those of a process that has died.
        superseded: the session goes on, on another connection.
    """

    def __init__(
        self,
        why: str,
        *,
        by_peer: bool = False,
        status: int | None = None,
        incompatible: bool = False,
        was_reset: bool = False,
        has_ended: bool = False,
        superseded: bool = False,
    ) -> None:
        super().__init__(why)
        self.was_reset = was_reset
        self.has_ended = has_ended
        self.superseded = superseded
        self.why = why
        self.by_peer = by_peer
        self.status = status
        self.incompatible = incompatible


@attrs.frozen
class Refusal:
    """Why an opening handshake is rejected, in HTTP's terms."""

    status: int
    reason: str


class NurseryShim:
    """Stands in for a nursery where trio-websocket starts its reader task: the task may end, but not raise.

    Args:
        nursery: runs the reader task.

    Attributes:
        ended: set when the reader task has ended.
        error: the exception with which it ended, if any.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.ended = trio.Event()
        self.error: Exception | None = None
        self._nursery = nursery

    def start_soon(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start the reader task; see ``trio.Nursery``."""
        self._nursery.start_soon(self._run, function, args, name="websocket reader")

    async def _run(self, function: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
        try:
            await function(*args)
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()


#: Performs the opening handshake; made by :func:`dial` and :func:`accept`.
Opener: TypeAlias = Callable[[NurseryShim], Awaitable[tuple[WebSocketConnection, FrameDemux]]]


class WebSocket:
    """A websocket whose opening handshake is complete. Messages are sent and received through ``demux``.

    Attributes:
        demux: the stream that carries the frames.
    """

    def __init__(self, connection: WebSocketConnection, demux: FrameDemux, reader: NurseryShim) -> None:
        self.demux = demux
        self._connection = connection
        self._reader = reader

    @property
    def is_client(self) -> bool:
        """Whether this end connected, and so has to mask its frames."""
        return self._connection.is_client

    async def wait_closed(self) -> LinkClosed:
        """Wait until the library knows that the websocket is closed, and return why. A checkpoint."""
        try:
            while True:
                # No message gets as far as this, so it waits for the end.
                await self._connection.get_message()
        except ConnectionClosed as error:
            return _close_reason(error, self._reader.error, self.demux)

    async def aclose(self, code: int, reason: str) -> None:
        """Perform the closing handshake, and close the stream. A checkpoint.

        Waits for the peer without limit. If it is cancelled, the stream is closed all the same.

        Args:
            code: the close code.
            reason: as much of it is sent as a close frame holds.
        """
        await self._connection.aclose(code, truncate_reason(reason))


def dial(
    stream: InjectableStream,
    host: str,
    *,
    path: str = PATH,
    token: str | None = None,
    process: int | None = None,
) -> Opener:
    """Return the opening handshake of the end that connects.

    Args:
        stream: the new connection.
        host: the value of the ``Host`` header.
        path: the path of the request.
        token: the cluster token, if the master requires one.
        process: which process of the master the link is to lead to; ``None``: any.
    """
    headers = [] if token is None else [(b"Authorization", b"Bearer " + token.encode("ascii"))]
    if process is not None:
        headers.append((PROCESS_HEADER.encode(), str(process).encode()))

    async def handshake(shim: NurseryShim) -> tuple[WebSocketConnection, FrameDemux]:
        demux = FrameDemux(stream, is_client=True)
        connection = await wrap_client_stream(
            shim,  # type: ignore[arg-type]
            demux,  # type: ignore[arg-type]
            host,
            path,
            subprotocols=[SUBPROTOCOL],
            extra_headers=headers,
        )
        return connection, demux

    return handshake


def request_of_end(host: str, proof: str, token: str | None, process: int | None = None) -> bytes:
    """Return a request that tells a master that the process of a session has ended.

    It is an opening handshake, since proxies between the two may let nothing else pass. The master rejects it: with 410
    if it has taken note, with 409 if it does not know the session.

    Args:
        host: the value of the ``Host`` header.
        proof: see :func:`~trio_cluster.protocol.proof_of_end`.
        token: the cluster token, if the master requires one.
        process: which process of the master knows the session; ``None``: it is not said.
    """
    lines = [
        f"GET {PATH} HTTP/1.1",
        f"Host: {host}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        # Any 16 bytes: there will be no websocket.
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        f"Sec-WebSocket-Protocol: {SUBPROTOCOL}",
        f"{END_HEADER}: {proof}",
    ]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    if process is not None:
        lines.append(f"{PROCESS_HEADER}: {process}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def accept(stream: InjectableStream, admit: Callable[[str, dict[str, str]], Refusal | None]) -> Opener:
    """Return the opening handshake of the end that is connected to.

    Args:
        stream: the new connection.
        admit: given the path and the headers (names in lower case), returns why the handshake is to be rejected, or
            ``None``. Synchronous, and must not raise.
    """

    async def handshake(shim: NurseryShim) -> tuple[WebSocketConnection, FrameDemux]:
        demux = FrameDemux(stream, is_client=False)
        request: WebSocketRequest = await wrap_server_stream(
            shim,  # type: ignore[arg-type]
            demux,
        )
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in request.headers}
        refusal = admit(request.path, headers)
        if refusal is None and SUBPROTOCOL not in request.proposed_subprotocols:
            refusal = Refusal(400, f"this master supports the subprotocol {SUBPROTOCOL} only")
        if refusal is not None:
            await request.reject(refusal.status, body=refusal.reason.encode())
            raise LinkClosed(refusal.reason, status=refusal.status)
        return await request.accept(subprotocol=SUBPROTOCOL), demux

    return handshake


async def open_websocket(opener: Opener, nursery: trio.Nursery, deadline_after: float) -> WebSocket:
    """Perform an opening handshake. A checkpoint.

    Args:
        opener: the handshake.
        nursery: runs the reader task of the library for as long as the websocket is used. Nothing is raised into it.
        deadline_after: seconds that the handshake may take.

    Raises:
        LinkClosed: it was rejected, it failed, or it took too long. The stream is left open.
    """
    reader = NurseryShim(nursery)

    async def cancel_when_reader_ends() -> None:
        await reader.ended.wait()
        handshake.cancel_scope.cancel(reason="the websocket's reader ended")

    opened: tuple[WebSocketConnection, FrameDemux] | None = None
    refused: LinkClosed | None = None
    with trio.move_on_after(deadline_after) as opening:
        async with trio.open_nursery() as handshake:
            handshake.start_soon(cancel_when_reader_ends)
            try:
                opened = await opener(reader)
            except LinkClosed as error:
                # Not raised from here: the nursery would wrap it in a group.
                refused = error
            except (ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            handshake.cancel_scope.cancel(reason="opened")
    if refused is not None:
        raise refused
    if opening.cancelled_caught:
        raise LinkClosed(f"no websocket handshake within {deadline_after:g} s")
    if opened is None:
        raise _handshake_failure(reader.error)
    return WebSocket(*opened, reader)


def _close_reason(error: ConnectionClosed, reader: Exception | None, demux: FrameDemux) -> LinkClosed:
    """Return why a websocket ended.

    Args:
        error: what the library raised.
        reader: what its reader task raised, if anything.
        demux: has seen how the connection ended.
    """
    reason = error.reason
    if reason is None or reason.code == _ABNORMAL_CLOSURE:
        if reader is not None:
            return LinkClosed(f"the websocket failed: {reader or type(reader).__name__}")
        return LinkClosed("the connection broke", was_reset=demux.was_reset, has_ended=demux.has_ended)
    if reason.reason:
        return LinkClosed(reason.reason, by_peer=True)
    return LinkClosed(
        f"the peer closed the connection ({reason.name.lower().replace('_', ' ')})", by_peer=True
    )


def _handshake_failure(error: Exception | None) -> LinkClosed:
    """Return why there is no websocket, given what the library's reader task raised, if anything."""
    if isinstance(error, ConnectionRejected):
        body = (error.body or b"").decode(errors="replace").strip()
        return LinkClosed(
            truncate_reason(body) or f"HTTP status {error.status_code}",
            by_peer=True,
            status=error.status_code,
        )
    if error is not None:
        return LinkClosed(f"no websocket: {error}")
    return LinkClosed("there was no websocket handshake")

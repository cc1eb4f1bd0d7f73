"""One websocket made safe, and a session spoken over it.

Theory of operation
===================

trio-websocket is a good implementation of the protocol with sharp edges for somebody who has to survive every way a
connection can end. This room is the only one that touches it, and it shows its users a single error,
:class:`LinkClosed`, whatever happened; ``close_reasons.py`` has the words for it.

- *Its reader task must not explode in our nursery.* A peer's ping that crosses our close, and a refused handshake,
  raise inside it. It is handed a :class:`_NurseryShim` in place of a nursery, which lets it end but not fail.
- *Its opening handshake waits for ever* if the peer goes away before it is done. The guard knows when the reader
  has ended, and every opening has a deadline.
- *A cancelled send leaves half a frame on the wire* while the connection looks open. Only one task ever sends
  messages; if it is stopped in the middle of one, the stream is closed by force and nothing more is said on it.
- *Its way of a message is long*: messages pass it by, see :class:`~trio_cluster.link.demux.Tap`.
- *Its close waits for the peer without limit.* Ours has a deadline, and then uses force.
- *Nobody may wait for a consumer while reading.* The reader here hands what came in to a function that returns at
  once; all queues are behind it, and they are bounded by credit.

A link runs five tasks: one reads, one hears what the library has to say about the end, one writes, one watches the
clock, and one keeps the pulse, which lets another thread say that this end lives while its event loop is blocked. What
is to be written comes from the session, which the writer asks for a batch whenever it has been woken and the last write
is done, so that everything that became ready meanwhile leaves in one write. Each task ends the link by saying why;
the first reason counts.

Nobody is given up for time that was not theirs. What this end slept through does not count as the other's silence:
its signs of life are still to be read. And an other end that says it is blocked need not take what it is sent.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import attrs
import trio
from trio_websocket import (
    ConnectionClosed,
    WebSocketConnection,
    WebSocketRequest,
    wrap_client_stream,
    wrap_server_stream,
)

from ..net.watchdog import heartbeats_while_blocked, take_max_lag
from ..protocol import SUBPROTOCOL, Batch, HandshakeError, ProtocolError, Session
from .close_reasons import LinkClosed, close_reason, handshake_failure, truncate_reason
from .demux import FrameDemux
from .frames import frame

__all__ = ["PATH", "PROBE_PATH", "Link", "LinkClosed", "Refusal", "accept", "dial"]

logger = logging.getLogger("trio_cluster.link")

#: Where workers connect.
PATH: Final = "/cluster"
#: Where somebody connects who only wants to know whether this is a master: it says its handshake and hangs up.
PROBE_PATH: Final = "/probe"

#: Seconds that a polite close may take before force is used.
_CLOSE_TIMEOUT: Final = 1.0
_NORMAL, _PROTOCOL_ERROR = 1000, 1002
#: Messages that are written at once at most.
_BURST: Final = 4

EventT = TypeVar("EventT")


@attrs.frozen
class Refusal:
    """Why a connection is not accepted, in HTTP's terms."""

    status: int
    reason: str


_Opened: TypeAlias = tuple[WebSocketConnection, FrameDemux]
Opener: TypeAlias = Callable[["_NurseryShim"], Awaitable[_Opened]]


class _NurseryShim:
    """Stands in for a nursery when trio-websocket starts its reader: the reader may end, but never explode."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.ended = trio.Event()
        self.error: Exception | None = None

    def start_soon(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        self._nursery.start_soon(self._run, function, args, name="websocket reader")

    async def _run(self, function: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
        try:
            await function(*args)
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()


def dial(stream: trio.abc.Stream, host: str, *, path: str = PATH, token: str | None = None) -> Opener:
    """Return what opens a link as the one who connects."""
    headers = [] if token is None else [(b"Authorization", b"Bearer " + token.encode("ascii"))]

    async def open_websocket(shim: _NurseryShim) -> _Opened:
        demux = FrameDemux(stream, is_client=True)
        websocket = await wrap_client_stream(
            shim,  # type: ignore[arg-type]
            demux,  # type: ignore[arg-type]
            host,
            path,
            subprotocols=[SUBPROTOCOL],
            extra_headers=headers,
        )
        return websocket, demux

    return open_websocket


def accept(stream: trio.abc.Stream, admit: Callable[[str, dict[str, str]], Refusal | None]) -> Opener:
    """Return what opens a link as the one who is connected to.

    Args:
        stream: the new connection.
        admit: given the path and the headers (names in lower case), says whether to refuse.
    """

    async def open_websocket(shim: _NurseryShim) -> _Opened:
        demux = FrameDemux(stream, is_client=False)
        request: WebSocketRequest = await wrap_server_stream(
            shim,  # type: ignore[arg-type]
            demux,
        )
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in request.headers}
        refusal = admit(request.path, headers)
        if refusal is None and SUBPROTOCOL not in request.proposed_subprotocols:
            refusal = Refusal(400, f"this end speaks {SUBPROTOCOL} only")
        if refusal is not None:
            await request.reject(refusal.status, body=refusal.reason.encode())
            raise LinkClosed(refusal.reason, status=refusal.status)
        return await request.accept(subprotocol=SUBPROTOCOL), demux

    return open_websocket


class Link:
    """A session spoken over one stream.

    Args:
        stream: a connected stream; it is the link's from now on, and closed with it. See ``injectable``.
        session: one half of the protocol.
        on_events: called with what came in, synchronously, in the reading task. It may use the session and must not
            raise.
        on_sent: called after each write with the body bytes per call that it carried.
        on_closed: called once with the reason, at the instant in which it is clear that the link is over; saying goodbye
            comes after that. Not called for a link that is cancelled.
        before_tick: called before the session is told the time, so that its heartbeat says what is true now.
        timeout: seconds that opening the link, and writing a message, may take.
        linger: seconds that bytes of bodies may wait for more of them, while the link is busy.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        session: Session[EventT],
        *,
        on_events: Callable[[Sequence[EventT]], None],
        on_sent: Callable[[Sequence[tuple[int, int]]], None] = lambda _: None,
        on_closed: Callable[[LinkClosed], None] = lambda _: None,
        before_tick: Callable[[], None] = lambda: None,
        timeout: float,
        linger: float = 0.0,
    ) -> None:
        self._stream = stream
        self._session: Session[Any] = session
        self._on_events = on_events
        self._on_sent = on_sent
        self._on_closed = on_closed
        self._before_tick = before_tick
        self._timeout = timeout
        self._linger = linger
        # Half as much as to look for the clock each time.
        self._now = trio.lowlevel.current_clock().current_time
        self._lingering = False
        self._pending = trio.Event()
        self._handshake_sent = trio.Event()
        self._writing = trio.CancelScope()
        self._scope: trio.CancelScope | None = None
        self._closed: LinkClosed | None = None
        self._code = _NORMAL
        self._write_incomplete = False
        self._close_when_flushed: str | None = None

    def wake(self) -> None:
        """Say that the session has something to send."""
        if not self._lingering or self._session.urgent:
            self._pending.set()

    def end(self, why: str, *, code: int = _NORMAL) -> None:
        """End the link now, whatever is still to be sent; the other end is told why if that is possible."""
        self._end(LinkClosed(why), code)

    def close_when_flushed(self, why: str) -> None:
        """End the link as soon as everything that is queued has been sent.

        What is queued may have to wait until the other end has given credit for it; who cannot wait for that calls
        :meth:`end`, or cancels :meth:`run`.
        """
        self._close_when_flushed = why
        self._pending.set()

    async def run(self, opener: Opener) -> NoReturn:
        """Open the link and keep it going until something ends it.

        Raises:
            LinkClosed: always, if not cancelled. The stream is closed then.
        """
        try:
            async with trio.open_nursery() as outer:
                shim = _NurseryShim(outer)
                try:
                    opened = await self._open(opener, shim)
                    if opened is not None:
                        await self._run_tasks(*opened, shim)
                        await self._close(opened[0])
                finally:
                    self._session.close("the link is over")
                    await trio.aclose_forcefully(self._stream)
                    outer.cancel_scope.cancel(reason="the link is over")
        except trio.Cancelled:
            raise
        assert self._closed is not None
        raise self._closed

    async def _open(self, opener: Opener, shim: _NurseryShim) -> _Opened | None:
        async def cancel_when_reader_ends() -> None:
            await shim.ended.wait()
            nursery.cancel_scope.cancel(reason="the websocket's reader ended")

        opened: _Opened | None = None
        refused: LinkClosed | None = None
        with trio.move_on_after(self._timeout) as opening:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_when_reader_ends)
                try:
                    opened = await opener(shim)
                except (
                    LinkClosed,
                    ConnectionClosed,
                    trio.BrokenResourceError,
                    trio.ClosedResourceError,
                ) as error:
                    refused = error if isinstance(error, LinkClosed) else None
                nursery.cancel_scope.cancel(reason="opened")
        if refused is not None:
            self._closed = refused
        elif opening.cancelled_caught:
            self._closed = LinkClosed(f"no websocket handshake within {self._timeout:g} s")
            opened = None
        elif opened is None:
            self._closed = handshake_failure(shim.error)
        return opened

    async def _run_tasks(self, websocket: WebSocketConnection, demux: FrameDemux, shim: _NurseryShim) -> None:
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            if self._closed is not None:
                self._scope.cancel(reason=self._closed.why)
            nursery.start_soon(self._read, demux)
            nursery.start_soon(self._watch_close, websocket, shim)
            nursery.start_soon(self._write, demux)
            nursery.start_soon(self._keep_time)
            nursery.start_soon(self._send_heartbeats_while_blocked, websocket)

    async def _watch_close(self, websocket: WebSocketConnection, shim: _NurseryShim) -> None:
        try:
            # No message gets here, so this waits until the library knows that the websocket is closed.
            await websocket.get_message()
        except ConnectionClosed as error:
            self._end(close_reason(error, shim.error))

    async def _read(self, demux: FrameDemux) -> None:
        try:
            while (data := await demux.receive()) is not None:
                now = self._now()
                events = self._session.receive(data, now)
                if self._session.peer_blocked:
                    self._writing.deadline = max(self._writing.deadline, now + self._timeout)
                self._on_events(events)
                if self._session.sendable:
                    self.wake()
        except ProtocolError as error:
            incompatible = isinstance(error, HandshakeError)
            self._end(LinkClosed(f"protocol error: {error}", incompatible=incompatible), _PROTOCOL_ERROR)
        finally:
            demux.return_to_library()

    async def _write(self, demux: FrameDemux) -> None:
        last = -math.inf
        while True:
            burst = self._next_burst()
            if not burst:
                if self._close_when_flushed is not None and not self._session.unsent:
                    self._end(LinkClosed(self._close_when_flushed))
                    return
                self._pending = trio.Event()
                await self._pending.wait()
                await self._wait_for_more(last)
                continue
            self._write_incomplete = True
            try:
                if not demux.send_nowait(*[batch.data for batch in burst]):
                    self._writing = trio.CancelScope(deadline=self._now() + len(burst) * self._timeout)
                    with self._writing:
                        await demux.flush()
                    if self._writing.cancelled_caught:
                        self._end(LinkClosed(f"the other end took nothing for {self._timeout:g} s"))
                        return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                # The reader learns the reason, if there is one to learn.
                return
            self._write_incomplete = False
            self._handshake_sent.set()
            for batch in burst:
                self._on_sent(batch.sent)
            last = self._now()
            if self._session.sendable:
                # Others put something into the next one.
                await trio.lowlevel.checkpoint()

    def _next_burst(self) -> list[Batch]:
        """Return what to write at once.

        All who have something to send give it once in each turn of the scheduler, and so does this write. If it were
        always one message, what many of them give would pile up, and come late.
        """
        burst: list[Batch] = []
        while len(burst) < _BURST and (batch := self._session.next_message()) is not None:
            burst.append(batch)
        return burst

    async def _wait_for_more(self, last: float) -> None:
        """Let others put theirs into the message that is about to be sent.

        Whoever woke us is rarely alone, so everybody who is ready now comes along in any case. On a link that is busy,
        the next tokens get a moment more: a message costs each end more than the tokens in it. So few bytes of bodies
        alone are not sent sooner than ``linger`` after what was sent ``last``; those that come meanwhile wake nobody.
        On a link that has been idle for so long nothing waits, and neither do many bytes, nor what begins or ends
        something.
        """
        until = last + self._linger
        if self._session.urgent or self._close_when_flushed is not None or self._now() >= until:
            await trio.lowlevel.checkpoint()
            return
        self._pending = trio.Event()
        self._lingering = True
        try:
            with trio.move_on_at(until):
                await self._pending.wait()
        finally:
            self._lingering = False

    async def _send_heartbeats_while_blocked(self, websocket: WebSocketConnection) -> None:
        def beat(lag: float, blocked: str) -> bytes:
            return frame(self._session.heartbeat_while_blocked(lag, blocked), masked=websocket.is_client)

        def queue_recovery_heartbeat() -> None:
            self._session.queue_heartbeat()
            self._pending.set()

        await self._handshake_sent.wait()
        with heartbeats_while_blocked(
            self._stream, self._session.heartbeat_interval, beat, queue_recovery_heartbeat
        ):
            await trio.sleep_forever()

    async def _keep_time(self) -> None:
        while True:
            due = self._session.deadline()
            await trio.sleep_until(due)
            now = trio.current_time()
            self._session.extend_silence_deadline(now - due, now)
            self._session.lag = take_max_lag()
            self._before_tick()
            try:
                self._session.tick(trio.current_time())
            except ProtocolError as error:
                self._end(LinkClosed(str(error)))
                return
            self._pending.set()

    async def _close(self, websocket: WebSocketConnection) -> None:
        if self._write_incomplete:
            return
        assert self._closed is not None
        with trio.move_on_after(_CLOSE_TIMEOUT):
            await websocket.aclose(self._code, truncate_reason(self._closed.why))

    def _end(self, closed: LinkClosed, code: int = _NORMAL) -> None:
        if self._closed is None:
            self._closed = closed
            self._code = code
            self._session.close(closed.why)
            self._on_closed(closed)
            if self._scope is not None:
                self._scope.cancel(reason=closed.why)

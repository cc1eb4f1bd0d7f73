"""A session run over one websocket, or several after each other, by five tasks.

Theory of operation
===================

A :class:`Link` joins a session (``protocol/``), which has no IO, and a websocket (``websocket.py``). It ends with a
single exception, :class:`LinkClosed`, whatever happened.

- *The reader never waits for a consumer.* It passes what came in to a function that returns at once; all queues are
  behind that function, and they are bounded by credit.
- *Only one task sends messages.* A cancelled send leaves half a frame in the stream while the connection looks open, so
  if the writer is stopped in the middle of a message, the stream is closed by force and nothing more is sent on it.
- *Every wait has a deadline*: the opening handshake, each write, and the closing handshake, after which the stream is
  closed by force.

The five tasks: one reads; one waits for trio-websocket to report the end of the websocket; one writes; one keeps the
session's time; and one lets another thread send heartbeats while the event loop of this process is blocked (see
``net/watchdog.py``). What is to be written comes from the session: whenever the writer has been woken and the last
write is done, it asks for a batch, so that everything that became ready meanwhile leaves in one write. Each task ends
the link by giving the reason; the first reason counts.

A session that can be resumed outlives its websocket: when the connection was cut, it is suspended, and the same link
goes on with it on another one (:meth:`Link.carry`). What is a cut and what is a death is decided here, by how the
connection ended; see ``docs/resumption.md``.

A peer is not dropped for a delay of this end. Time during which this end was blocked does not count as silence of
the peer, whose messages are still waiting to be read; and a peer that reports that it is blocked need not take what it
is sent.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import trio

from ..net.streams import Address
from ..net.watchdog import InjectableStream, heartbeats_while_blocked, take_max_lag
from ..protocol import Batch, HandshakeError, ProtocolError, Session
from .demux import FrameDemux
from .frames import FramingError, frame
from .websocket import LinkClosed, Opener, WebSocket, open_websocket

__all__ = ["Link", "LinkClosed"]

logger = logging.getLogger("trio_cluster.link")

#: Seconds that the closing handshake may take before the stream is closed by force.
_CLOSE_TIMEOUT: Final = 1.0
# Close codes (RFC 6455, section 7.4.1).
_NORMAL, _PROTOCOL_ERROR, _INTERNAL_ERROR = 1000, 1002, 1011
#: Seconds within which what a process has sent before its end must have come.
_REMAINS_TIMEOUT: Final = 1.0
#: Messages in one write at most.
_BURST: Final = 4

EventT = TypeVar("EventT")

#: The first message of a connection, as far as there was one.
First: TypeAlias = bytes | FramingError | None
#: Given a websocket that has just been opened, chooses the link that goes on with it, and returns what it has read
#: before, too; or ``None`` to drop the connection. May wait; must not raise.
Choose: TypeAlias = Callable[[FrameDemux], Awaitable[tuple["Link", First] | None]]


async def receive_first(demux: FrameDemux) -> First:
    """Return the first message on a websocket, or what is wrong with it, for the link that is chosen. A checkpoint."""
    try:
        return await demux.receive()
    except FramingError as error:
        return error


class Link:
    """A session run over a connection, by :meth:`run`; over others, too, if it can be resumed.

    All callbacks are synchronous, and must not raise.

    Args:
        stream: the first connection, from ``injectable``. The link closes it.
        session: one half of the protocol.
        on_events: called with the events of each message that was received. It may use the session.
        on_sent: called after each write with the body bytes that were written: pairs of a call's number and a count.
        on_closed: called with the reason, at the moment at which the connection is known to be over, before the closing
            handshake. It is called again when another connection of a session that was suspended is over. Not called
            for a link that is cancelled.
        before_tick: called before a heartbeat is made, so that it can report the present state.
        timeout: seconds that the opening handshake may take, and the write of one message.
        linger: seconds for which a few bytes of bodies may wait for more of them while the link is busy.

    Attributes:
        proxied: the way to the peer goes through a proxy: the end of a connection need not be that of a process.
    """

    def __init__(
        self,
        stream: InjectableStream,
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
        # The bound method of the clock: it takes half the time of trio.current_time(), which looks the clock up first.
        self._now = trio.lowlevel.current_clock().current_time
        self.proxied = False
        self._lingering = False
        self._pending = trio.Event()
        self._handshake_sent = trio.Event()
        self._writing = trio.CancelScope()
        self._alarm = trio.CancelScope()
        self._scope: trio.CancelScope | None = None
        self._closed: LinkClosed | None = None
        self._code = _NORMAL
        self._write_incomplete = False
        # What is being written, and was not reported as sent.
        self._burst: list[Batch] = []
        # The peer has sent what is no websocket frame.
        self._unreadable = False
        self._close_when_flushed: str | None = None
        # Not before it is known that the peer's process has ended: when the link is over at the latest, and why.
        self._peer_ended_by = math.inf
        self._why_peer_ended = ""
        # Of the websocket that is carried.
        self._demux: FrameDemux | None = None
        # Set while no websocket is carried.
        self._free = trio.Event()
        self._free.set()

    def wake(self) -> None:
        """Make the writer send what the session has queued. Synchronous.

        While the writer lingers, it is woken by urgent data only.
        """
        if not self._lingering or self._session.urgent:
            self._pending.set()

    def end(self, why: str, *, code: int = _NORMAL) -> None:
        """End the link now, whatever is still queued. Synchronous. The peer is sent the reason if that is possible.

        Args:
            why: the reason; the first one counts.
            code: the close code.
        """
        closed = LinkClosed(why)
        if self._closed is not None and self._session.suspended:
            # The connection has just been cut, or is left for another one, and its tasks are still ending.
            self._closed, self._code = closed, code
            self._session.close(why)
            self._on_closed(closed)
        else:
            self._end(closed, code)

    def peer_has_ended(self, why: str) -> None:
        """Take note that the process of the peer has ended: nothing is waited for any more. Synchronous.

        What it has sent before that is received, which takes a moment; then the link ends.

        Args:
            why: the reason, if the end of the connection does not come first.
        """
        if self._session.suspended:
            self.end(why)
            return
        self._peer_ended_by, self._why_peer_ended = self._now() + _REMAINS_TIMEOUT, why
        self._alarm.deadline = min(self._alarm.deadline, self._peer_ended_by)

    def close_when_flushed(self, why: str) -> None:
        """End the link as soon as everything that is queued has been sent. Synchronous.

        What is queued may have to wait until the peer grants credit for it. A caller that cannot wait for that calls
        :meth:`end`, or cancels :meth:`run`.
        """
        self._close_when_flushed = why
        self._pending.set()

    async def run(
        self, opener: Opener, *, stream: InjectableStream | None = None, choose: Choose | None = None
    ) -> NoReturn:
        """Perform the opening handshake and run the link until something ends it. A checkpoint.

        Args:
            opener: the opening handshake, from ``dial`` or ``accept``.
            stream: another connection than the first one; closed in any case.
            choose: chooses the link that goes on with the websocket; ``None``: this one. Without it, a failed opening
                handshake is the end of the session.

        Raises:
            LinkClosed: always, if not cancelled. The stream is closed in either case.
        """
        stream = self._stream if stream is None else stream
        closed: LinkClosed | None = None
        async with trio.open_nursery() as outer:
            try:
                try:
                    websocket = await open_websocket(opener, outer, self._timeout)
                except LinkClosed as failure:
                    closed = failure
                else:
                    chosen = (self, None) if choose is None else await choose(websocket.demux)
                    if chosen is None:
                        closed = LinkClosed("this connection is not needed")
                        websocket.demux.return_to_library(after_close=True)
                        with trio.move_on_after(_CLOSE_TIMEOUT):
                            await websocket.aclose(_NORMAL, closed.why)
                    else:
                        closed = await chosen[0].carry(websocket, stream, chosen[1])
            except Exception:
                # A bug in this package, or in what it calls. It ends this link and nothing else.
                logger.exception("a link failed")
                self._end_after_error()
                closed = self._closed
            finally:
                if choose is None and not self._session.suspended:
                    self._session.close("the link is over")
                await trio.aclose_forcefully(stream)
                outer.cancel_scope.cancel(reason="the link is over")
        assert closed is not None
        raise closed

    def ping(self, on_answer: Callable[[], None]) -> None:
        """Ask the peer for a sign of life on the present connection. Synchronous; may be called while one is carried.

        Args:
            on_answer: called when it has given one, once. Synchronous, and must not raise. It is not called after a
                later ping, nor for another connection.
        """
        demux = self._demux
        if demux is None:
            return

        def answered() -> None:
            demux.on_pong = lambda: None
            on_answer()

        demux.on_pong = answered
        demux.ping()

    @property
    def peer_address(self) -> Address:
        """The address of the other end of the present connection. Raises ``OSError`` if that is over."""
        return self._stream.peer_address

    async def carry(self, websocket: WebSocket, stream: InjectableStream, first: First = None) -> LinkClosed:
        """Run the session over a websocket until something ends that, and return the reason. A checkpoint.

        If the session was suspended by that, it can be resumed on another websocket; otherwise it is closed.

        Args:
            websocket: opened; its closing handshake is performed if that is possible.
            stream: what it is on; left open.
            first: what has been received on it already.
        """
        self._free = trio.Event()
        self._stream = stream
        self._demux = websocket.demux
        self._handshake_sent = trio.Event()
        self._lingering = self._write_incomplete = self._unreadable = False
        try:
            await self._run_tasks(websocket, first)
            if not self._session.suspended:
                await self._close(websocket)
        except Exception:
            # A bug in this package, or in what it calls. It ends this link and nothing else.
            logger.exception("a link failed")
            self._end_after_error()
        finally:
            if not self._session.suspended:
                self._session.close("the link is over")
            self._scope = self._demux = None
            self._free.set()
        closed = self._closed
        assert closed is not None
        if self._session.suspended:
            self._closed = None
        return closed

    async def detach(self) -> None:
        """Leave the present connection, if there is one, for another one of the same session. A checkpoint.

        The session is suspended then, unless it is over.
        """
        if self._closed is None and self._scope is not None and self._session.suspend(self._now()):
            self._closed = LinkClosed("another connection goes on with the session", superseded=True)
            self._report_burst()
            self._scope.cancel(reason=self._closed.why)
        await self._free.wait()

    async def _run_tasks(self, websocket: WebSocket, first: First) -> None:
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            if self._closed is not None:
                self._scope.cancel(reason=self._closed.why)
            nursery.start_soon(self._read, websocket.demux, first)
            nursery.start_soon(self._watch_close, websocket)
            nursery.start_soon(self._write, websocket.demux)
            nursery.start_soon(self._keep_time)
            nursery.start_soon(self._send_heartbeats_while_blocked, websocket)

    def _end_after_error(self) -> None:
        try:
            self._end(LinkClosed("an internal error"), _INTERNAL_ERROR)
        except Exception:
            logger.exception("the end of a link failed")

    async def _watch_close(self, websocket: WebSocket) -> None:
        self._end(await websocket.wait_closed())

    async def _read(self, demux: FrameDemux, first: First) -> None:
        resuming = self._session.suspended
        try:
            if isinstance(first, FramingError):
                raise first
            while (data := first if first is not None else await demux.receive()) is not None:
                first = None
                if self._closed is not None and self._closed.superseded:
                    # It is received again on the other connection.
                    return
                now = self._now()
                events = self._session.receive(data, now)
                if resuming:
                    # That was the answer. From now on the session has heartbeats to send again.
                    resuming = False
                    self._alarm.deadline = min(self._session.deadline(), self._peer_ended_by)
                if self._session.peer_blocked:
                    self._writing.deadline = max(self._writing.deadline, now + self._timeout)
                self._on_events(events)
                if self._session.sendable:
                    self.wake()
        except ProtocolError as error:
            incompatible = isinstance(error, HandshakeError)
            code = error.code if isinstance(error, FramingError) else _PROTOCOL_ERROR
            self._unreadable = isinstance(error, FramingError)
            self._end(LinkClosed(f"protocol error: {error}", incompatible=incompatible), code)
        else:
            demux.return_to_library()
        finally:
            if not self._unreadable:
                # Nothing is left to do here unless this end closes the websocket.
                demux.return_to_library(after_close=True)

    async def _write(self, demux: FrameDemux) -> None:
        last, sendable = -math.inf, True
        while True:
            burst = self._next_burst() if sendable else []
            sendable = True
            if not burst:
                if self._close_when_flushed is not None and not self._session.unsent:
                    self._end(LinkClosed(self._close_when_flushed))
                    return
                self._pending = trio.Event()
                await self._pending.wait()
                await self._wait_for_more(last)
                continue
            self._write_incomplete = True
            self._burst = burst
            try:
                if not demux.send_nowait(*[batch.data for batch in burst]):
                    self._writing = trio.CancelScope(deadline=self._now() + len(burst) * self._timeout)
                    with self._writing:
                        await demux.flush()
                    if self._writing.cancelled_caught:
                        self._end(LinkClosed(f"the peer took nothing for {self._timeout:g} s"))
                        return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                # The reader, or the library, finds out the reason and ends the link.
                return
            self._write_incomplete = False
            self._handshake_sent.set()
            self._burst = []
            for batch in burst:
                self._on_sent(batch.sent)
            last, sendable = self._now(), self._session.sendable
            if sendable:
                # Let other tasks add to the next batch first.
                await trio.lowlevel.checkpoint()

    def _next_burst(self) -> list[Batch]:
        """Return the batches of the next write.

        In each turn of the scheduler every handler may queue something, and this task writes once. If it wrote one
        batch only, the data of many handlers would accumulate and arrive late.
        """
        burst: list[Batch] = []
        while len(burst) < _BURST and (batch := self._session.next_message()) is not None:
            burst.append(batch)
        return burst

    async def _wait_for_more(self, last: float) -> None:
        """Linger: let other tasks add to the message that is about to be sent.

        The task that woke the writer is rarely the only one with something to send, so the tasks that are ready now run
        first in any case. On a busy link tokens wait longer, because a message costs each end more than the tokens in
        it: a few bytes of bodies alone are not sent before ``linger`` seconds have passed since the ``last`` write, and
        what is queued meanwhile does not wake the writer. Nothing waits on a link that has been idle for that long; nor
        do many bytes, or a message that begins or ends something.

        Args:
            last: the time of the last write.
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

    async def _send_heartbeats_while_blocked(self, websocket: WebSocket) -> None:
        def heartbeat(lag: float, blocked: str) -> bytes:
            return frame(self._session.heartbeat_while_blocked(lag, blocked), masked=websocket.is_client)

        def queue_recovery_heartbeat() -> None:
            self._session.queue_heartbeat()
            self._pending.set()

        await self._handshake_sent.wait()
        with heartbeats_while_blocked(
            self._stream, self._session.heartbeat_interval, heartbeat, queue_recovery_heartbeat
        ):
            await trio.sleep_forever()

    async def _keep_time(self) -> None:
        while True:
            deadline = min(self._session.deadline(), self._peer_ended_by)
            self._alarm = trio.CancelScope(deadline=deadline)
            with self._alarm:
                await trio.sleep_forever()
            due, now = self._alarm.deadline, trio.current_time()
            if now >= self._peer_ended_by:
                self._end(LinkClosed(self._why_peer_ended))
                return
            self._session.extend_silence_deadline(now - due, now)
            self._session.lag = take_max_lag()
            self._before_tick()
            try:
                self._session.tick(trio.current_time())
            except ProtocolError as error:
                self._end(LinkClosed(str(error)))
                return
            self._pending.set()

    async def _close(self, websocket: WebSocket) -> None:
        if self._write_incomplete:
            return
        assert self._closed is not None
        with trio.move_on_after(_CLOSE_TIMEOUT):
            if self._unreadable:
                await websocket.demux.fail(self._code, self._closed.why)
            else:
                await websocket.aclose(self._code, self._closed.why)

    def _report_burst(self) -> None:
        """Report as sent what was being written: the session keeps it, and writes it again."""
        burst, self._burst = self._burst, []
        for batch in burst:
            self._on_sent(batch.sent)

    def _end(self, closed: LinkClosed, code: int = _NORMAL) -> None:
        if self._closed is None:
            self._closed = closed
            self._code = code
            cut = closed.was_reset or (closed.has_ended and self.proxied)
            cut = cut and self._peer_ended_by == math.inf
            if cut and self._session.suspend(self._now()):
                self._report_burst()
            else:
                self._session.close(closed.why)
            self._on_closed(closed)
            if self._scope is not None:
                self._scope.cancel(reason=closed.why)

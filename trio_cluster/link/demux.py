"""The stream under the websocket library: data frames bypass the library, and everything else passes through it.

The library performs the opening and closing handshakes on this stream, and answers pings. In between, the link receives
and sends whole messages here, without the library, which needs two more turns of the scheduler and a general parser for
each message. That costs more than everything else that is done with a token.

A connection has three phases:

1. *Opening handshake.* The library reads the stream, but never beyond the end of the HTTP head: what follows are
frames.
2. *Messages.* The link receives messages, and the library is given the control frames between them.
3. *Closing handshake.* When the link receives no more messages, the library reads the rest, up to the close frame of
   the peer.

What the peer sends is never kept without bound. Of several pings that the library has not answered yet only the last
one is kept, as RFC 6455 allows (5.5.3). What follows a close frame is dropped. Pongs do not reach the library, which
sends no pings.
"""

from __future__ import annotations

import errno
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from ..net.watchdog import InjectableStream
from ..protocol import MAX_MESSAGE
from .frames import FrameReader, close_frame, frame, ping_frame

__all__ = ["FrameDemux"]

#: As the library's parser takes it, which accepts bare newlines. It has three bytes at most.
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")
_RECEIVE: Final = 64 * 1024
_SWITCHED: Final = b"101"
#: The first bytes of control frames.
_CLOSE, _PING, _PONG = 0x88, 0x89, 0x8A
_CLOSE_FRAME: Final = b"\x88"


class FrameDemux(trio.abc.Stream):
    """A stream that carries a websocket.

    Args:
        stream: the connection; closed with this stream.
        is_client: whether this end has connected to the other one.

    Attributes:
        was_reset: the connection was reset, or failed in another way that the kernel reported.
        has_ended: the end of the stream was read: the kernel of the peer has closed the connection in an orderly way.
        on_pong: called with each pong. Synchronous, and must not raise.
    """

    def __init__(self, stream: InjectableStream, *, is_client: bool) -> None:
        self.was_reset = False
        self.has_ended = False
        self.on_pong: Callable[[], None] = lambda: None
        self._stream = stream
        self._read_stream = stream.read
        self._is_client = is_client
        self._sending = trio.StrictFIFOLock()
        # Frames that flush() is to send.
        self._unsent = b""
        self._reader = FrameReader(masked=not is_client, limit=MAX_MESSAGE, on_control=self._on_control_frame)
        self._head = b""
        self._opened = False
        self._returned = False
        self._return_after_close = False
        self._closing = False
        self._for_library: deque[bytes] = deque()
        self._library = trio.lowlevel.ParkingLot()

    # For the link

    async def receive(self) -> bytes | None:
        """Return the next message. A checkpoint if none has arrived. Cancelled, it loses nothing.

        When no more messages are to be received, :meth:`return_to_library` has to be called.

        Returns:
            The message; ``None`` if there will be no more. The library knows the reason.

        Raises:
            FramingError: what came is not a message that a peer may send. After it, :meth:`fail` may be called in
                place of :meth:`return_to_library`.
        """
        while True:
            message = self._reader.next_message()
            if self._closing:
                # What was just found came after the close frame.
                return None
            if message is not None:
                return message
            # No function in between: each coroutine on the way to where this waits would be resumed for each message.
            try:
                data = await self._read_stream(_RECEIVE)
            except trio.BrokenResourceError as error:
                self._on_read_error(error)
                return None
            except trio.ClosedResourceError:
                return None
            if not data:
                self.has_ended = True
                return None
            self._reader.feed(data)

    def return_to_library(self, *, after_close: bool = False) -> None:
        """Receive no more messages, and let the library read the rest of the stream. Synchronous, idempotent.

        The rest is the close frame of the peer, or the end of the stream.

        Args:
            after_close: only when the library has sent a close frame. What it cannot read ends the websocket at once,
                and then the peer would get none.
        """
        if after_close and not self._closing:
            self._return_after_close = True
        elif not self._returned:
            self._returned = True
            rest = self._reader.take_remainder()
            if rest and not self._closing:
                self._for_library.append(rest)
            self._library.unpark_all()

    def send_nowait(self, *messages: bytes) -> bool:
        """Send messages in one write, as far as that goes without waiting. Synchronous.

        Returns:
            Whether all was written. If not, :meth:`flush` has to be called before anything else is sent here.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is over.
        """
        data = b"".join([frame(message, masked=self._is_client) for message in messages])
        if self._sending.locked():
            self._unsent = data
            return False
        self._check_open()
        try:
            return self._stream.write_nowait(data)
        except trio.BrokenResourceError as error:
            self._on_write_error(error)
            raise

    def ping(self) -> None:
        """Send a ping, if not at once then before what is sent next. Synchronous.

        Nothing is raised if the connection is over.
        """
        if not self._closing:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                self._stream.write_nowait(ping_frame(masked=self._is_client))

    async def flush(self) -> None:
        """Send what :meth:`send_nowait` could not. A checkpoint. Cancelled, nothing more can be sent.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is over.
        """
        async with self._sending:
            # Not before the lock is held: the library may just have answered a close frame.
            self._check_open()
            data, self._unsent = self._unsent, b""
            try:
                await self._stream.write(data)
            except trio.BrokenResourceError as error:
                self._on_write_error(error)
                raise

    async def fail(self, code: int, reason: str) -> None:
        """Fail the websocket (RFC 6455, section 7.1.7): send a close frame, and drop what still comes. A checkpoint.

        To be called after an error in what came: the library could make no more of it than the reader here, and would
        close the connection without a word. What the peer sends is read until it closes its end, without limit, since
        a connection that is closed with unread bytes in it is reset, and the peer may lose the close frame.

        Args:
            code: the close code.
            reason: as much of it is sent as a close frame holds.
        """
        try:
            async with self._sending:
                await self._stream.write(close_frame(code, reason, masked=self._is_client))
            while await self._read_stream(_RECEIVE):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # There is no one left to tell.
            return

    def _on_read_error(self, error: trio.BrokenResourceError) -> None:
        # EPIPE: the end of the stream had arrived before the reset. ETIMEDOUT: silence, and not a word of the peer.
        number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
        self.was_reset = self.was_reset or number not in (errno.EPIPE, errno.ETIMEDOUT)

    def _on_write_error(self, error: trio.BrokenResourceError) -> None:
        # The kernel reports a reset once, be it to the reader or to the writer. Other errors of a write say nothing of
        # the cause, which the reader will find.
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ECONNRESET:
            self.was_reset = self.was_reset or not self.has_ended

    def _check_open(self) -> None:
        if self._closing:
            raise trio.BrokenResourceError("the peer has closed the websocket")

    def _on_control_frame(self, control: bytes) -> None:
        kind = control[0]
        if kind == _PONG and not self._closing:
            self.on_pong()
        if self._closing or kind not in (_CLOSE, _PING):
            return
        self._closing = kind == _CLOSE
        if self._for_library and not self._closing:
            self._for_library.pop()
        self._for_library.append(control)
        self._library.unpark_all()

    # For the library

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See ``trio.abc.ReceiveStream``."""
        if not self._opened:
            return await self._receive_head()
        await trio.lowlevel.checkpoint()
        while True:
            if self._for_library:
                return self._for_library.popleft()
            if self._returned:
                try:
                    data = await self._read_stream(max_bytes or _RECEIVE)
                except trio.BrokenResourceError as error:
                    self._on_read_error(error)
                    raise
                self.has_ended = self.has_ended or not data
                return data
            await self._library.park()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See ``trio.abc.SendStream``. The library and the link may send at the same time."""
        try:
            async with self._sending:
                await self._stream.write(data)
        finally:
            if self._return_after_close and data[:1] == _CLOSE_FRAME:
                self.return_to_library()

    async def wait_send_all_might_not_block(self) -> None:
        """See ``trio.abc.SendStream``."""
        await self._stream.wait_writable()

    async def aclose(self) -> None:
        """See ``trio.abc.AsyncResource``."""
        await self._stream.aclose()

    async def _receive_head(self) -> bytes:
        """Return what belongs to the opening handshake, and keep what follows it."""
        data = await self._read_stream(_RECEIVE)
        before = len(self._head)
        self._head += data
        # All but the last byte of the end may have arrived before.
        end = _END_OF_HEAD.search(self._head, max(0, before - 2))
        if end is None:
            # The library refuses a head that goes on and on.
            return data
        self._opened = True
        if self._is_client and self._head.split(b" ", 2)[1:2] != [_SWITCHED]:
            # An HTTP response instead of a websocket; the library reads its body.
            self._returned = True
            return data
        size = end.end() - before
        self._reader.feed(data[size:])
        return data[:size]

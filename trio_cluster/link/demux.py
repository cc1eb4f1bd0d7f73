"""What the websocket library is given for a stream: messages pass it by, and everything else goes through it.

The library opens the websocket on it, answers pings, and says goodbye. In between, whoever owns the link reads and
writes whole messages here, without the library: its reading takes two more tasks' turns and a general parser for each
message, which costs more than everything that is done with a token.

Three times follow each other. While the websocket is opened, the library reads the stream itself, but never beyond
the end of the HTTP head: what follows is frames. Then messages are received here, and the library is given the
control frames among them. When nobody receives messages any more, because the link is being ended, the library reads
the stream itself again, to hear the other end's goodbye.

What the other end says is never kept without bound here. Of the pings that the library has not answered yet only the
last one counts, as the protocol allows; pongs, which nobody asked for, and what follows a goodbye mean nothing.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Final

import trio

from ..net.watchdog import InjectableStream
from ..protocol import MAX_MESSAGE
from .frames import FrameReader, frame

__all__ = ["FrameDemux"]

#: As the library's parser sees it, which is content with bare newlines. It has three bytes at most.
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")
_RECEIVE: Final = 64 * 1024
_SWITCHED: Final = b"101"
#: How control frames begin; that of the first kind is how the other end says goodbye.
_GOODBYE, _PING = 0x88, 0x89


class FrameDemux(trio.abc.Stream):
    """A stream with a websocket on it.

    Args:
        stream: the connection; closed with this stream.
        is_client: this end has connected, and not the other one.
    """

    def __init__(self, stream: InjectableStream, *, is_client: bool) -> None:
        self._stream = stream
        self._read_stream = stream.read
        self._is_client = is_client
        self._sending = trio.StrictFIFOLock()
        # Frames that wait for their turn.
        self._unsent = b""
        self._reader = FrameReader(masked=not is_client, limit=MAX_MESSAGE, on_control=self._on_control_frame)
        self._head = b""
        self._opened = False
        self._returned = False
        self._closing = False
        self._for_library: deque[bytes] = deque()
        self._library = trio.lowlevel.ParkingLot()

    # For the link

    async def receive(self) -> bytes | None:
        """Return the next message; ``None`` if there will be none, of which the library knows the reason.

        Whoever does not go on with it has to call :meth:`return_to_library`.

        Raises:
            ProtocolError: what came is not a message that a peer of ours may send.
        """
        while True:
            message = self._reader.next_message()
            if self._closing:
                # What it has just found came after the goodbye.
                return None
            if message is not None:
                return message
            # In place: each function on the way to where it waits would be resumed for each message.
            try:
                data = await self._read_stream(_RECEIVE)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            if not data:
                return None
            self._reader.feed(data)

    def return_to_library(self) -> None:
        """Receive no more messages, and let the library hear the rest: the other end's goodbye, or that there is none.

        Idempotent.
        """
        if not self._returned:
            self._returned = True
            rest = self._reader.take_remainder()
            if rest and not self._closing:
                self._for_library.append(rest)
            self._library.unpark_all()

    def send_nowait(self, *messages: bytes) -> bool:
        """Send messages, together, as far as that goes without waiting.

        Returns:
            Whether they have gone. If not, :meth:`flush` has to follow before anything else is sent here.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is over.
        """
        data = b"".join([frame(message, masked=self._is_client) for message in messages])
        if self._sending.locked():
            self._unsent = data
            return False
        self._check_open()
        return self._stream.write_nowait(data)

    async def flush(self) -> None:
        """Send what :meth:`send_nowait` could not. If it is cancelled, nothing more can be said.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is over.
        """
        async with self._sending:
            # Not before it is our turn: the library may just have answered a goodbye.
            self._check_open()
            data, self._unsent = self._unsent, b""
            await self._stream.write(data)

    def _check_open(self) -> None:
        if self._closing:
            raise trio.BrokenResourceError("the other end has said goodbye")

    def _on_control_frame(self, control: bytes) -> None:
        kind = control[0]
        if self._closing or kind not in (_GOODBYE, _PING):
            return
        self._closing = kind == _GOODBYE
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
                return await self._read_stream(max_bytes or _RECEIVE)
            await self._library.park()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See ``trio.abc.SendStream``. The library and the link may both be sending."""
        async with self._sending:
            await self._stream.write(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See ``trio.abc.SendStream``."""
        await self._stream.wait_writable()

    async def aclose(self) -> None:
        """See ``trio.abc.AsyncResource``."""
        await self._stream.aclose()

    async def _receive_head(self) -> bytes:
        """Give the library what belongs to the opening, and keep what follows it."""
        data = await self._read_stream(_RECEIVE)
        before = len(self._head)
        self._head += data
        # What the end has at most, less one byte, may have come before.
        end = _END_OF_HEAD.search(self._head, max(0, before - 2))
        if end is None:
            # One that goes on and on is refused by the library.
            return data
        self._opened = True
        if self._is_client and self._head.split(b" ", 2)[1:2] != [_SWITCHED]:
            # No websocket but an answer in HTTP, whose body is the library's.
            self._returned = True
            return data
        size = end.end() - before
        self._reader.feed(data[size:])
        return data[:size]

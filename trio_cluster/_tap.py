"""What the websocket library is given for a stream: messages pass it by, and everything else goes through it.

The library opens the websocket on it, answers pings, and says goodbye. In between, whoever owns the link reads and
writes whole messages here, without the library: its reading takes two more tasks' turns and a general parser for each
message, which costs more than everything that is done with a token.

Three times follow each other. While the websocket is opened, the library reads the stream itself, but never beyond
the end of the HTTP head: what follows is frames. Then messages are received here, and the library is given the
control frames among them. When nobody receives messages any more, because the link is being ended, the library reads
the stream itself again, to hear the other end's goodbye.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Final

import trio

from .wire import MAX_MESSAGE, FrameReader, frame

__all__ = ["Tap"]

_END_OF_HEAD: Final = b"\r\n\r\n"
#: Of what a peer says before the websocket is open; more is for the library to refuse.
_HEAD_LIMIT: Final = 64 * 1024
_RECEIVE: Final = 64 * 1024
_SWITCHED: Final = b"101"
#: How the frame begins with which the other end says goodbye.
_GOODBYE: Final = 0x88


class Tap(trio.abc.Stream):
    """A stream with a websocket on it.

    Args:
        stream: what it stands on; closed with it.
        sock: the stream's socket, if it has one; reading is cheaper then.
        dialled: this end has connected, and not the other one.
    """

    def __init__(
        self, stream: trio.abc.Stream, sock: trio.socket.SocketType | None, *, dialled: bool
    ) -> None:
        self._stream = stream
        self._socket = sock
        self._dialled = dialled
        self._sending = trio.StrictFIFOLock()
        self._reader = FrameReader(masked=not dialled, limit=MAX_MESSAGE, on_control=self._pass)
        self._head = b""
        self._opened = False
        self._given_back = False
        self._closing = False
        self._for_library: deque[bytes] = deque()
        self._library = trio.lowlevel.ParkingLot()

    # For the link

    async def receive(self) -> bytes | None:
        """Return the next message; ``None`` if there will be none, of which the library knows the reason.

        Raises:
            ProtocolError: what came is not a message that a peer of ours may send.
        """
        try:
            while (message := self._reader.next_message()) is None:
                data = await self._receive_now()
                if not data:
                    self._give_back()
                    return None
                self._reader.feed(data)
        except BaseException:
            self._give_back()
            raise
        return message

    async def send(self, message: bytes) -> None:
        """Send a message. If it is cancelled, a part of it may have gone, and nothing more can be said.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the connection is over.
        """
        if self._closing:
            raise trio.BrokenResourceError("the other end has said goodbye")
        await self.send_all(frame(message, masked=self._dialled))

    async def _receive_now(self) -> bytes:
        """Return what has come, waiting for it if need be; empty if there will be nothing more."""
        if self._socket is None:
            try:
                return bytes(await self._stream.receive_some(_RECEIVE))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return b""
        while True:
            # First waiting and then reading is one system call, and one turn of the scheduler, less than a stream
            # needs, which has to try first.
            try:
                await trio.lowlevel.wait_readable(self._socket)
                return os.read(self._socket.fileno(), _RECEIVE)
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                return b""

    def _give_back(self) -> None:
        """Let the library hear the rest: the other end's goodbye, or that there is none."""
        if not self._given_back:
            self._given_back = True
            rest = self._reader.take_rest()
            if rest:
                self._for_library.append(rest)
            self._library.unpark_all()

    def _pass(self, control: bytes) -> None:
        self._closing = self._closing or control[0] == _GOODBYE
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
            if self._given_back:
                return await self._stream.receive_some(max_bytes)
            await self._library.park()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See ``trio.abc.SendStream``. The library and the link may both be sending."""
        async with self._sending:
            await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See ``trio.abc.SendStream``."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """See ``trio.abc.AsyncResource``."""
        await self._stream.aclose()

    async def _receive_head(self) -> bytes:
        """Give the library what belongs to the opening, and keep what follows it."""
        data = bytes(await self._stream.receive_some(_RECEIVE))
        before = self._head[-len(_END_OF_HEAD) + 1 :]
        self._head += data
        end = (before + data).find(_END_OF_HEAD) if data else -1
        if end < 0:
            if len(self._head) > _HEAD_LIMIT:
                self._opened = self._given_back = True
            return data
        self._opened = True
        end += len(_END_OF_HEAD) - len(before)
        if self._dialled and self._head.split(b" ", 2)[1:2] != [_SWITCHED]:
            # No websocket but an answer in HTTP, whose body is the library's.
            self._given_back = True
            return data
        self._reader.feed(data[end:])
        return data[:end]

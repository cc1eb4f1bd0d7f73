"""The body of a request, read from its connection: within limits, and no faster than it goes on.

A small body is read before anybody works on the request. A form with a large file in it is read as far as it takes to
know its model, and what has come until then is kept; where the file comes first, as many clients have it, that may be
all of it, so what is kept goes to the disk beyond :data:`SPOOL_THRESHOLD`. From then on the body streams to whoever answers, and a
slow one slows the client.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from io import BytesIO
from typing import IO, Final

import trio

from ..errors import ApiError, InvalidRequest, Overloaded
from ..http1.asgi import Receive
from .direct import Connection

__all__ = [
    "BODY_IDLE_TIMEOUT",
    "BODY_TIMEOUT",
    "SPOOL_THRESHOLD",
    "ClientLeft",
    "RequestBody",
    "SpooledBody",
    "too_large",
]

logger = logging.getLogger("trio_cluster.http")

#: Seconds that a client may be silent in the middle of its body, and that the whole body may take.
BODY_IDLE_TIMEOUT = 30.0
BODY_TIMEOUT = 600.0

#: Bytes of a body that are kept in memory until it is known where it goes.
SPOOL_THRESHOLD: Final = 1 << 20

#: Bytes that are taken at a time of what was kept.
_BLOCK: Final = 256 * 1024


class ClientLeft(Exception):
    """The client has left in the middle of its request; there is nobody to answer."""


class RequestBody:
    """The body of one request.

    Args:
        receive: the ASGI callable that brings it.
        connection: where the body arrives, if that is known.

    Attributes:
        limit: how many bytes it may have.
        received: how many have come.
        complete: all of them have.
        left: the client has left before that.
    """

    def __init__(
        self,
        receive: Receive,
        limit: int,
        connection: Connection | None = None,
    ) -> None:
        self.limit = limit
        self.received = 0
        self.complete = False
        self.left = False
        self._receive = receive
        self._connection = connection
        self._last = trio.current_time() + BODY_TIMEOUT

    async def next(self) -> bytes:
        """Return the next piece of it, perhaps an empty one.

        Raises:
            InvalidRequest: it does not come in time (408), or is larger than it may be (413).
            ClientLeft: there will be no more.
        """
        if self._connection is not None and self._connection.arrived:
            # Nearly always the body arrived together with its head. A deadline would cost more than the rest.
            piece = await self._next()
        else:
            piece = b""
            with trio.move_on_at(min(trio.current_time() + BODY_IDLE_TIMEOUT, self._last)) as scope:
                piece = await self._next()
            if scope.cancelled_caught:
                raise InvalidRequest("The body of the request did not arrive in time", status=408)
        if self.received > self.limit:
            raise too_large(self.limit)
        if self.left:
            raise ClientLeft
        return piece

    async def read(self, most: int, first: bytes = b"") -> bytes:
        """Return what comes until the body is complete, or more than ``most`` bytes have come of it.

        Args:
            most: counts what has come before, too.
            first: what the answer is to begin with.
        """
        if not (self.complete or first):
            first = await self.next()
        if self.complete or self.received > most:
            return first
        # Such a file gives away what is in it; of pieces that are joined there would be two copies for a moment.
        whole = BytesIO(first)
        whole.seek(len(first))
        while not self.complete and self.received <= most:
            whole.write(await self.next())
        return whole.getvalue()

    def extend_deadline(self, seconds: float) -> None:
        """Take so much off the time that the whole body may take: nobody would have taken more of it."""
        self._last += seconds

    async def skip(self, limit: int) -> None:
        """Take the rest of a body that is not read by anything, and keep nothing of it.

        Args:
            limit: bytes that it may have.

        Raises:
            InvalidRequest, ClientLeft: as :meth:`next`.
        """
        self.limit = min(self.limit, limit)
        while not self.complete:
            await self.next()

    async def drop(self, limit: int, seconds: float) -> None:
        """Read on and keep nothing, until the body is complete, the client has left, or it is enough."""
        limit += self.received
        with trio.move_on_after(seconds):
            while not (self.complete or self.left) and self.received <= limit:
                await self._next()

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.left = True
            return b""
        piece: bytes = message.get("body", b"")
        self.received += len(piece)
        self.complete = not message.get("more_body", False)
        return piece


def too_large(limit: int) -> ApiError:
    """Return what to tell a client whose body is larger than it may be."""
    return InvalidRequest(
        f"The body of the request is larger than the {limit} bytes that are taken here", status=413
    )


class SpooledBody:
    """What has come of a body that does not yet know where it goes; forgotten at the end of a ``with`` block."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> SpooledBody:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is kept. Synchronous, idempotent."""
        if self._file is not None:
            self._file.close()

    async def add(self, data: bytes, *, last: bool = False) -> None:
        """Keep some more.

        Args:
            data: goes to the disk, with what waits for that, when there is enough of it.
            last: nothing will be added to it, so that it can as well stay in memory.

        Raises:
            Overloaded: there is no room for it on the disk.
        """
        self._pieces.append(data)
        self._size += len(data)
        if self._size > SPOOL_THRESHOLD and not last:
            # Not by the event loop, which others wait for; a write that is under way when the client leaves is waited
            # for, since the file must not be closed under it.
            await self._on_disk(self._spill, b"".join(self._pieces))
            self._pieces.clear()
            self._size = 0

    async def take(self) -> bytes:
        """Return the next bytes of what was kept, not very many; empty if that was all.

        Nothing can be added any more.
        """
        if self._file is not None:
            data = await self._on_disk(self._fetch, b"")
            if data:
                return data
        while self._pieces:
            piece = self._pieces.pop(0)
            if len(piece) > _BLOCK:
                self._pieces.insert(0, piece[_BLOCK:])
            if piece:
                return piece[:_BLOCK]
        return b""

    async def in_thread(self, work: Callable[[bytes], bytes], data: bytes) -> bytes:
        """Run a function that waits for the disk. Something else takes its place where events are to be repeated."""
        return await trio.to_thread.run_sync(work, data)

    async def _on_disk(self, work: Callable[[bytes], bytes], data: bytes) -> bytes:
        try:
            return await self.in_thread(work, data)
        except OSError as error:
            logger.error("an upload cannot be kept on the disk: %s", error)
            raise Overloaded(f"There is no room for this upload: {error.strerror}") from error

    def _spill(self, data: bytes) -> bytes:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="trio-cluster-")  # noqa: SIM115
            self._read = 0
        self._file.write(data)
        return b""

    def _fetch(self, _: bytes) -> bytes:
        assert self._file is not None
        # The first read turns the file round; what is in its buffer goes out with that.
        self._file.seek(self._read)
        data = self._file.read(_BLOCK)
        self._read += len(data)
        return data

"""The body of a request, read from its connection: within limits, and no faster than its consumer takes it.

A small body is read completely before anything else is done for the request. A form with a large file is read until its
model is known, and what has arrived until then is spooled. Many clients send the file before the field ``model``, so
that may be the whole form; beyond :data:`SPOOL_THRESHOLD` the spool is on disk. The rest of the body is then streamed
to the backend, and a slow backend slows the client.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from io import BytesIO
from typing import IO, Final

import trio

from ..core.threads import run_in_thread
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

#: Seconds for which a client may send nothing in the middle of its body, and that the whole body may take.
BODY_IDLE_TIMEOUT = 30.0
BODY_TIMEOUT = 600.0

#: Bytes of a body that are kept in memory until its model is known.
SPOOL_THRESHOLD: Final = 1 << 20

#: Bytes that are read from the spool at a time.
_BLOCK: Final = 256 * 1024


class ClientLeft(Exception):
    """The client has disconnected in the middle of its request, so there is no one to answer."""


class RequestBody:
    """The body of one request.

    Args:
        receive: the ASGI callable that returns the body.
        limit: how many bytes the body may have.
        connection: the connection on which the body arrives, if it is known.

    Attributes:
        limit: as given; the parse stage lowers it for bodies that are kept in memory.
        received: how many bytes have arrived.
        complete: the whole body has arrived.
        left: the client has disconnected before that.
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
        self._deadline = trio.current_time() + BODY_TIMEOUT

    async def next(self) -> bytes:
        """Return the next piece of the body, which may be empty. May wait.

        Raises:
            InvalidRequest: the body does not arrive in time (408), or is larger than the limit (413).
            ClientLeft: the client has disconnected.
        """
        if self._connection is not None and self._connection.arrived:
            # The usual case: the body arrived together with the head. Setting a deadline would cost more than reading
            # it.
            piece = await self._next()
        else:
            piece = b""
            with trio.move_on_at(min(trio.current_time() + BODY_IDLE_TIMEOUT, self._deadline)) as scope:
                piece = await self._next()
            if scope.cancelled_caught:
                raise InvalidRequest("The body of the request did not arrive in time", status=408)
        if self.received > self.limit:
            raise too_large(self.limit)
        if self.left:
            raise ClientLeft
        return piece

    async def read(self, most: int, first: bytes = b"") -> bytes:
        """Return the body, or its beginning if it is larger than ``most`` bytes.

        Args:
            most: stop when more than this many bytes have arrived in total, those of earlier reads included.
            first: bytes that were read before; the result begins with them.

        Raises:
            InvalidRequest: as for :meth:`next`.
            ClientLeft: as for :meth:`next`.
        """
        if not (self.complete or first):
            first = await self.next()
        if self.complete or self.received > most:
            return first
        # BytesIO.getvalue() shares the buffer that was written to; b"".join() would need twice the memory.
        whole = BytesIO(first)
        whole.seek(len(first))
        while not self.complete and self.received <= most:
            whole.write(await self.next())
        return whole.getvalue()

    def extend_deadline(self, seconds: float) -> None:
        """Give the body so much more time: for that long the backend did not take any of it. Synchronous."""
        self._deadline += seconds

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
        """Read on and keep nothing, until the body is complete or the client has disconnected.

        Args:
            limit: stop after this many further bytes.
            seconds: stop after this time.
        """
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
    """Return the error for a body that is larger than ``limit`` bytes."""
    return InvalidRequest(
        f"The body of the request is larger than the limit of this server, {limit} bytes", status=413
    )


class SpooledBody:
    """The part of a body that arrived before its model was known: in memory, or on disk if it is large.

    Bytes are added, and then taken in the same order. The end of a ``with`` block drops what is left.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> SpooledBody:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is left, and close the file. Synchronous, idempotent."""
        if self._file is not None:
            self._file.close()

    async def add(self, data: bytes, *, last: bool = False) -> None:
        """Add bytes. May wait for the disk.

        Args:
            data: kept in memory until there are more than :data:`SPOOL_THRESHOLD` bytes, which are then written to
                disk.
            last: nothing will be added after this, so it stays in memory.

        Raises:
            Overloaded: there is no room on the disk, or no thread to write to it.
        """
        self._pieces.append(data)
        self._size += len(data)
        if self._size > SPOOL_THRESHOLD and not last:
            # In a thread, so that other requests do not wait for the disk. If the client disconnects meanwhile, the
            # write is awaited nevertheless, since the file must not be closed during it.
            await self._on_disk(self._spill, b"".join(self._pieces))
            self._pieces.clear()
            self._size = 0

    async def take(self) -> bytes:
        """Return the next bytes, at most 256 KiB; empty at the end. May wait for the disk.

        Nothing can be added after the first ``take``.

        Raises:
            Overloaded: the disk cannot be read, or there is no thread to do so.
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
        """Run a function that waits for the disk. Simulations replace this method, so that they can be repeated."""
        return await run_in_thread(work, data)

    async def _on_disk(self, work: Callable[[bytes], bytes], data: bytes) -> bytes:
        try:
            return await self.in_thread(work, data)
        except OSError as error:
            logger.error("an upload cannot be kept on the disk: %s", error)
            raise Overloaded(f"There is no room for this upload on the server: {error.strerror}") from error

    def _spill(self, data: bytes) -> bytes:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="trio-cluster-")  # noqa: SIM115
            self._read = 0
        self._file.write(data)
        return b""

    def _fetch(self, _: bytes) -> bytes:
        assert self._file is not None
        # The first seek also flushes what was written.
        self._file.seek(self._read)
        data = self._file.read(_BLOCK)
        self._read += len(data)
        return data

"""Takes an answer while it is sent, and has it stored before its client can see its end.

A stream is stored when its last event has come, which has the whole response in it. Only that event is kept off the
fast path of the tokens, and held back until it is stored. A plain answer is stored when all of it is there.
"""

from __future__ import annotations

import re
from typing import Final

import attrs
import trio

from .direct import Connection
from .response import Body, Reply
from .sse_buffer import EventBuffer
from .stored_responses import StoredAnswer

__all__ = ["FinalEventBuffer", "capture"]

#: The line that begins the last event of a stream. A JSON text has no line break in it, so no text of a model matches.
_FINAL: Final = re.compile(rb"(?:^|[\r\n])event:[ ]?response\.(?:completed|incomplete|failed)[\r\n]")
#: The same in a piece that may take the fast path. More pieces may match, which is no harm.
_MAYBE_FINAL: Final = re.compile(rb"response\.(?:completed|incomplete|failed)")
_BLANK_LINE: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class FinalEventBuffer(EventBuffer):
    """A buffer that keeps the last event of a response off the fast path."""

    __slots__ = ()

    def is_whole(self, data: bytes | memoryview) -> bool:
        """See ``EventBuffer``."""
        return _MAYBE_FINAL.search(data) is None and super().is_whole(data)


async def capture(reply: Reply, answer: StoredAnswer) -> Reply:
    """Store a reply that is complete, or return one that is stored before its end is sent. May wait."""
    if reply.status != 200:
        return reply
    media_type = dict(reply.headers).get("content-type", "").partition(";")[0].strip().lower()
    taken = _EventCapture(answer) if media_type == "text/event-stream" else _PlainCapture(answer)
    if isinstance(reply.body, bytes):
        await taken.feed(reply.body)
        await taken.end()
        return reply
    return attrs.evolve(reply, body=_CapturedBody(reply.body, taken))


class _PlainCapture:
    """Takes a plain answer."""

    def __init__(self, answer: StoredAnswer) -> None:
        self._answer = answer
        self._pieces: list[bytes] = []
        self._size = 0

    async def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._size += len(data)
        if self._size <= self._answer.most:
            self._pieces.append(data)

    async def end(self) -> None:
        """Store the answer, which has come to its end."""
        if self._size <= self._answer.most:
            await self._answer.complete(b"".join(self._pieces), None)


class _EventCapture:
    """Takes a stream of events, which comes in pieces that mostly end where an event does."""

    def __init__(self, answer: StoredAnswer) -> None:
        self._answer = answer
        self._event: bytearray | None = None
        self._over = False

    async def feed(self, data: bytes) -> None:
        """Take the next bytes that are sent on the slow path; store the answer if its last event is complete."""
        if self._over:
            return
        if self._event is None:
            found = _FINAL.search(data)
            if found is None:
                return
            self._event = bytearray(data[found.start() :].lstrip(b"\r\n"))
        else:
            self._event += data
        if len(self._event) > self._answer.most:
            self._over = True
        elif (end := _BLANK_LINE.search(self._event)) is not None:
            self._over = True
            lines = bytes(self._event[: end.start()]).splitlines()
            texts = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
            await self._answer.complete(b"\n".join(texts), "response")

    async def end(self) -> None:
        """Do nothing: a stream without a last event was cut."""


class _CapturedBody:
    """A body that is stored before its end is returned. See ``Body``."""

    def __init__(self, body: Body, capture: _PlainCapture | _EventCapture) -> None:
        self._body = body
        self._capture = capture
        self._has_fed = True

    @property
    def complete(self) -> bool:
        """See ``Body``."""
        return self._body.complete

    @property
    def is_satisfying(self) -> bool:
        """See ``Body``."""
        return self._has_fed and self._body.is_satisfying

    async def receive(self) -> bytes:
        """See ``Body``."""
        try:
            piece = await self._body.receive()
        except trio.EndOfChannel:
            piece = None
        if piece is None:
            # Otherwise the answer was cut, even if what was sent of it happens to be a whole response.
            if self._body.complete:
                await self._capture.end()
            raise trio.EndOfChannel
        self._has_fed = False
        await self._capture.feed(piece)
        if self._body.complete:
            await self._capture.end()
        self._has_fed = True
        return piece

    def enable_direct_write(self, connection: Connection | None) -> None:
        """See ``Body``. A plain answer is needed as a whole, so it takes the slow path."""
        if isinstance(self._capture, _EventCapture):
            self._body.enable_direct_write(connection)

"""The queues of what is to be written: control messages first, then bodies, each within its credit, in turns.

Theory of operation
===================

There are two kinds of queue. *Control* holds every message that is small; it is encoded when it is posted, so that its
size is known. *Streams* hold the bodies, one for each call that has one under way; they keep the caller's own bytes and
slices of them, never copies.

A batch takes control messages first, and turns to streams only when none are left. That gives each call the order that
it needs: its head, which is a control message, is written before any of its data; its ``Done`` or ``Failed`` is
attached to the end of its stream; and a ``Cancel`` overtakes the data of all calls.

Streams that can send take turns (round robin), one piece each. A piece is as many whole chunks as fit into ``PIECE``
and into the credit: joining a dozen waiting tokens into one message costs less than a dozen messages. A chunk is split
only if it is longer than ``PIECE``. So a producer's small chunk, a server-sent event for instance, arrives in one
message and is never split; the price is that a stream waits while its credit is smaller than its next piece. That wait
always ends, because a receiver grants credit before it holds back more than a quarter of the window, and a piece is
never more than a quarter either.

Nothing here blocks, so the streams are not bounded here. The producer learns from ``Batch.sent`` how many bytes have
been written, and must wait for that.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

import attrs
import msgspec

from .codec import Packed, encode_batch, encode_part, pack_data
from .errors import ProtocolError
from .messages import PIECE, WINDOW, Message

__all__ = ["Batch", "Outbox"]

# About what a Data costs beside its bytes, so that the size of a batch of many small ones is limited too.
_OVERHEAD: Final = 32
# Bytes of one body that do not linger for more: they fill a message well enough.
_BULK: Final = 8 * 1024


@attrs.frozen
class Batch:
    """One websocket message to be written."""

    data: bytes
    sent: tuple[tuple[int, int], ...]
    """For each call with body bytes in the batch: its number, and how many bytes."""


class _Stream:
    """What has not been sent yet of the body that this end sends for one call."""

    __slots__ = ("chunks", "complete", "credit", "size", "tail")

    def __init__(self) -> None:
        self.chunks: deque[bytes | memoryview] = deque()
        self.size = 0
        self.credit = WINDOW
        self.complete = False
        """The last piece is to be marked as such."""
        self.tail: msgspec.Raw | None = None
        """The message that is to follow the last piece."""

    def ready(self) -> bool:
        """Whether a piece can be sent now."""
        if self.chunks:
            return self.credit >= min(len(self.chunks[0]), PIECE)
        return self.complete

    def take(self) -> bytes | memoryview:
        """Remove and return the next piece; the stream must be ready."""
        if not self.chunks:
            return b""
        room = min(PIECE, self.credit)
        chunk = self.chunks.popleft()
        if len(chunk) > PIECE:
            view = memoryview(chunk)
            self.chunks.appendleft(view[PIECE:])
            chunk = view[:PIECE]
        elif self.chunks and len(chunk) + len(self.chunks[0]) <= room:
            several = [chunk]
            room -= len(chunk)
            while self.chunks and len(self.chunks[0]) <= room:
                room -= len(self.chunks[0])
                several.append(self.chunks.popleft())
            chunk = b"".join(several)
        self.size -= len(chunk)
        self.credit -= len(chunk)
        return chunk


class Outbox:
    """The queues of one end of a link. See the top of this module."""

    def __init__(self) -> None:
        self._control: deque[msgspec.Raw] = deque()
        self._control_size = 0
        self._streams: dict[int, _Stream] = {}
        # The streams that can send now, in the order of their turns.
        self._turns: OrderedDict[int, _Stream] = OrderedDict()
        # At least one of them has _BULK bytes to send.
        self._has_bulk = False

    @property
    def backlog(self) -> int:
        """Bytes of control messages that are queued."""
        return self._control_size

    def queued(self, call: int) -> int:
        """Return how many body bytes of ``call`` are queued."""
        stream = self._streams.get(call)
        return 0 if stream is None else stream.size

    def post(self, message: Message) -> None:
        """Queue a control message."""
        self._append(encode_part(message))

    def open(self, call: int) -> None:
        """Begin the stream of ``call``, with a full window of credit."""
        self._streams[call] = _Stream()

    def push(self, call: int, data: bytes | memoryview, *, last: bool = False) -> None:
        """Queue bytes of the body of ``call``; ``last`` completes the body, even without bytes.

        An empty piece that is not the last, a sign of life, is sent as well, but it is not queued behind other pieces:
        those are a sign of life themselves, and if they cannot be sent, empty ones would only accumulate.
        """
        stream = self._streams[call]
        if data or not (last or stream.chunks):
            stream.chunks.append(data)
            stream.size += len(data)
        stream.complete = last
        self._schedule(call, stream)

    def finish(self, call: int, message: Message) -> None:
        """Queue ``message`` behind the queued body of ``call``, and end the stream with it."""
        tail = encode_part(message)
        stream = self._streams[call]
        if stream.chunks:
            stream.tail = tail
        else:
            del self._streams[call]
            self._append(tail)

    def drop_body(self, call: int) -> None:
        """Drop the queued body of ``call``. The message that was to follow it is sent at once."""
        stream = self._streams.get(call)
        if stream is None:
            return
        stream.chunks.clear()
        stream.size = 0
        stream.complete = False
        self._turns.pop(call, None)
        if stream.tail is not None:
            del self._streams[call]
            self._append(stream.tail)

    def drop(self, call: int) -> None:
        """Drop the stream of ``call``, if there is one, with all that is queued in it."""
        self._streams.pop(call, None)
        self._turns.pop(call, None)

    def credit(self, call: int, count: int) -> None:
        """Add ``count`` bytes to the credit of ``call``; without effect once its stream has ended.

        Raises:
            ProtocolError: the credit would exceed the window: more than the peer's consumer can have taken.
        """
        stream = self._streams.get(call)
        if stream is None:
            return
        if stream.credit + count > WINDOW:
            raise ProtocolError(f"call {call}: credit beyond the window of {WINDOW} bytes")
        stream.credit += count
        self._schedule(call, stream)

    def clear(self) -> None:
        """Drop everything."""
        self._control.clear()
        self._control_size = 0
        self._streams.clear()
        self._turns.clear()
        self._has_bulk = False

    @property
    def streams(self) -> int:
        """How many bodies have not been sent completely, including those that have not begun."""
        return len(self._streams)

    @property
    def sendable(self) -> bool:
        """Whether anything can be sent now."""
        return bool(self._control or self._turns)

    @property
    def urgent(self) -> bool:
        """Whether more can be sent now than a few bytes of bodies, which may linger."""
        return self._has_bulk or self._control_size > 0

    @property
    def unsent(self) -> bool:
        """Whether anything is queued, including what waits for credit."""
        return bool(self._control) or any(each.chunks or each.tail for each in self._streams.values())

    def __bool__(self) -> bool:
        """Whether a message is queued or a body is under way, whether or not it can be sent now."""
        return bool(self._control or self._streams)

    def next_batch(self, limit: int, last: Packed | None = None) -> Batch | None:
        """Remove and return what to write next, about ``limit`` bytes; ``None`` if nothing can be sent.

        Args:
            limit: bytes after which nothing more is added.
            last: a message to append if there is a batch.
        """
        batch: list[Packed] = []
        sent: dict[int, int] = {}
        size = 0
        self._has_bulk = False
        while self._control and size < limit:
            message = self._control.popleft()
            length = len(message)
            self._control_size -= length
            size += length
            batch.append(message)
        # If control messages are left, the size has reached the limit; so no data can overtake them here.
        while self._turns and size < limit:
            call, stream = self._turns.popitem(last=False)
            piece = stream.take()
            drained = not stream.chunks
            batch.append(pack_data(call, piece, drained and stream.complete))
            size += len(piece) + _OVERHEAD
            if piece:
                sent[call] = sent.get(call, 0) + len(piece)
            if drained and stream.tail is not None:
                batch.append(stream.tail)
                size += len(stream.tail)
            if drained and (stream.complete or stream.tail is not None):
                del self._streams[call]
            elif not drained:
                self._schedule(call, stream)
        if not batch:
            return None
        if last is not None:
            batch.append(last)
        return Batch(encode_batch(batch), tuple(sent.items()))

    def _append(self, encoded: msgspec.Raw) -> None:
        self._control.append(encoded)
        self._control_size += len(encoded)

    def _schedule(self, call: int, stream: _Stream) -> None:
        if stream.ready():
            self._turns[call] = stream
            self._has_bulk = self._has_bulk or stream.size >= _BULK

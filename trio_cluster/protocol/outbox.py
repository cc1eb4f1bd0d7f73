"""What waits to be written: control messages first, then bodies, each within its credit, taking turns.

Theory of operation
===================

Two kinds of queue. *Control* is everything that is small; it is encoded when it is posted, so that its
size is known. *Streams* are the
bodies, one for each call that has one under way; they hold the caller's own bytes and slices of them, never
copies.

A batch takes control first, and turns to streams only when no control is left. Hence the order that each call
needs: its head, which is control, is out before any of its data; its ``Done`` or ``Failed`` rides at the tail
of its stream; and a ``Cancel`` goes ahead of everybody's data.

Streams that can send take turns, one piece each. A piece is as many whole chunks as fit into ``PIECE`` and
into the credit: putting a dozen tokens that wait into one message costs less than a dozen messages. A chunk
is split only where it is longer than ``PIECE``. So a producer's small chunk, an SSE event for instance,
arrives in one message and never in halves; the price is that a stream waits while its credit is smaller than
its next piece. That wait always ends, because a receiver gives credit back before it holds back more than a
quarter of the window, and a piece is never more than a quarter either.

Nothing here blocks, so nothing here bounds the streams. Whoever fills one is told by ``Batch.sent`` when
bytes have gone, and must wait for that.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

import attrs
import msgspec

from .codec import Packed, freeze, pack_data, write
from .errors import ProtocolError
from .messages import PIECE, WINDOW, Message

__all__ = ["Batch", "Outbox"]

# What a Data costs beside its bytes, about; so that a batch of many small ones ends somewhere too.
_OVERHEAD: Final = 32
# Bytes of one body that are worth a message of their own.
_PLENTY: Final = 8 * 1024


@attrs.frozen
class Batch:
    """One websocket message to be written."""

    data: bytes
    sent: tuple[tuple[int, int], ...]
    """For each call of which the batch carries body bytes: its number, and how many."""


class _Stream:
    """The body that this end sends for one call, as far as it has not been sent."""

    __slots__ = ("chunks", "complete", "credit", "size", "tail")

    def __init__(self) -> None:
        self.chunks: deque[bytes | memoryview] = deque()
        self.size = 0
        self.credit = WINDOW
        self.complete = False
        """The last piece is to be marked."""
        self.tail: msgspec.Raw | None = None
        """What is to follow the last piece."""

    def ready(self) -> bool:
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
    """The queues of one end of a link. See the top of this module for the theory."""

    def __init__(self) -> None:
        self._control: deque[msgspec.Raw] = deque()
        self._control_size = 0
        self._streams: dict[int, _Stream] = {}
        # Those that can send now, in the order of their turns.
        self._turns: OrderedDict[int, _Stream] = OrderedDict()
        # One of them has plenty to send.
        self._plenty = False

    @property
    def backlog(self) -> int:
        """How many bytes of control messages wait."""
        return self._control_size

    def queued(self, call: int) -> int:
        """Return how many body bytes of ``call`` wait."""
        stream = self._streams.get(call)
        return 0 if stream is None else stream.size

    def post(self, message: Message) -> None:
        """Queue a control message."""
        self._append(freeze(message))

    def open(self, call: int) -> None:
        """Begin the stream of ``call``, with a full window of credit."""
        self._streams[call] = _Stream()

    def push(self, call: int, data: bytes | memoryview, *, last: bool = False) -> None:
        """Queue bytes of the body of ``call``; ``last`` completes the body, even without bytes.

        An empty piece that is not the last is sent too, but not queued behind others: what it has to say,
        they say, and if they cannot be sent it would only pile up.
        """
        stream = self._streams[call]
        if data or not (last or stream.chunks):
            stream.chunks.append(data)
            stream.size += len(data)
        stream.complete = last
        self._schedule(call, stream)

    def finish(self, call: int, message: Message) -> None:
        """Queue ``message`` behind what waits of the body of ``call``, and end the stream with it."""
        tail = freeze(message)
        stream = self._streams[call]
        if stream.chunks:
            stream.tail = tail
        else:
            del self._streams[call]
            self._append(tail)

    def cut(self, call: int) -> None:
        """Drop what waits of the body of ``call``; what was to follow it still goes out, and now."""
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
        """End the stream of ``call``, if there is one, and forget all that waits of it."""
        self._streams.pop(call, None)
        self._turns.pop(call, None)

    def credit(self, call: int, count: int) -> None:
        """Let ``call`` send ``count`` more bytes; without effect once its stream has ended.

        Raises:
            ProtocolError: that would be more than the peer can have taken.
        """
        stream = self._streams.get(call)
        if stream is None:
            return
        if stream.credit + count > WINDOW:
            raise ProtocolError(f"call {call}: credit beyond the window of {WINDOW} bytes")
        stream.credit += count
        self._schedule(call, stream)

    def clear(self) -> None:
        """Forget everything."""
        self._control.clear()
        self._control_size = 0
        self._streams.clear()
        self._turns.clear()
        self._plenty = False

    @property
    def streams(self) -> int:
        """How many bodies are under way, or waiting to begin."""
        return len(self._streams)

    @property
    def sendable(self) -> bool:
        """Whether anything may be sent now."""
        return bool(self._control or self._turns)

    @property
    def urgent(self) -> bool:
        """Whether what may be sent now is more than a few bytes of bodies."""
        return self._plenty or self._control_size > 0

    @property
    def unsent(self) -> bool:
        """Whether anything waits to be sent, be it for credit."""
        return bool(self._control) or any(each.chunks or each.tail for each in self._streams.values())

    def __bool__(self) -> bool:
        """Whether there is anything at all, be it sendable now or not."""
        return bool(self._control or self._streams)

    def next_batch(self, limit: int) -> Batch | None:
        """Remove and return what to write next, about ``limit`` bytes; ``None`` if nothing may be sent."""
        batch: list[Packed] = []
        sent: dict[int, int] = {}
        size = 0
        self._plenty = False
        while self._control and size < limit:
            message = self._control.popleft()
            length = len(message)
            self._control_size -= length
            size += length
            batch.append(message)
        # Control that is left over means that size has reached the limit, so no data can overtake it here.
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
        return Batch(write(batch), tuple(sent.items())) if batch else None

    def _append(self, encoded: msgspec.Raw) -> None:
        self._control.append(encoded)
        self._control_size += len(encoded)

    def _schedule(self, call: int, stream: _Stream) -> None:
        if stream.ready():
            self._turns[call] = stream
            self._plenty = self._plenty or stream.size >= _PLENTY

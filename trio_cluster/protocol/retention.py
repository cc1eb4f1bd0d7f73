"""What a session keeps of what it has written, so that another connection can go on where this one has ended.

Theory of operation
===================

Both ends count the batches of a session; a websocket keeps their order, so no number is sent. The sender keeps each
batch until the receiver has acknowledged it, and writes the rest again on a new connection. See ``docs/resumption.md``.

Two kinds of batch are neither counted nor kept: the one that begins with ``Handshake``, and those that begin with
``Heartbeat`` or ``Ack``. A heartbeat is worthless on another connection, the watchdog's thread writes some of them past
the session, and an acknowledgement that had to be acknowledged would never come to rest.

The attributes are read and changed by the session, for each batch and without a function in between: a token that is
alone in its batch would pay for that function.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from .errors import ProtocolError

__all__ = ["ACK_ALONE", "ACK_ALONG", "MAX_RETAINED", "OVERHEAD", "Retention"]

#: About what a batch costs in memory besides its bytes, so that many small ones are acknowledged in time, too.
OVERHEAD: Final = 64
#: Bytes that were received since the last acknowledgement, from which on the next one goes along with what is written.
ACK_ALONG: Final = 64 * 1024
#: The same for one that is written alone. Far more, since it costs a message of its own.
ACK_ALONE: Final = 1024 * 1024
#: Bytes that are kept at most. The buffers of a connection and ``ACK_ALONE`` are far less: a receiver with which more
#: has come together does not acknowledge, and its session stops being resumable.
MAX_RETAINED: Final = 16 * 1024 * 1024


class Retention:
    """The numbers of both directions of a session, and the batches that have not been acknowledged.

    Attributes:
        batches: what was sent and has not been acknowledged, oldest first: the bytes that were written, not copies.
        size: their bytes, with :data:`OVERHEAD` for each.
        acknowledged: how many batches the peer has acknowledged.
        received: how many batches of the peer have been processed.
        unacknowledged: the bytes received since the last acknowledgement was sent, and :data:`OVERHEAD` for each batch.
    """

    __slots__ = ("acknowledged", "batches", "received", "size", "unacknowledged")

    def __init__(self) -> None:
        self.batches: deque[bytes] = deque()
        self.size = 0
        self.acknowledged = 0
        self.received = 0
        self.unacknowledged = 0

    @property
    def sent(self) -> int:
        """How many batches have been sent."""
        return self.acknowledged + len(self.batches)

    def knows(self, count: int) -> bool:
        """Return whether a peer that has received ``count`` batches can be sent the rest."""
        return self.acknowledged <= count <= self.sent

    def acknowledge(self, count: int) -> None:
        """Forget what the peer has received: the first ``count`` batches of the session.

        Raises:
            ProtocolError: it has acknowledged fewer before, or has acknowledged what was not sent.
        """
        if not self.knows(count):
            raise ProtocolError(
                f"an acknowledgement of {count} messages; {self.acknowledged} were acknowledged and {self.sent} sent"
            )
        while self.acknowledged < count:
            self.size -= len(self.batches.popleft()) + OVERHEAD
            self.acknowledged += 1

"""What ends a session: the peer said something that the protocol does not allow, or nothing at all.

Everything here is the peer's fault. What the local user of a session does wrong raises ``ValueError`` (a
value that cannot be sent) or ``RuntimeError`` (a message in the wrong state), leaves the session as it was,
and is a bug.
"""

from __future__ import annotations

__all__ = ["HandshakeError", "PeerSilent", "ProtocolError"]


class ProtocolError(Exception):
    """The peer broke the protocol; the session is over.

    Attributes:
        reason: one line for a log, and for the close frame that ends the link. It names the message, the
            field and the state, and repeats nothing of unbounded size that the peer sent.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class HandshakeError(ProtocolError):
    """The peer is no trio_cluster node, or speaks no version of the protocol that we do; it will not mend."""


class PeerSilent(ProtocolError):
    """Nothing at all came from the peer for longer than it may be silent."""

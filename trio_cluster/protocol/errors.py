"""Errors that end a session: the peer violated the protocol, or sent nothing at all.

All of them are the peer's fault. What the local caller of a session does wrong raises ``ValueError`` (a value that
cannot be sent) or ``RuntimeError`` (a message in the wrong state), leaves the session as it was, and is a bug.
"""

from __future__ import annotations

__all__ = ["HandshakeError", "PeerSilent", "ProtocolError", "ResumptionRefused"]


class ProtocolError(Exception):
    """The peer violated the protocol; the session is over.

    Attributes:
        reason: one line for the log and for the close frame. It names the message, the field and the state, and repeats
            nothing of unbounded size that the peer sent.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class HandshakeError(ProtocolError):
    """The peer is not a trio_cluster node, or has no protocol version in common with this one; a retry is useless."""


class PeerSilent(ProtocolError):
    """No message came from the peer for longer than the silence timeout."""


class ResumptionRefused(ProtocolError):
    """The peer does not go on with the session that it was asked to resume, or the time for that is over."""

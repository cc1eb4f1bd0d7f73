"""Every way in which a link can end, as one exception that says why in one line.

What the websocket library tells of an end is spread over what it raises, the close frame that the other end has sent,
and what its reader task has met with. All of that is made into words here, for a log.
"""

from __future__ import annotations

from typing import Final

from trio_websocket import ConnectionClosed, ConnectionRejected

__all__ = ["LinkClosed", "close_reason", "handshake_failure", "truncate_reason"]

#: Bytes of reason that a close frame holds.
CLOSE_REASON: Final = 123


class LinkClosed(Exception):
    """The link is over.

    Attributes:
        why: one line for a log.
        by_peer: whether the other end closed the link and gave this as its reason.
        status: the HTTP status with which the opening was refused, if it was.
        incompatible: the two ends do not speak the same protocol, and will not do so next time.
    """

    def __init__(
        self, why: str, *, by_peer: bool = False, status: int | None = None, incompatible: bool = False
    ) -> None:
        super().__init__(why)
        self.why = why
        self.by_peer = by_peer
        self.status = status
        self.incompatible = incompatible


def truncate_reason(reason: str) -> str:
    """Return as much of a reason as a close frame holds."""
    return reason.encode()[:CLOSE_REASON].decode(errors="ignore")


def close_reason(error: ConnectionClosed, reader: Exception | None) -> LinkClosed:
    """Say why a websocket ended, given what the library raises and what its reader has met with, if anything."""
    reason = error.reason
    if reason is None or reason.code == 1006:
        if reader is not None:
            return LinkClosed(f"the websocket failed: {reader or type(reader).__name__}")
        return LinkClosed("the connection broke")
    if reason.reason:
        return LinkClosed(reason.reason, by_peer=True)
    return LinkClosed(
        f"the other end closed the connection ({reason.name.lower().replace('_', ' ')})", by_peer=True
    )


def handshake_failure(error: Exception | None) -> LinkClosed:
    """Say why there is no websocket, given what the library's reader has met with, if anything."""
    if isinstance(error, ConnectionRejected):
        body = (error.body or b"").decode(errors="replace").strip()
        return LinkClosed(
            truncate_reason(body) or f"HTTP status {error.status_code}",
            by_peer=True,
            status=error.status_code,
        )
    if error is not None:
        return LinkClosed(f"no websocket: {error}")
    return LinkClosed("there was no websocket handshake")

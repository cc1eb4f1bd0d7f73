"""The limits of TLS handshakes: how long one may take, and how many are made at once.

Until a client has completed its handshake, nobody knows who it is, and its connection costs a task and some 50 KiB. So
a client has :data:`HANDSHAKE_TIMEOUT` seconds for it. If more than :data:`MAX_HANDSHAKES` are being made, the oldest
one is given up for the new one, since an honest client needs only a moment.

A handshake that fails is logged in one line that says why; a crowd of them is logged as a number.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from .streams import ByteStream
from .throttled_log import ThrottledLog

__all__ = ["HANDSHAKE_TIMEOUT", "MAX_HANDSHAKES", "Handshakes"]

#: Seconds that a TLS handshake may take.
HANDSHAKE_TIMEOUT: Final = 10.0
#: TLS handshakes that are made at once, on one port.
MAX_HANDSHAKES: Final = 256


class Handshakes:
    """The handshakes of one port.

    Args:
        logger: where it is logged that one has failed.
    """

    def __init__(self, logger: logging.Logger) -> None:
        # A dict, for its order: the oldest is the first.
        self._running: dict[trio.CancelScope, str] = {}
        self._failures = ThrottledLog(logger, "TLS handshakes failed")

    async def run(self) -> None:
        """Log how many failures were not logged one by one, until cancelled."""
        await self._failures.run()

    async def perform(self, stream: ByteStream) -> bool:
        """Do the handshake of a connection. A checkpoint.

        Args:
            stream: a connection that has come in and needs one. It is closed if this returns ``False`` or is
                cancelled.

        Returns:
            Whether the connection can be served.
        """
        why, address = "", _peer(stream)
        scope = trio.CancelScope(deadline=trio.current_time() + HANDSHAKE_TIMEOUT)
        self._running[scope] = why
        try:
            self._make_room()
            with scope:
                try:
                    await stream.handshake()
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    why = str(error) or "the connection was lost"
            why = why or self._running[scope]
            if scope.cancelled_caught:
                why = why or f"it was not complete within {HANDSHAKE_TIMEOUT:g} s"
        except BaseException:
            stream.close()
            raise
        finally:
            del self._running[scope]
        if why:
            self._failures.warning(f"TLS handshake failed: {why}", {"address": address})
            stream.close()
        return not why

    def _make_room(self) -> None:
        if len(self._running) > MAX_HANDSHAKES:
            oldest = next(scope for scope, why in self._running.items() if not why)
            self._running[oldest] = f"more than {MAX_HANDSHAKES} were begun"
            oldest.cancel(reason="too many handshakes")


def _peer(stream: ByteStream) -> str:
    try:
        return stream.peer_address[0]
    except OSError:
        return "unknown"

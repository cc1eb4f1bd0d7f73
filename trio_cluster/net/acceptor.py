"""How connections are accepted: all that wait, when one does.

Clients come in crowds, when a server has been started or a proxy opens its pool. To accept one, give all tasks a turn,
and accept the next one makes the last of a thousand wait for a thousand turns. So those that wait behind the first one
are accepted with it, up to :data:`_AT_ONCE`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final, NoReturn

import trio

from .streams import ByteStream, Listener

__all__ = ["accept_all"]

logger = logging.getLogger("trio_cluster.net")

#: Connections that are accepted before all other tasks have their turn.
_AT_ONCE: Final = 16
#: The errors of a system that has no room for another connection, and may have later.
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: Seconds until it is tried again then.
_WAIT_FOR_ROOM: Final = 0.1
#: Seconds without such an error after which it is over.
_OVER_AFTER: Final = 5.0


async def accept_all(listener: Listener, admit: Callable[[ByteStream], object]) -> NoReturn:
    """Accept connections until cancelled.

    Without room for another connection (file descriptors, memory), the listener is tried again, ten times a second, and
    connections wait in its backlog. That is logged when it begins and when it is over, and not for each attempt.

    Args:
        listener: where they come in; closed in the end.
        admit: called with the stream of each, which is the callee's to close. Synchronous. If it raises an exception,
            that is logged, and the connection is closed.

    Raises:
        OSError: the listener is broken.
        trio.ClosedResourceError: the listener was closed by another task.
    """
    shortage: _Shortage | None = None
    async with listener:
        while True:
            try:
                stream = await (listener.accept() if shortage is None else shortage.accept(listener))
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                if shortage is None:
                    shortage = _Shortage(error)
                shortage.went_on()
                await trio.sleep(_WAIT_FOR_ROOM)
                continue
            if stream is None:
                shortage = None
                continue
            _admit(stream, admit)
            _accept_waiting(listener, admit)


class _Shortage:
    """A time without room for connections, from the first error until there was none for a while."""

    def __init__(self, error: OSError) -> None:
        self._began = self._last = trio.current_time()
        logger.error("no room for more connections, they have to wait: %s", error.strerror)

    def went_on(self) -> None:
        """Record that there was no room just now."""
        self._last = trio.current_time()

    async def accept(self, listener: Listener) -> ByteStream | None:
        """Accept a connection. Return ``None``, and log it, if the shortage is over before one comes. A checkpoint.

        Raises:
            OSError, trio.ClosedResourceError: as ``Listener.accept``.
        """
        with trio.move_on_at(self._last + _OVER_AFTER):
            return await listener.accept()
        lasted = round(self._last - self._began, 1)
        logger.warning("there is room for connections again", extra={"fields": {"lasted": lasted}})
        return None


def _admit(stream: ByteStream, admit: Callable[[ByteStream], object]) -> None:
    try:
        admit(stream)
    except Exception:
        # It must not end the listener, and all other connections with it.
        logger.exception("a connection could not be served")
        stream.close()


def _accept_waiting(listener: Listener, admit: Callable[[ByteStream], object]) -> None:
    for _ in range(_AT_ONCE - 1):
        try:
            stream = listener.accept_nowait()
        except (trio.WouldBlock, OSError, trio.ClosedResourceError):
            # No connection waits any more; or the next ``accept`` meets the same error, and decides what to do.
            return
        _admit(stream, admit)

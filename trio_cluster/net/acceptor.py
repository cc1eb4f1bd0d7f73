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

logger = logging.getLogger("trio_cluster.http")

#: Connections that are accepted before all other tasks have their turn.
_AT_ONCE: Final = 16
#: The errors of a system that has no room for another connection, and may have later.
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: Seconds until it is tried again then.
_WAIT_FOR_ROOM: Final = 0.1


async def accept_all(listener: Listener, admit: Callable[[ByteStream], object]) -> NoReturn:
    """Accept connections until cancelled.

    Args:
        listener: where they come in; closed in the end.
        admit: called with the stream of each, which is the callee's to close. Synchronous.

    Raises:
        OSError: the listener is broken. A system that has no room for another connection is logged, and waited for.
        trio.ClosedResourceError: the listener was closed by another task.
    """
    async with listener:
        while True:
            try:
                admit(await listener.accept())
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                logger.error("no room for another connection: %s", error.strerror)
                await trio.sleep(_WAIT_FOR_ROOM)
            else:
                _accept_waiting(listener, admit)


def _accept_waiting(listener: Listener, admit: Callable[[ByteStream], object]) -> None:
    for _ in range(_AT_ONCE - 1):
        try:
            stream = listener.accept_nowait()
        except (trio.WouldBlock, OSError, trio.ClosedResourceError):
            # No connection waits any more; or the next ``accept`` meets the same error, and decides what to do.
            return
        admit(stream)

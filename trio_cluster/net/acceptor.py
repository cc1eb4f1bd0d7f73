"""How connections are accepted: all that wait, when one does.

Clients come in crowds, when a server has been started or a proxy opens its pool. To accept one, give all tasks a turn,
and accept the next one makes the last of a thousand wait for a thousand turns. So those that wait behind the first one
are accepted with it, up to :data:`_AT_ONCE`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NoReturn

import trio

from ..core.exhaustion import ExhaustionLog, exhausted_resource
from .streams import ByteStream, Listener

__all__ = ["accept_all"]

logger = logging.getLogger("trio_cluster.http")

#: Connections that are accepted before all other tasks have their turn.
_AT_ONCE: Final = 16
#: Seconds until it is tried again then.
_WAIT_FOR_ROOM: Final = 0.1


async def accept_all(listener: Listener, admit: Callable[[ByteStream], object]) -> NoReturn:
    """Accept connections until cancelled.

    Args:
        listener: where they come in; closed in the end.
        admit: called with the stream of each, which is the callee's to close. Synchronous. If it raises an exception,
            that is logged, and the connection is closed.

    Raises:
        OSError: the listener is broken. A system that has no room for another connection is waited for; that is logged
            when it begins, and when it is over.
        trio.ClosedResourceError: the listener was closed by another task.
    """
    exhaustion = ExhaustionLog(logger, "another connection")
    async with listener:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                resource = exhausted_resource(error)
                if not resource:
                    raise
                exhaustion.failed(resource)
                await trio.sleep(_WAIT_FOR_ROOM)
            else:
                exhaustion.succeeded()
                _admit(stream, admit)
                _accept_waiting(listener, admit)


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

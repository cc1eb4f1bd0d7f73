"""How connections come in: all that wait, when one does.

Clients come in crowds, when a server has been started or a proxy opens its pool. To accept one, give everybody a turn,
and accept the next one makes the last of a thousand wait for a thousand turns. So those that wait behind the first one
are accepted with it, up to :data:`_AT_ONCE`.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from typing import Any, Final, NoReturn

import trio

__all__ = ["accept_all"]

logger = logging.getLogger("trio_cluster.http")

#: Connections that are accepted before all others have their turn.
_AT_ONCE: Final = 16
#: What says that there is no room for another connection, and that there may be later.
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: Seconds until it is tried again then.
_WAIT_FOR_ROOM: Final = 0.1


async def accept_all(listener: trio.abc.Listener[Any], admit: Callable[[Any], object]) -> NoReturn:
    """Accept connections until cancelled.

    Args:
        listener: where they come in; closed in the end.
        admit: called with the stream of each, which is the callee's to close.

    Raises:
        OSError: the listener is broken. That there is no room for another connection is logged, and waited out.
        trio.ClosedResourceError: it was closed by somebody else.
    """
    async with listener:
        behind = _second_look(listener)
        try:
            while True:
                try:
                    admit(await listener.accept())
                except OSError as error:
                    if error.errno not in _NO_ROOM:
                        raise
                    logger.error("no room for another connection: %s", error.strerror)
                    await trio.sleep(_WAIT_FOR_ROOM)
                else:
                    _accept_waiting(behind, admit)
        finally:
            if behind is not None:
                behind.close()


def _second_look(listener: trio.abc.Listener[Any]) -> socket.socket | None:
    """Return the listener's socket once more, without trio around it, which would wait after each connection."""
    if not isinstance(listener, trio.SocketListener):
        return None
    sock = listener.socket
    return socket.fromfd(sock.fileno(), sock.family, sock.type)


def _accept_waiting(behind: socket.socket | None, admit: Callable[[Any], object]) -> None:
    if behind is None:
        return
    for _ in range(_AT_ONCE - 1):
        try:
            accepted, _ = behind.accept()
        except OSError:
            # Nobody waits any more; or what is wrong is met by the listener again, which knows what to do about it.
            return
        admit(trio.SocketStream(trio.socket.from_stdlib_socket(accepted)))

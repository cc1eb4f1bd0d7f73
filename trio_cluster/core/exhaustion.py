"""Resources that this process or its machine has run out of: how that is recognized, and logged.

A connection that cannot be made, or accepted, because there is no descriptor, no memory, no thread or no local port
left says nothing about the other side. It must not be taken for a loss of the peer. It also happens again and again
while it lasts, so it is logged when it begins and when it is over, not each time.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import Final

import trio

__all__ = ["ExhaustionLog", "exhausted_resource"]

_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})
#: How Python says that the system starts no further thread. It has no class and no number.
_NO_THREAD: Final = "can't start new thread"
#: Seconds without such an error after which a success means that it is over.
_QUIET: Final = 5.0


def exhausted_resource(error: BaseException) -> str:
    """Return which resource of this machine an error says is used up, in the system's words; empty if none.

    The causes of an error, and the members of a group, are searched as well.
    """
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(exhausted_resource, error.exceptions)), "")
    if isinstance(error, socket.gaierror):
        return os.strerror(errno.ENOMEM) if error.errno == socket.EAI_MEMORY else ""
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return os.strerror(error.errno)
    if isinstance(error, RuntimeError) and error.args == (_NO_THREAD,):
        return _NO_THREAD
    return "" if error.__cause__ is None else exhausted_resource(error.__cause__)


class ExhaustionLog:
    """Logs that a resource is used up when that begins, and when it is over. Synchronous.

    Args:
        logger: where to.
        what: what cannot be done for want of it: ``"connections to ..."``.
    """

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._last: float | None = None
        self._failures = 0

    def failed(self, resource: str) -> None:
        """Take note of a failure.

        Args:
            resource: what is used up, from :func:`exhausted_resource`.
        """
        if self._last is None:
            self._failures = 0
            limit = "ulimit -u, or pids of the container" if resource == _NO_THREAD else "ulimit -n"
            self._logger.error(
                "no room for %s: %s; raise the limit (%s), or send fewer requests at once",
                self._what,
                resource,
                limit,
            )
        self._last = trio.current_time()
        self._failures += 1

    def succeeded(self) -> None:
        """Take note of a success. Soon after a failure it means nothing: there may be room for this one only."""
        if self._last is not None and trio.current_time() - self._last >= _QUIET:
            self._last = None
            self._logger.info(
                "there is room for %s again", self._what, extra={"fields": {"failures": self._failures}}
            )

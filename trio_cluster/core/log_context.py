"""The request that a log record is about: context variables, set where work for a request begins.

Modules log to the loggers below ``trio_cluster`` and know nothing about formats. The message is a constant sentence
that states what happened; the objects it happened to are structured fields::

    logger.info("worker joined", extra={"fields": {"worker": worker_id, "models": names}})

The two context variables here follow a request through its tasks and into their threads. So a formatter can add them to
every record, including those of a user's handler and of the libraries that it uses. The command line's formatters, in
``cli/logs.py``, do so.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

__all__ = ["MOST_IDS", "current_principal", "current_request"]

#: How many request ids a record lists at most, if it is about several requests.
MOST_IDS: Final = 20

#: The id of the request that the current task works for; empty outside of a request.
current_request: Final[ContextVar[str]] = ContextVar("current_request", default="")

#: The name of the principal that sent the request; empty outside of a request, and where no API key is required.
current_principal: Final[ContextVar[str]] = ContextVar("current_principal", default="")

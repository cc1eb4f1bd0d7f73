"""Limits that several folders share."""

from __future__ import annotations

from typing import Final

__all__ = ["CLOSE_TIMEOUT", "PARSE_IN_THREAD", "PROCESSES_MAX", "WINDOW"]

#: Bytes of a body that may wait for their consumer, on each node that the body passes and on each link between two
#: nodes. It is also the credit with which a call begins in each direction.
WINDOW: Final = 256 * 1024

#: A JSON text of this many bytes or more is parsed in a thread. Parsing it in the event loop would delay other requests
#: noticeably.
PARSE_IN_THREAD: Final = 1 << 20

#: Processes that a master may be.
PROCESSES_MAX: Final = 64

#: Seconds that the other end is given at the end of a connection: a client to read the last bytes, a worker to close
#: its link, and the requests of a node that stops to end after they were cancelled.
CLOSE_TIMEOUT: Final = 2.0

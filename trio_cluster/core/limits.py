"""Bounds that several rooms share."""

from __future__ import annotations

from typing import Final

__all__ = ["CLOSE_TIMEOUT", "PARSE_IN_THREAD", "WINDOW"]

#: Bytes of a body that may wait for their consumer, on each node that the body passes and on each link between two
#: nodes; so the credit that a call begins with in each direction.
WINDOW: Final = 256 * 1024

#: Bytes of a JSON text from which parsing it in the event loop would be felt by other requests: it is parsed in a thread.
PARSE_IN_THREAD: Final = 1 << 20

#: Seconds that the other end gets at the end of a connection: a client to read what it was told last, a worker to close
#: its link, the requests of a node that stops to end.
CLOSE_TIMEOUT: Final = 2.0

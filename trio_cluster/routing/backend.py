"""Backends: what a request can be routed to. A local handler and a worker look the same to the router."""

from __future__ import annotations

from typing import Final, Protocol

from ..core.call import Call
from ..core.request import Request
from .health import Health

__all__ = ["LOCAL", "Backend"]

#: The name of every backend of this process.
LOCAL: Final = "local"


class Backend(Protocol):
    """Answers requests for one or more models: a handler in this process, or a worker."""

    @property
    def name(self) -> str:
        """The node that does the work: a worker's id, or :data:`LOCAL`."""
        ...

    @property
    def load(self) -> float:
        """The number of its calls, of all masters, divided by the number that it can run at once. May exceed 1."""
        ...

    @property
    def elsewhere(self) -> int:
        """How many calls it has from other masters; they are part of its load."""
        ...

    @property
    def health(self) -> Health:
        """Whether it may be given new calls."""
        ...

    def open(self, request: Request) -> Call:
        """Begin to answer a request. Synchronous: on return the call exists and can be cancelled.

        Raises:
            ApiError: this backend cannot answer it now; nothing was started.
        """
        ...

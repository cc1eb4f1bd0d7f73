"""What a request can be routed to: a handler in this process, or a worker. The router sees no difference."""

from __future__ import annotations

from typing import Final, Protocol

from ..core.call import Call
from ..core.request import Request
from .health import Health

__all__ = ["LOCAL", "Backend"]

#: The name of every backend in this process.
LOCAL: Final = "local"


class Backend(Protocol):
    """Whatever can answer requests: a handler in this process, or a worker far away."""

    @property
    def name(self) -> str:
        """The node that does the work: a worker's id, or :data:`LOCAL`."""
        ...

    @property
    def load(self) -> float:
        """How busy it is: calls it has, as a share of those it can run at once. May exceed 1."""
        ...

    @property
    def health(self) -> Health:
        """Whether it may be given new calls, and how well it does with them."""
        ...

    def open(self, request: Request) -> Call:
        """Begin to answer ``request``. Synchronous: on return the call exists and can be cancelled.

        Raises:
            ApiError: it cannot be begun here; nothing was started.
        """
        ...

"""The interface of what counts requests against the limits of their keys, and the refusals.

There are three: ``memory.py`` counts in this process, ``redis.py`` in a server that several masters share, and
``group/limiter.py`` in the supervisor of a master that is several processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import trio

from ..core.principal import Limits, Principal
from ..core.request import Request
from ..core.state_dir import StateDir
from ..errors import ApiError, QuotaExceeded, RateLimited
from .account import LimitState, Refusal
from .reservation import Reservation

__all__ = ["CountedElsewhere", "Limiter", "Refused", "refused"]

#: Microseconds in a millisecond.
_MS: Final = 1000


class Limiter(Protocol):
    """Counts requests against the limits of their keys."""

    async def reserve(self, principal: Principal, limits: Limits, request: Request) -> Reservation:
        """Reserve what a request may use.

        Whatever happens to the caller, nothing stays reserved: the reservation is returned, and must be ended with
        :meth:`Reservation.end_request`; or it is settled already when this is cancelled or raises. May be a checkpoint;
        waits for a second at most.

        Raises:
            Refused: the request is over a limit.
            ApiError: the limits cannot be counted at the moment, and the options say that requests are refused then.
        """
        ...

    async def state(self, principal: Principal, limits: Limits) -> LimitState:
        """Return how much is left. May be a checkpoint; waits for a second at most."""
        ...

    def opened(self) -> AbstractAsyncContextManager[None]:
        """Count within a block. At its end, what must outlive the process is written."""
        ...

    async def release(self, forward: Callable[[bytes], None]) -> None:
        """Leave the state directory to another process. A checkpoint. Without effect if nothing is kept there.

        Args:
            forward: called with a line for each change from then on, which that process is to pass to :meth:`apply`.
                Synchronous.
        """
        ...

    def retake(self) -> None:
        """Keep in the state directory again what is used. Blocks for a moment. Undoes :meth:`release`."""
        ...

    def load(self, state_dir: StateDir) -> None:
        """Go on from what another process has left in its state directory, and keep it there. Blocks for a moment.

        Raises:
            StateDirError: the directory cannot be read or written.
        """
        ...

    def unload(self) -> None:
        """Keep nothing more in the state directory, and write nothing there. Synchronous. Undoes :meth:`load`."""
        ...

    def apply(self, line: bytes) -> None:
        """Count what a process that has released the state directory has changed since then. Synchronous."""
        ...

    @property
    def open_reservations(self) -> int:
        """How many reservations of this process are not settled."""
        ...

    @property
    def open_tokens(self) -> int:
        """The tokens that they hold."""
        ...


class CountedElsewhere:
    """A limiter whose counts are in another process: this one keeps nothing in the state directory."""

    async def release(self, forward: Callable[[bytes], None]) -> None:
        """See ``Limiter``."""
        await trio.lowlevel.checkpoint()

    def retake(self) -> None:
        """See ``Limiter``."""

    def load(self, state_dir: StateDir) -> None:
        """See ``Limiter``."""

    def unload(self) -> None:
        """See ``Limiter``."""

    def apply(self, line: bytes) -> None:
        """See ``Limiter``."""


class Refused(Exception):
    """A request is over a limit.

    Attributes:
        error: the answer to the client.
        state: what is left of the limits.
    """

    def __init__(self, error: ApiError, state: LimitState) -> None:
        super().__init__(error.message)
        self.error = error
        self.state = state


def refused(refusal: Refusal, limits: Limits) -> Refused:
    """Return the exception for a refusal."""
    return Refused(_error(refusal, limits), refusal.state)


def _error(refusal: Refusal, limits: Limits) -> ApiError:
    limit, needed = refusal.limit, refusal.needed
    if refusal.kind == "budget":
        return QuotaExceeded(
            f"The budget of this key, {limit} tokens a {limits.budget_per}, does not allow this request: "
            f"it needs {max(needed, 1)} tokens or more, and fewer are left"
        )
    if refusal.kind == "size":
        return RateLimited(
            f"This request may use {needed} tokens or more, and this key may use {limit} in a minute, so it can "
            "never be admitted: send a shorter prompt, or a smaller max_tokens",
            kind="tokens",
        )
    # Rounded up: a client that tries again a moment too early is refused again.
    wait = -(-refusal.wait // _MS)
    messages = {
        "requests": f"This key may send {limit} requests a minute",
        "tokens": f"This key may use {limit} tokens a minute, and this request may use {needed}",
        "concurrency": f"This key may have {limit} requests answered at the same time",
    }
    shown = f"{wait / 1000:.3f}".rstrip("0").rstrip(".")
    return RateLimited(
        f"{messages[refusal.kind]}; try again in {shown} s", kind=refusal.kind, retry_after_ms=wait
    )

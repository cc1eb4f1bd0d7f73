"""The deadlines of an answer, as the gateway enforces them.

The node that runs the handler enforces the timeouts itself, and its error is the more precise one. The deadlines here
apply if that node fails to; they are :data:`GRACE` later. All of them are counted from the first opening of the call,
also if the call was lost and retried on another replica, since the client has been waiting all the time. The idle
timeout does not count the time in which the model of a call is started, which has a limit of its own on the node that
starts it.
"""

from __future__ import annotations

import logging
import math
from typing import Final

import attrs
import trio

from ..core.answer import Event
from ..core.call import Call
from ..errors import TooSlow

__all__ = ["GRACE", "ResponseDeadlines"]

logger = logging.getLogger("trio_cluster.http")

#: Seconds between the deadline of the node that runs the handler and the gateway's own. Signs of life come every
#: second.
GRACE: Final = 2.0


@attrs.frozen
class ResponseDeadlines:
    """The deadlines of one answer."""

    idle_timeout: float
    """Seconds that may pass without output."""
    total_timeout: float
    """Seconds for the whole answer."""
    began: float
    """The trio time at which the call was opened. The time that the client took to send its request does not count."""

    @property
    def time_left(self) -> float:
        """Seconds that are left for the whole answer."""
        return self.began + self.total_timeout - trio.current_time()

    def expires_at(self, since: float) -> float:
        """Return the trio time at which the answer times out, if its last output was at the trio time ``since``."""
        return min(since + self.idle_timeout, self.began + self.total_timeout) + GRACE

    async def next_event(self, call: Call, since: float, until: float = math.inf) -> Event | None:
        """Return the next event of a call, whose last output was at the trio time ``since``; cancel it if it is late.

        A checkpoint.

        Returns:
            ``None``: there was none until the trio time ``until``.

        Raises:
            TooSlow: a deadline has passed.
        """
        expires = self._expires(call, since)
        while True:
            with trio.move_on_at(min(expires, until)):
                return await call.receive()
            if until < expires:
                return None
            expired, expires = expires, self._expires(call, since)
            if expires <= expired:
                raise self.time_out(call)

    def _expires(self, call: Call, since: float) -> float:
        """Return when a call times out. While its model is started, the idle timeout begins again and again."""
        waits = call.model_wait is not None
        return self.expires_at(max(since, trio.current_time() if waits else call.ready_since))

    def time_out(self, call: Call) -> TooSlow:
        """Cancel a call whose deadline has passed, and return the error for the client. Synchronous.

        The error names the timeout without the grace, since that is what the client asked for.
        """
        if self.time_left <= 0:
            reason = f"not complete within {self.total_timeout:g} s"
            error = TooSlow(f"The answer was not complete within {self.total_timeout:g} s")
        else:
            reason = f"silent for {self.idle_timeout:g} s"
            error = TooSlow(f"The model produced nothing for {self.idle_timeout:g} s")
        fields = {
            "model": call.request.model,
            "node": call.served_by,
            "request_id": call.request.request_id,
        }
        logger.warning("timed out: %s", reason, extra={"fields": fields})
        call.expire(reason)
        return error

"""How long a client waits for its answer, as the gateway sees it.

The node that runs the handler keeps the time, and its message is the better one. The deadlines here are what remains when
that node fails to; they pass :data:`GRACE` later. All of them are counted from the opening of the call, also where that call
was lost and was opened once more elsewhere: the client has not begun to wait anew.
"""

from __future__ import annotations

import logging
from typing import Final

import attrs
import trio

from ..core.call import Call
from ..errors import TooSlow

__all__ = ["GRACE", "ResponseDeadlines"]

logger = logging.getLogger("trio_cluster.http")

#: Seconds that an answer may be later than its node should have allowed. Nodes give signs of life once a second.
GRACE: Final = 2.0


@attrs.frozen
class ResponseDeadlines:
    """How long the client of one request waits."""

    idle_timeout: float
    """Seconds that may pass without output."""
    total_timeout: float
    """Seconds for the whole answer."""
    began: float
    """When the call was opened, in trio's time; what the client needed to send its request does not count."""

    @property
    def time_left(self) -> float:
        """Seconds that are left for the whole answer."""
        return self.began + self.total_timeout - trio.current_time()

    def expires_at(self, since: float) -> float:
        """Return the trio time at which an answer times out that has been silent since then."""
        return min(since + self.idle_timeout, self.began + self.total_timeout) + GRACE

    def time_out(self, call: Call) -> TooSlow:
        """Cancel a call whose deadline has passed, and return the error for the client.

        The node should have reported it earlier, and did not; the client is told the time that it was promised.
        """
        if self.time_left <= 0:
            reason = f"not complete within {self.total_timeout:g} s"
            error = TooSlow(f"The answer was not complete within {self.total_timeout:g} s")
        else:
            reason = f"silent for {self.idle_timeout:g} s"
            error = TooSlow(f"The model gave nothing for {self.idle_timeout:g} s")
        fields = {
            "model": call.request.model,
            "node": call.served_by,
            "request_id": call.request.request_id,
        }
        logger.warning("given up: %s", reason, extra={"fields": fields})
        call.cancel(reason)
        return error

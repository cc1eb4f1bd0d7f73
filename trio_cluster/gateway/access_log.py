"""The access log: one line for each request, and a few for requests that show no valid key.

The line of a request is written when the request is over, so that it has the status and the duration. The fast path
writes tokens past the ASGI ``send`` function; only the head of a response has to pass it for that.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from ..http1.asgi import Message, Send
from .context import RequestContext

__all__ = ["AccessLog", "RefusedKeys"]

access_logger = logging.getLogger("trio_cluster.access")
logger = logging.getLogger("trio_cluster.http")

#: Seconds between two lines about requests without a valid key.
_QUIET: Final = 10.0


class AccessLog:
    """Logs one request.

    Args:
        send: the ASGI function that is given the response.

    Attributes:
        status: of the response; 0 until its head was sent.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def send(self, message: Message) -> None:
        """Pass a message on, and take note of the status."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    def write(self, method: str, context: RequestContext, *, client_left: bool) -> None:
        """Write the line. Synchronous.

        Args:
            method: of the request.
            context: of the request.
            client_left: the client disconnected before the response was complete.
        """
        fields: dict[str, object] = {
            "client": context.client,
            "status": self.status or "none",
            "seconds": round(time.monotonic() - context.began, 4),
            "request_id": context.request_id,
        }
        request = getattr(context, "request", None)
        if request is not None:
            fields["model"] = request.model
        if context.principal.name:
            fields["principal"] = context.principal.name
        if client_left:
            fields["ended"] = "client left"
        elif context.aborted:
            fields["ended"] = "failed"
        access_logger.info("%s %s", method, context.path, extra={"fields": fields})


class RefusedKeys:
    """Logs requests without a valid key: the first one at once, then one line for all of each ten seconds. Synchronous.

    A client with a wrong key repeats its requests, and a scanner sends many.
    """

    def __init__(self) -> None:
        self._quiet_until = 0.0
        self._unlogged = 0

    def refused(self, context: RequestContext, why: str) -> None:
        """Take note of a request that was refused.

        Args:
            context: of the request.
            why: the message of the refusal, which does not have the key.
        """
        now = time.monotonic()
        if now < self._quiet_until:
            self._unlogged += 1
            return
        fields: dict[str, object] = {
            "client": context.client,
            "path": context.path,
            "request_id": context.request_id,
        }
        if self._unlogged:
            fields["not_logged"] = self._unlogged
        self._quiet_until, self._unlogged = now + _QUIET, 0
        logger.warning("a request was refused: %s", why, extra={"fields": fields})

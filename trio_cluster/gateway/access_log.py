"""The access log: one line for each request, and a few for requests without a valid key or without valid HTTP.

The line of a request is written when the request is over, so that it has the status, the duration, and what its story
says. The fast path writes tokens past the ASGI ``send`` function; only the head of a response has to pass it for that.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from ..core import clock
from ..core.attempt_times import queue_times
from ..core.story import StoryFacts
from ..http1.asgi import Message, Send
from ..http1.refusal import HttpRefusal
from ..net.sockets import shown_address
from ..options import ClusterServerOptions
from .context import RequestContext
from .response import render_refusal
from .story_ending import ending_of

__all__ = ["AccessLog", "RefusedKeys", "RefusedRequests"]

access_logger = logging.getLogger("trio_cluster.access")
logger = logging.getLogger("trio_cluster.http")

#: Seconds in a queue that are worth a field.
_NOTABLE: Final = 0.001
#: Seconds between two lines about requests of one of these kinds.
_QUIET: Final = 10.0


class AccessLog:
    """Logs one request.

    Args:
        send: the ASGI function that is given the response.

    Attributes:
        status: of the response; 0 until its head was sent.
        sent: bytes of its body that were passed on here.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.sent = 0

    async def send(self, message: Message) -> None:
        """Pass a message on, and take note of the status, and of the bytes of the body."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
        if message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))

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
            "seconds": round(clock.now() - context.began, 4),
            "request_id": context.request_id,
        }
        request = getattr(context, "request", None)
        if request is not None:
            call = getattr(context, "call", None)
            fields["model"] = request.model if call is None else call.request.model
            if request.alias:
                fields["alias"] = request.alias
            if call is not None:
                fields["worker"] = call.served_by
        if context.principal.name:
            fields["principal"] = context.principal.name
        story = context.story
        if story is not None:
            fields["outcome"] = ending_of(story).outcome
            fields |= _measured(story)
        elif context.error is not None:
            fields["outcome"] = "refused"
        else:
            fields["outcome"] = "cancelled" if client_left else "completed"
        # The fast path writes past this. What it has written, and the slow path before it, the call has counted.
        fields["bytes"] = max(
            self.sent, story.attempts[story.answering].delivered if story and story.attempts else 0
        )
        error = context.error
        if error is None and story is not None and fields["outcome"] not in ("completed", "cancelled"):
            # It came in the middle of a stream.
            error = story.attempts[story.answering].error if story.attempts else None
        if error is not None and error[1]:
            fields["code"] = error[1]
        if client_left:
            fields["ended"] = "client left"
        elif context.aborted:
            fields["ended"] = "failed"
        access_logger.info("%s %s", method, context.path, extra={"fields": fields})


def _measured(story: StoryFacts) -> dict[str, object]:
    """Return the times and the tokens of a request that was sent to a model, as far as they are known."""
    fields: dict[str, object] = {}
    if not story.attempts:
        return fields
    attempt = story.attempts[story.answering]
    if len(story.attempts) > 1:
        fields["attempts"] = len(story.attempts)
    queued = sum(queue_times(attempt))
    if queued >= _NOTABLE:
        fields["queued"] = round(queued, 4)
    if story.streamed and attempt.begun_at >= 0:
        fields["first_token"] = round(attempt.begun_at - story.began, 4)
    if attempt.usage is not None:
        fields["input_tokens"] = attempt.usage.prompt_tokens
        if attempt.usage.cached_tokens:
            fields["cached_tokens"] = attempt.usage.cached_tokens
        fields["output_tokens"] = attempt.usage.completion_tokens
    return fields


class RefusedKeys:
    """Logs requests without a valid key: the first one at once, then one line for all of each ten seconds. Synchronous.

    A client with a wrong key repeats its requests, and a scanner sends many.
    """

    def __init__(self) -> None:
        self._limit = _OneLine()

    def refused(self, context: RequestContext, why: str) -> None:
        """Take note of a request that was refused.

        Args:
            context: of the request.
            why: the message of the refusal, which does not have the key.
        """
        if (unlogged := self._limit.unlogged()) is None:
            return
        fields: dict[str, object] = {
            "client": context.client,
            "path": context.path,
            "request_id": context.request_id,
            **unlogged,
        }
        logger.warning("a request was refused: %s", why, extra={"fields": fields})


class RefusedRequests:
    """Answers what is not a valid HTTP request, and logs it, if there is an access log. Synchronous.

    The HTTP server refuses such bytes before there is a request that the gateway could log. Lines are bounded like
    those of :class:`RefusedKeys`: what is sent by a scanner is rarely HTTP.

    Args:
        options: read for each refusal.
    """

    def __init__(self, options: ClusterServerOptions) -> None:
        self._options = options
        self._limit = _OneLine()

    def render(self, refusal: HttpRefusal) -> tuple[list[tuple[str, str]], bytes]:
        """Return the headers and the body of the answer. See ``RenderRefusal``."""
        headers, body = render_refusal(refusal)
        if self._options.server.access_log and (unlogged := self._limit.unlogged()) is not None:
            fields: dict[str, object] = {
                "client": shown_address(*refusal.client) if refusal.client else "",
                "status": refusal.status,
                "request_id": dict(headers)["x-request-id"],
                "reason": refusal.message,
                **unlogged,
            }
            access_logger.info("not a valid HTTP request", extra={"fields": fields})
        return headers, body


class _OneLine:
    """Allows one line at once, and then one in :data:`_QUIET` seconds."""

    def __init__(self) -> None:
        self._quiet_until = 0.0
        self._unlogged = 0

    def unlogged(self) -> dict[str, int] | None:
        """Return the field that counts the lines which were left out since the last one, or ``None``: no line now."""
        now = time.monotonic()
        if now < self._quiet_until:
            self._unlogged += 1
            return None
        count, self._unlogged, self._quiet_until = self._unlogged, 0, now + _QUIET
        return {"not_logged": count} if count else {}

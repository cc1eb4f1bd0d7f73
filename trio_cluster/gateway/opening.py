"""The opening of an answer: from the call to the head of its answer, with the retries on other replicas and models.

An alias with several names goes on to its next name, too, if a server behind an engine answers that it cannot take the
request now; nothing of that answer was sent to the client. It goes on as well if a model is being started, or a machine
woken, for longer than ``start_patience``. The start is given up then, unless others wait for it.

If the client of a stream has been sent a comment before the head has come, the status is out, and the answer has to be
a stream of events. One that is none, an error of a server behind an engine for instance, becomes an error here.
"""

from __future__ import annotations

import math
from typing import Final

import trio

from ..core.answer import Data, Event, Failed, Head
from ..core.call import Call
from ..errors import UNAVAILABLE_STATUSES, ApiError, HandlerFailed
from ..openai import read_error
from .context import RequestContext
from .node_context import NodeContext

__all__ = ["Opening"]

#: Bytes of an error's body that are read.
_ERROR_LIMIT: Final = 1 << 16

_OK: Final = 200
_FIRST_ERROR: Final = 400


class Opening:
    """Waits for the head of an answer, any number of times, until it has come.

    If the node that has the call fails before, the call is retried; see ``Router.reopen``. If its server cannot take
    the request now, or its model is not ready for too long, the next name of an alias is tried; see
    ``Router.open_following``. The new calls belong to the context, too.

    Args:
        node_context: for its router.
        context: the request context; its call is waited for.
        since: the trio time at which the waiting began, for the idle timeout and for ``start_patience``.
    """

    def __init__(self, node_context: NodeContext, context: RequestContext, since: float) -> None:
        self._router = node_context.router
        self._options = node_context.options
        self._context = context
        self._since = since
        self._impatient_at = since + self._options.start_patience

    async def head(self, until: float = math.inf) -> Head | None:
        """Return the head of the answer; ``None`` if it has not come until the trio time ``until``. A checkpoint.

        Raises:
            ApiError: the answer failed before.
        """
        deadlines = self._context.deadlines
        while True:
            call = self._context.call
            goes_on = call.request.otherwise is not None and self._impatient_at < until
            event = await deadlines.next_event(call, self._since, self._impatient_at if goes_on else until)
            if event is not None:
                head = self.take(event)
                if head is not None:
                    return head
            elif not goes_on:
                return None
            elif call.model_wait is None or not self._leave(call):
                # It may have to wait later, if its node has not begun with it.
                self._impatient_at += self._options.start_patience

    def take(self, event: Event) -> Head | None:
        """Return the head of the answer, given the first event of a call. Synchronous.

        If there is none, the request was opened again, on another replica or for the next name of an alias.

        Raises:
            ApiError: the call has failed and is not retried; this is why it has failed.
        """
        context = self._context
        call, time_left = context.call, context.deadlines.time_left
        if isinstance(event, Head):
            if event.status not in UNAVAILABLE_STATUSES or call.request.otherwise is None:
                return event
            again = self._router.open_following(call, "its server cannot take the request now", time_left)
            if again is None:
                return event
            call.note(
                f"the server behind '{call.request.model}' answered {event.status}: it cannot take the request now"
            )
        elif isinstance(event, Failed):
            again = self._router.reopen(call, time_left)
            if again is None:
                raise event.error
        else:  # the grammar of calls forbids it
            raise HandlerFailed
        self._replace(again)
        return None

    def _leave(self, call: Call) -> bool:
        """Open the request for the next name of its alias, since a start takes too long. Return whether it was."""
        why = f"its model was not ready within {self._options.start_patience:g} s"
        again = self._router.open_following(call, why, self._context.deadlines.time_left)
        if again is None:
            return False
        self._replace(again)
        return True

    def _replace(self, again: Call) -> None:
        # The client has been waiting all the time. What it has waited for a model to be started does not count,
        # whichever of the calls that was.
        ready_since = max(each.ready_since for each in self._context.calls)
        self._since = max(self._context.deadlines.began, ready_since)
        self._context.add_call(again)
        self._impatient_at = trio.current_time() + self._options.start_patience

    async def require_events(self, head: Head) -> None:
        """Return if the answer that ``head`` begins is a stream of events. Perhaps a checkpoint.

        Raises:
            ApiError: it is an error, and this is the one that it tells; or it is something else.
        """
        if head.status == _OK and _is_event_stream(head):
            return
        call = self._context.call
        if head.status < _FIRST_ERROR:
            call.cancel("the answer to a request for a stream is none")
            raise ApiError(
                502, "The model answered a request for a stream with something else", code="not_a_stream"
            )
        body = bytearray()
        while len(body) < _ERROR_LIMIT:
            event = await self._context.deadlines.next_event(call, trio.current_time())
            if not isinstance(event, Data):
                break
            body += event.data
        raise read_error(head.status, bytes(body)) if head.status <= 599 else HandlerFailed()


def _is_event_stream(head: Head) -> bool:
    """Return whether a body is a stream of events that is not compressed: the client was not told of that."""
    return head.content_type.partition(";")[0].strip().lower() == "text/event-stream" and not any(
        name.lower() == "content-encoding" for name, _ in head.headers
    )

"""The relay: makes the HTTP reply of the call that answers a request. It does not use the web framework.

Its main decision is when to send the status. That is done as late as possible, since until then a failure can be sent
as a real 4xx or 5xx:

- An event stream begins with its first event; or, if that is late, with a comment (``keepalive.py``), and even before
  there is an answer (``opening.py``). A failure after that is sent as one error event, in the grammar of the route (see
  ``openai/failures.py``). An error event in the middle of another event would be read as a part of it, so events are
  sent whole (see ``sse_buffer.py``).
- Audio begins with its first bytes. A failure after that can be shown only by breaking the connection.
- Everything else is sent when it is complete. Only an answer larger than :data:`BUFFER_LIMIT` is begun earlier, so that
  memory stays bounded.

Once an answer has begun, all pieces that wait are sent in one write, since a write costs more than everything else that
is done for a token.

A failure that the stream has reported in its own grammar is followed by the proper end of the body: several clients
lose the reason if the connection breaks behind it. If a failure could not be reported (audio, half an event, a grammar
that is not known), the context is aborted, and the gateway ends the connection in a way that no client takes for the
end of the answer. The option ``stream_failure`` can demand that always.
"""

from __future__ import annotations

import math
import re
from typing import Final

import trio

from ..core.answer import Data, Done, Failed, Head
from ..core.headers import HEADER_NAME, HEADER_VALUE
from ..core.request import Request
from ..errors import ApiError, HandlerFailed
from ..openai import KNOWN_STREAMS, NO_PROXY_BUFFERING, comment_with
from .auth import hide_models
from .capture import FinalEventBuffer
from .context import RequestContext
from .direct import Connection, DirectWriter
from .hedge import HEDGED_KINDS, first_event, is_hedged
from .keepalive import expects_events
from .node_context import NodeContext
from .opening import Opening
from .response import Reply
from .sse_buffer import EventBuffer
from .stories import error_facts

__all__ = ["BUFFER_LIMIT", "relay"]

#: Bytes of an answer that are kept until it is complete; a larger answer is sent as it arrives.
BUFFER_LIMIT: Final = 1 << 20

#: Headers of a handler's answer that are not passed on: they describe the connection or the framing, are set here, or
#: speak for the whole origin: what a browser may do with it, now and later.
_RESERVED_HEADERS: Final = frozenset(
    {
        "alt-svc",
        "clear-site-data",
        "connection",
        "content-length",
        "content-type",
        "date",
        "keep-alive",
        "nel",
        "proxy-connection",
        "public-key-pins",
        "report-to",
        "reporting-endpoints",
        "server",
        "service-worker-allowed",
        "set-cookie",
        "set-cookie2",
        "strict-transport-security",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-request-id",
        "x-trio-cluster-model",
        "x-trio-cluster-worker",
    }
)
_RESERVED_PREFIX: Final = "access-control-"

#: Headers that clients calculate with, and what may stand in them.
_NUMBER: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_NUMBER_OR_DATE: Final = re.compile(r"[0-9]{1,6}|[A-Z][a-z]{2}, [0-9A-Za-z :]{20,30}")
_CHECKED_HEADERS: Final = {
    "openai-processing-ms": _NUMBER,
    "retry-after": _NUMBER_OR_DATE,
    "retry-after-ms": _NUMBER,
}


async def relay(node_context: NodeContext, context: RequestContext) -> Reply:
    """Make the reply of the call that was opened for a request. Waits for the head of the answer, or for all of it.

    If the node that has the call fails before the answer begins, the call is retried, once on another replica, and for
    the next names of an alias (see :class:`Opening`). The new calls belong to the context, too.

    Returns:
        A reply whose body is complete, or a :class:`StreamingBody`; that may not have begun, and begin with a comment.

    Raises:
        ApiError: the error that the client gets instead.
    """
    began = trio.current_time()
    comment_due = began + (node_context.options.server.keepalive or math.inf)
    event = None
    if context.call.request.kind in HEDGED_KINDS and is_hedged(node_context, context):
        event = await first_event(node_context, context, context.deadlines.expires_at(began))
    elif context.call.request.otherwise is None:
        # Written out here, since a function would cost every request a call.
        with trio.move_on_at(min(context.deadlines.expires_at(began), comment_due)):
            event = await context.call.receive()
    if isinstance(event, Head) and context.call.request.otherwise is None:
        return await _reply(node_context, context, event, began)
    opening = Opening(node_context, context, began)
    head = None if event is None else opening.take(event)
    if head is None:
        head = await opening.head(comment_due)
    if head is None:
        if await expects_events(context):
            headers = [("content-type", "text/event-stream"), *NO_PROXY_BUFFERING]
            body = StreamingBody(node_context, context, b"", began, events=True, opening=opening)
            return Reply(200, headers, body, early=True)
        head = await opening.head()
    if head is None:  # without a limit, there is one
        raise HandlerFailed
    return await _reply(node_context, context, head, began)


async def _reply(node_context: NodeContext, context: RequestContext, head: Head, began: float) -> Reply:
    """Decide how the answer that ``head`` begins is sent. Its client waits since the trio time ``began``."""
    call, deadlines = context.call, context.deadlines
    headers = _headers(head)
    media_type = head.content_type.partition(";")[0].strip().lower()
    # In a compressed stream it cannot be seen where an event ends, so it is treated like audio.
    events = media_type == "text/event-stream" and not any(
        name.lower() == "content-encoding" for name, _ in head.headers
    )
    streamed = context.streamed = media_type == "text/event-stream" or media_type.startswith("audio/")
    if events:
        named = {name for name, _ in headers}
        headers += [header for header in NO_PROXY_BUFFERING if header[0] not in named]
    pieces = [call.body.receive_nowait()]
    while call.end is None and not streamed and sum(map(len, pieces)) <= BUFFER_LIMIT:
        event = await deadlines.next_event(call, trio.current_time())
        if isinstance(event, Data):
            pieces += [bytes(event.data), call.body.receive_nowait()]
    data = b"".join(pieces)
    if isinstance(call.end, Failed) and not (events and data):
        raise call.end.error
    if isinstance(call.end, Done):
        return Reply(head.status, headers, data)
    return Reply(head.status, headers, StreamingBody(node_context, context, data, began, events=events))


def _headers(head: Head) -> list[tuple[str, str]]:
    """Return the headers of an answer that are passed on to the client, with names in lower case.

    Raises:
        HandlerFailed: HTTP cannot express the status or the content type.
    """
    if not 200 <= head.status <= 599 or not HEADER_VALUE.fullmatch(head.content_type):
        raise HandlerFailed
    headers = [("content-type", head.content_type)]
    for name, value in head.headers:
        if HEADER_NAME.fullmatch(name) and HEADER_VALUE.fullmatch(value):
            name = name.lower()
            if name in _RESERVED_HEADERS or name.startswith(_RESERVED_PREFIX):
                continue
            expected = _CHECKED_HEADERS.get(name)
            if expected is None or expected.fullmatch(value):
                headers.append((name, value))
    return headers


class StreamingBody:
    """The body of an answer that is not complete. See ``Body``.

    Args:
        node_context: its options decide how a failed stream ends.
        context: the request context; it is aborted if the answer fails, and the client cannot be told in the body.
        first: the part of the body that was received already.
        silent_since: the trio time since which nothing was sent to the client.
        events: the body is a stream of server-sent events.
        opening: waits for the head of the answer, and the body begins with a comment; ``None``: the head has come.
    """

    def __init__(
        self,
        node_context: NodeContext,
        context: RequestContext,
        first: bytes,
        silent_since: float,
        *,
        events: bool,
        opening: Opening | None = None,
    ) -> None:
        assert context.endpoint is not None
        self._node_context = node_context
        self._call = context.call
        self._context = context
        self._first = first
        self._grammar = context.endpoint.failure
        buffer = EventBuffer if context.stored is None else FinalEventBuffer
        self._knows_grammar = _knows_grammar(node_context, self._call.request)
        self._events = buffer(keep_first=self._grammar.needs_first) if events else None
        self._deadlines = context.deadlines
        self._silent_since = silent_since
        self._opening = opening
        self._waiting_since: float | None = None
        self._connection: Connection | None = None
        self._writer: DirectWriter | None = None
        # A piece was returned, and there was no waiting since.
        self._has_sent = False
        self._over = False
        self.complete = False

    async def receive(self) -> bytes:
        """See ``Body``. If the answer failed, the context is aborted at the end."""
        if self._over:
            raise trio.EndOfChannel
        if self._opening is not None:
            instead = await self._open(self._opening)
            if instead is not None:
                return instead
        while True:
            data = self._take()
            end = self._call.end
            if not data and end is None:
                instead = await self._wait()
                if instead is not None:
                    return instead
                continue
            self._waiting_since = None
            if self._events is not None and data:
                data = self._events.add(data)
            if isinstance(end, Failed):
                return self._fail(data, end.error)
            if end is None and trio.current_time() >= self._deadlines.expires_at(math.inf):
                # A handler that shields itself from cancellation can go on after its total timeout.
                return self._fail(data, self._deadlines.time_out(self._call))
            self.complete = end is not None
            if data:
                self._has_sent = True
                return data
            if end is not None:
                raise trio.EndOfChannel

    @property
    def is_satisfying(self) -> bool:
        """See ``Body``. Many clients leave at the last event of a stream, and do not wait for the end of the body."""
        events, writer = self._events, self._writer
        if events is None or events.torn or self._opening is not None or self._grammar.repeats_end:
            return False
        # Where the fast path did not take a piece, the event that was kept last was not sent.
        if self._call.body.pieces or (writer is not None and writer.has_unsent):
            return False
        last = events.last
        return self._grammar.end_marks.search(last) is not None and self._grammar.has_ended(bytes(last))

    def enable_direct_write(self, connection: Connection | None) -> None:
        """See ``Body``."""
        if self._writer is None and connection is not None:
            self._connection = connection
            if self._opening is None and connection.ready and not self._call.ended:
                self._writer = DirectWriter(self._call.body, connection, self._events)

    async def _open(self, opening: Opening) -> bytes | None:
        """Wait for the head of the answer, and return ``None``; or return bytes that must be sent instead.

        Until it has come, nothing of an answer was given: the call may still be retried elsewhere.
        """
        try:
            # At first, the comment for which the status is sent so early.
            head = await opening.head(self._comment_due)
            while head is None:
                if (comment := self._comment(trio.current_time())) is not None:
                    return comment
                head = await opening.head(self._comment_due)
            await opening.require_events(head)
        except ApiError as error:
            self._context.error = error_facts(error)
            return self._fail(b"", hide_models(self._context.principal, error).with_traceback(None))
        self._opening = None
        if self._call is not self._context.call:
            # An alias may have gone on to a model of another kind.
            self._call = self._context.call
            self._knows_grammar = _knows_grammar(self._node_context, self._call.request)
        return None

    def _take(self) -> bytes:
        """Return all bytes that wait. Afterwards, if ``call.end`` is set, there will be no more."""
        body = self._call.body
        if body.pieces:
            # An empty piece counts, too: it is a sign of life.
            self._waiting_since = None
        data = body.receive_nowait()
        if self._first:
            data, self._first = self._first + data, b""
        return data

    async def _wait(self) -> bytes | None:
        """Wait until there is something to take, and return ``None``; or return bytes that must be sent instead.

        The idle timeout counts only while this waits, and not while the client is slow to read. Comments change nothing
        about it.
        """
        writer = self._writer
        if writer is not None and writer.has_unsent:
            writer.has_unsent = False
            await trio.lowlevel.checkpoint()
            return b""
        now = trio.current_time()
        since = now if self._waiting_since is None else self._waiting_since
        if self._has_sent:
            self._has_sent = False
            self._silent_since = now
        if writer is not None:
            since = max(since, writer.last_output, writer.last_sign_of_life)
            self._silent_since = max(self._silent_since, writer.last_output)
        self._waiting_since = since
        expires = self._deadlines.expires_at(since)
        if now >= expires:
            return self._fail(b"", self._deadlines.time_out(self._call))
        if self._events is not None and not self._events.torn:
            # Written out here, since a function would cost every stream a call.
            due = self._silent_since + (self._node_context.options.server.keepalive or math.inf)
            if now >= due:
                return self._comment(now)
            expires = min(expires, due)
        with trio.move_on_at(expires):
            await self._call.body.reader.park()
        return None

    @property
    def _comment_due(self) -> float:
        return self._silent_since + (self._node_context.options.server.keepalive or math.inf)

    def _comment(self, now: float) -> bytes | None:
        """Send a comment; ``None`` if that is done, otherwise the bytes that must be sent instead.

        Nothing is done for it when a token is sent: the task of a stream wakes once in the time between comments, looks
        when the last output was sent, and goes on waiting for what is left.

        On a connection with a fast path it is dropped if the client has not read what was sent before. On others the
        task waits until the client takes it, so that there is never more than one.
        """
        self._silent_since = now
        comment, connection = self._grammar.keepalive, self._connection
        if (wait := self._context.call.model_wait) is not None:
            comment = comment_with(comment, str(wait))
        if connection is None or not connection.ready:
            return comment
        return None if connection.send_nowait(comment, droppable=True) else b""

    def _fail(self, data: bytes, error: ApiError) -> bytes:
        """Return the last bytes of an answer that has failed: what is left of it, and the error event.

        Raises:
            trio.EndOfChannel: there are none.
        """
        self._over = True
        events = self._events
        reported = events is not None and not events.torn
        if events is not None and reported:
            last = bytes(events.last)
            # A server behind an engine may have ended the stream, and not its connection.
            if not self._grammar.has_ended(last):
                data += self._grammar.write(error, events.first, last)
            reported = self._knows_grammar
        if reported and self._node_context.options.server.stream_failure == "end":
            self.complete = True
            return data
        self._context.aborted = True
        if data:
            return data
        raise trio.EndOfChannel


def _knows_grammar(node_context: NodeContext, request: Request) -> bool:
    """Return whether the error events of a stream are those that its clients expect.

    A server behind an engine may have routes of which nothing is known here.
    """
    if request.endpoint in KNOWN_STREAMS:
        return True
    info = node_context.router.catalog.info(request.model)
    return info is not None and info.kind != "any"

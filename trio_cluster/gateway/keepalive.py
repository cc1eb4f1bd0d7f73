"""Who may be sent a comment before there is an answer.

A stream that is silent for as long as the option ``keepalive`` says gets a comment, so that neither its client nor a
proxy on the way takes it for dead. The relay sends it (``relay.py``).

The first comment of a stream may come before its answer. The status is then sent with it, and is 200. So it is sent
only to a client that has asked for events, on a route whose clients are known to ignore comments and to understand a
failure in the stream; and not before the whole body of the request has arrived.
"""

from __future__ import annotations

from functools import partial

from ..core.limits import PARSE_IN_THREAD
from ..core.threads import run_in_thread
from ..openai import KNOWN_STREAMS, asks_for_events
from .context import RequestContext

__all__ = ["expects_events"]


async def expects_events(context: RequestContext) -> bool:
    """Return whether the client of a request expects events and ignores comments among them.

    A checkpoint for a large body. It is called only for requests whose answer is late.
    """
    request = context.request
    if request.endpoint not in KNOWN_STREAMS or not context.request_body.complete:
        return False
    parsed = request.parsed
    if parsed is not None:
        return bool(getattr(parsed, "stream", False)) or getattr(parsed, "stream_format", "") == "sse"
    if request.upload is not None:
        return context.form_peek is not None and context.form_peek.stream
    if len(request.body) < PARSE_IN_THREAD:
        return asks_for_events(request.body, request.content_type)
    look = partial(asks_for_events, request.body, request.content_type)
    return await run_in_thread(look, abandon_on_cancel=True)

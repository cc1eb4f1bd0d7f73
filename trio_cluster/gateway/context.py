"""The request context: what the stages of the gateway find out about a request, and the calls that were opened for it.

The gateway makes a context for every request, passes it from stage to stage, and puts it into the ASGI scope, where the
views of the admin application find it. The calls that are opened for a request belong to its context, and are cancelled
when the request ends, in a ``finally`` of the gateway. That also covers a client that disconnects after a view has
returned and before the first byte of its answer is sent, when no code of the view runs any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, Final, cast

from ..core import clock, randomness
from ..core.call import Call
from ..core.principal import ANONYMOUS
from ..core.redaction import has_key
from ..core.request import Request
from ..core.story import ErrorFacts, StoryFacts
from ..limits.account import LimitState
from ..limits.reservation import Reservation
from ..openai import OPENAI_ERRORS, Endpoint, ErrorFamily, FormPeek, FormRewriter
from .body import RequestBody, SpooledBody
from .deadlines import ResponseDeadlines
from .stored_responses import StoredAnswer

__all__ = ["RequestContext", "request_context"]

_KEY: Final = "trio_cluster.request_context"
_MAX_REQUEST_ID: Final = 128


class RequestContext:
    """One HTTP request, and its answer.

    Args:
        headers: the headers of the request as they were received, with names in lower case.
        client: the address from which the request came, if it is known.
        path: the path of the URL; the gateway normalizes it, so that it begins with one slash.
        query: what follows the path and a question mark in the URL, as it was received.
        http2: the request came over HTTP/2, where a body may come without any header that announces it.

    Attributes:
        headers, client, path, query: as given.
        header: a function that returns the value of the first header of a name (in lower case), or ``None``.
        request_id: the one that the client sent if it is usable, otherwise a new one.
        request_body: the body of the request; set by the gateway.
        principal: who sends the request; set by the authenticate stage.
        model_in_path: the model that the path names, which then counts more than that of the body; empty if the path
            names none.
        endpoint: the endpoint of a request for a model; set by the gateway. ``None``: the admin application answers.
        errors: how the errors of the path look; set by the gateway when it has normalized the path.
        spool: what arrived of the body of a large form; set by the parse stage, and closed with the context.
        form_rewriter: writes the name of a model into that form, if it names an alias; set by the parse stage.
        form_peek: looks at the rest of that form, which may not name another model; set by the parse stage.
        request: the request as models see it; set by the parse stage.
        reservation: what the request holds of the limits of its key; ``None`` if the key has none, or they were not
            reached yet. Set by the key limits stage.
        limit_state: what was left of these limits then.
        stored: stores the answer when it is complete; ``None`` if it is not to be stored. Set by the parse stage.
        deadlines: how long the client waits; set by the route stage.
        call: the call that answers the request; set by the route stage, and replaced by a retry.
        calls: all calls that were opened for it, oldest first.
        began: the time at which the request arrived, by ``core/clock.py``, in seconds.
        aborted: the answer failed after it began, and the client was not told in its body; the connection must be
            reset, so that the client does not take the answer for a complete one.
        uploaded_at, answered_at: when all of a body had arrived that is forwarded while it comes, and when the head of
            the response was sent; of the same clock, ``NEVER``: not yet.
        status: of the response; 0 before its head was sent.
        missing_model: the name that was asked for, if no model of that name is served; empty otherwise.
        error: the error that was sent in the place of an answer; ``None``: none was.
        early: the head was sent before there was an answer.
        delivered: the response was sent to its end.
        streamed: the response is sent while the answer comes, since that is a stream of events or audio.
        story: what was recorded of the request when it was over; ``None``: it is not, or is not for a model.
        live_id: its id in ``/cluster/events``, and when it arrived, in seconds since the epoch; set when it is first
            looked at for them.
    """

    __slots__ = (
        "_http2",
        "aborted",
        "answered_at",
        "began",
        "call",
        "calls",
        "client",
        "deadlines",
        "delivered",
        "early",
        "endpoint",
        "error",
        "errors",
        "form_peek",
        "form_rewriter",
        "header",
        "headers",
        "limit_state",
        "live_id",
        "missing_model",
        "model_in_path",
        "path",
        "principal",
        "query",
        "request",
        "request_body",
        "request_id",
        "reservation",
        "spool",
        "status",
        "stored",
        "story",
        "streamed",
        "uploaded_at",
    )

    request_body: RequestBody
    request: Request
    deadlines: ResponseDeadlines
    call: Call
    live_id: tuple[str, float]

    def __init__(
        self,
        headers: Iterable[tuple[bytes, bytes]],
        client: str = "",
        path: str = "",
        *,
        query: bytes = b"",
        http2: bool = False,
    ) -> None:
        self._http2 = http2
        self.headers = list(headers)
        # If there are several headers of one name, the first one counts: it is put in last. The bound method of the
        # dict is used directly, since it is called many times for each request.
        self.header: Callable[[bytes], bytes | None] = dict(reversed(self.headers)).get
        self.client = client
        self.path = path
        self.query = query
        self.model_in_path = self.missing_model = ""
        self.principal = ANONYMOUS
        self.endpoint: Endpoint | None = None
        self.errors: ErrorFamily = OPENAI_ERRORS
        self.spool: SpooledBody | None = None
        self.form_peek: FormPeek | None = None
        self.form_rewriter: FormRewriter | None = None
        self.stored: StoredAnswer | None = None
        self.reservation: Reservation | None = None
        self.limit_state: LimitState | None = None
        self.request_id = _request_id(self.header(b"x-request-id"))
        self.began = clock.now()
        self.aborted = False
        self.calls: list[Call] = []
        self.uploaded_at = self.answered_at = clock.NEVER
        self.status = 0
        self.error: ErrorFacts | None = None
        self.early = self.delivered = self.streamed = False
        self.story: StoryFacts | None = None

    def declared_length(self) -> int | None:
        """Return the size of the body in bytes; ``None`` if it is not known in advance."""
        # The HTTP server has checked that it is a number.
        length = self.header(b"content-length")
        if length is not None:
            return int(length)
        return None if self._http2 or self.header(b"transfer-encoding") else 0

    def attach_to(self, scope: MutableMapping[str, Any]) -> None:
        """Put the context into an ASGI scope, where :func:`request_context` finds it."""
        scope[_KEY] = self

    def add_call(self, call: Call) -> None:
        """Record that ``call`` answers the request. It is cancelled at the end of the request if it has not ended."""
        self.call = call
        self.calls.append(call)
        if self.reservation is not None:
            self.reservation.follow(call)

    def cancel_calls(self, reason: str) -> None:
        """Cancel all calls of the request that have not ended. No others may be opened for it. Synchronous, idempotent.

        What is reserved for the request is freed when the work of its calls has stopped.
        """
        for call in self.calls:
            call.cancel(reason)
        if self.reservation is not None:
            self.reservation.end_request()

    def satisfy_call(self, reason: str) -> None:
        """End the call that answers the request as complete: the client has the whole answer. See ``Call.satisfy``."""
        self.call.satisfy(reason)


def request_context(scope: Mapping[str, Any]) -> RequestContext:
    """Return the context of the request that an ASGI scope belongs to.

    Raises:
        KeyError: the request did not come through the gateway.
    """
    return cast(RequestContext, scope[_KEY])


def _request_id(offered: bytes | None) -> str:
    if offered and len(offered) <= _MAX_REQUEST_ID and all(0x20 <= byte <= 0x7E for byte in offered):
        request_id = offered.decode("ascii")
        # It is logged and stored, so it must not be a key.
        if not has_key(request_id):
            return request_id
    return "req_" + randomness.token(16)

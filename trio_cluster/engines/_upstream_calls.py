"""Forwarding of calls to an upstream server: what of a request is sent to it, and what of its response comes back.

Bodies are forwarded as they are, in both directions and in the pieces in which they arrive, with three exceptions: the
name of the model in a request is replaced, where the cluster calls the model by another name; the preamble and the
epilogue of a form are dropped; and a stream of chat or completions is asked to end with its usage, where the client has
not asked for that, and the event with the usage is kept from the client. Headers are forwarded if they are about the
content or about the API. Connection headers are not, because the connection ends here. Keys and cookies are not either:
the client's are not meant for the upstream server, and the upstream server's are not meant for the client.

Every response is the call's answer, whatever its status. The call fails, with ``UpstreamLost``, only if there is no
complete response, or with ``Overloaded`` if this machine has no room for the connection, which is not the server's
fault.

A stream is over for its client at its last event (``[DONE]``, ``response.completed``, ``message_stop``), and many
clients leave then, while the server is still about to end its response. So the usage is reported at that event. What
follows it is forwarded, if there is anything, for :data:`_LAST_WAIT` seconds at most; also if the client has left, so
that the connection to the server can be used again. A server that takes longer, or breaks its connection there, has
given a complete answer nevertheless.

A server that does not know ``stream_options`` may refuse the whole request. If its refusal (400 or 422) names that
field, a request that the engine has changed is sent once more as the client wrote it. If that succeeds, the server is
not asked for usage again.

A server that does not know ``/v1/messages`` gets such requests translated, on its route for chat (``_chat_only.py``).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import quote

import attrs
import trio

from trio_cluster._version import __version__
from trio_cluster.core.headers import QUERY
from trio_cluster.core.limits import PARSE_IN_THREAD
from trio_cluster.core.threads import run_in_thread
from trio_cluster.errors import InvalidRequest, NotSupported, Overloaded, UpstreamLost
from trio_cluster.local.passthrough import RawCall
from trio_cluster.openai import (
    COUNT_TOKENS,
    ENDPOINTS,
    EndDetector,
    FormRewriter,
    endpoint_named,
    is_form,
    rewrite_form,
    rewrite_json,
)

from ._chat_only import CHAT_PATH, ChatAnswer, chat_body, error_of, read_message_body
from ._form_trim import trim_form, trim_streamed_form
from ._http_client import Body, ConnectFailed, HttpClient, HttpRequest, HttpResponse, LocalExhaustion
from ._http_response import HttpError
from ._usage_reader import UsageReader, usage_reader
from ._usage_request import ask_for_usage

__all__ = ["UpstreamCalls", "authorization"]

logger = logging.getLogger("trio_cluster.engines")

_REQUEST_HEADERS: Final = frozenset(
    {"accept", "accept-language", "baggage", "idempotency-key", "traceparent", "tracestate", "user-agent"}
)
_RESPONSE_HEADERS: Final = frozenset(
    {
        "cache-control",
        "content-disposition",
        "content-encoding",
        "content-language",
        "request-id",
        "retry-after",
        "retry-after-ms",
        "vary",
        "warning",
    }
)
#: Prefixes of headers that belong to the API, in both directions.
_API_PREFIXES: Final = ("x-", "openai-", "anthropic-")
#: Headers with such a prefix that are never forwarded: some frameworks and proxies obey them, and change the method or
#: the route.
_BLOCKED_HEADERS: Final = frozenset(
    {
        "x-accel-buffering",
        "x-accel-redirect",
        "x-http-method",
        "x-http-method-override",
        "x-method-override",
        "x-original-url",
        "x-powered-by",
        "x-rewrite-url",
    }
)
#: Seconds that an answer may take altogether.
_TOTAL_TIMEOUT: Final = "x-request-timeout"
_SECRET_HEADER: Final = re.compile(r"api-?key|access-?key|token$|auth|cookie|secret|password")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
#: Limits of the response headers that are forwarded: their number, and characters of all names and values together. The
#: link between worker and master has limits, too.
_MAX_HEADERS: Final = 64
_MAX_HEADER_SIZE: Final = 16 * 1024
#: Characters of a content type; a longer one is dropped.
_MAX_CONTENT_TYPE: Final = 512

#: Request bodies up to this size (bytes) are collected before they are sent, so that they can be sent again and may use
#: an idle connection. Larger ones are streamed.
_BUFFERED_BODY: Final = 256 * 1024

#: Endpoints whose streams have usage only if it is asked for, and the size (bytes) of the bodies up to which it is: to
#: ask for it, the body must be complete.
_ASKED_ENDPOINTS: Final = frozenset({"chat.completions", "completions"})
_ASKED_BODY: Final = 4 * 1024 * 1024
#: What a server answers that does not know a field of the request; how many bytes of that are read, and what names the
#: field there.
_REFUSALS: Final = frozenset({400, 422})
_REFUSAL_LIMIT: Final = 64 * 1024
#: What a server answers that does not know a route.
_UNKNOWN_ROUTE: Final = frozenset({404, 405, 501})
_REFUSED_FIELD: Final = re.compile(rb"stream_options|include_usage")

#: Endpoints whose event streams end with an event of a known type, whichever server writes them.
_ENDPOINTS_WITH_END: Final = frozenset(
    {"chat.completions", "completions", "responses", "messages", "/v1/messages"}
)

#: How the names of the endpoints of the Messages API begin; older masters call them by their paths.
_MESSAGES: Final = ("messages", "/v1/messages")

#: After the last event of a stream: seconds in which the server may end its response, and bytes that are read in that
#: time if the client has left.
_LAST_WAIT: Final = 0.5
_LAST_BYTES: Final = 64 * 1024

_SAFE_IN_PATH: Final = "/:@!$&'()*+,;=-._~"


class UpstreamCalls:
    """Forwards calls to the upstream server of ``client``.

    Args:
        client: sends the requests.
        key: the API key to send; ``None`` if the server requires none.
        on_lost: called, synchronously, when a call fails because the server cannot be reached or its response is
            incomplete; the argument tells whether it cannot be reached.
        asks_for_usage: ask for the usage of streams whose client has not asked for it.

    Attributes:
        activity: counts what is received from the server, heads and pieces of bodies. A change shows that it is alive.
    """

    def __init__(
        self,
        client: HttpClient,
        key: str | None,
        on_lost: Callable[[bool], None],
        *,
        asks_for_usage: bool = True,
    ) -> None:
        self._client = client
        self._key = key
        self._on_lost = on_lost
        self._asks_for_usage = asks_for_usage
        # The models and endpoints for which the server does not accept being asked.
        self._refuse_asking: set[tuple[str, str]] = set()
        # The server has answered a chat, and does not know `/v1/messages`.
        self._chat_only = False
        self.activity = 0

    async def forward(self, model: str, call: RawCall) -> None:
        """Forward one call; with the first argument bound, a raw handler.

        Cancellation closes the connection to the server, which thereby learns that the call is over.

        Args:
            model: the model's name on the server.
            call: its request has the model's name in the cluster.

        Raises:
            UpstreamLost: the server cannot be reached, or its response is incomplete or not HTTP.
            NotSupported: tokens are to be counted, and the server does not count.
            Overloaded: this machine has no descriptor, memory or local port left for the connection.
            InvalidRequest: the request cannot be forwarded: a path outside of the API, or a body without a model.
        """
        request = call.request
        key = (model, request.endpoint)
        asks = (
            self._asks_for_usage
            and request.endpoint in _ASKED_ENDPOINTS
            and 0 <= request.size <= _ASKED_BODY
            and not is_form(request.content_type)
            and key not in self._refuse_asking
        )
        translates = request.endpoint == "messages" and not is_form(request.content_type)
        body, size = await _request_body(model, call, whole=asks or translates)
        asking = await _asking(body) if asks and isinstance(body, bytes) else None
        try:
            if asking is not None and await self._send(call, asking, len(asking), asked=True) is not None:
                return
            if translates and isinstance(body, bytes):
                await self._send_message(call, body)
                return
            status = await self._send(call, body, size)
        except LocalExhaustion as error:
            raise Overloaded(f"This server is out of resources: {error}; try again shortly") from error
        except HttpError as error:
            self._on_lost(isinstance(error, ConnectFailed))
            why = str(error)
            if isinstance(error, ConnectFailed):
                why = f"it cannot be reached ({why})"
            raise UpstreamLost(request.model, why) from error
        if asking is not None and status == 200:
            self._refuse_asking.add(key)
            logger.warning(
                "%s does not take 'stream_options': the usage of streams is unknown unless clients ask for it",
                self._client.base,
                extra={"fields": {"model": request.model, "endpoint": request.endpoint}},
            )

    async def _send_message(self, call: RawCall, body: bytes) -> None:
        """Send a request to ``/v1/messages``; if the server does not know that route, translated, to its chat."""
        if not self._chat_only and await self._send(call, body, len(body), unless=_UNKNOWN_ROUTE) is not None:
            return
        if len(body) < PARSE_IN_THREAD:
            message = read_message_body(body)
        else:
            message = await run_in_thread(read_message_body, body, abandon_on_cancel=True)
        answer = ChatAnswer(attrs.evolve(message, model=call.request.alias or call.request.model))

        async def handle_response(response: HttpResponse) -> None:
            self.activity += 1
            _require_final(response)
            if not 200 <= response.status < 300:
                beginning = await _beginning_of(response)
                raise error_of(response.status, response.header("retry-after"), beginning)
            self._chat_only = True
            call.begin(response.status, answer.content_type, _response_headers(response))
            while not answer.is_done and (piece := await response.receive()):
                self.activity += 1
                await call.send(answer.feed(piece))
            rest = answer.end()
            if (tokens := answer.usage) is not None:
                call.report_usage(**attrs.asdict(tokens))
            try:
                await call.send(rest)
            finally:
                with trio.move_on_after(_LAST_WAIT, shield=True):
                    await _drop_rest(response.receive)

        chat = chat_body(message, asks_for_usage=self._asks_for_usage)
        http_request = HttpRequest("POST", CHAT_PATH, self._request_headers(call), chat, len(chat))
        await self._client.send(http_request, handle_response)

    async def _send(
        self,
        call: RawCall,
        body: Body,
        size: int,
        *,
        asked: bool = False,
        unless: frozenset[int] = frozenset(),
    ) -> int | None:
        """Send the request of a call, and forward the response.

        Args:
            call: the call.
            body, size: the body and its size.
            asked: the body asks for usage, and the client did not.
            unless: responses with these statuses are not forwarded.

        Returns:
            The status; ``None`` if the server refuses to be asked for usage, or has one of the statuses in ``unless``,
            and nothing was forwarded.
        """
        status: int | None = None

        async def handle_response(response: HttpResponse) -> None:
            nonlocal status
            if response.status in unless:
                return
            if asked and response.status in _REFUSALS:
                beginning = await _beginning_of(response)
                if _REFUSED_FIELD.search(beginning) is not None:
                    return
                response = attrs.evolve(response, receive=_with_beginning(beginning, response.receive))
            if response.status in _UNKNOWN_ROUTE and call.request.endpoint == COUNT_TOKENS:
                # The server has the model: it has listed it.
                raise NotSupported(call.request.model, "count tokens")
            status = response.status
            await self._forward_response(response, call, asked=asked)

        request = call.request
        path, query = _path(request.endpoint), _query(request.query)
        http_request = HttpRequest("POST", path, self._request_headers(call), body, size, query)
        await self._client.send(http_request, handle_response)
        return status

    def _request_headers(self, call: RawCall) -> list[tuple[str, str]]:
        request = call.request
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if _is_forwarded(name, _REQUEST_HEADERS)
            and name not in ("x-request-id", _TOTAL_TIMEOUT)
            and _HEADER_VALUE.fullmatch(value)
        ]
        if request.content_type and _HEADER_VALUE.fullmatch(request.content_type):
            headers.append(("content-type", request.content_type))
        if "user-agent" not in request.headers:
            headers.append(("user-agent", f"trio-cluster/{__version__}"))
        if request.request_id:
            headers.append(("x-request-id", request.request_id))
        if call.time_left < math.inf:
            # What the client has asked for began to run when it asked.
            headers.append((_TOTAL_TIMEOUT, f"{max(0.001, call.time_left):.3f}"))
        if self._key is not None:
            headers += authorization(self._key)
            if request.endpoint.startswith(_MESSAGES):
                headers.append(("x-api-key", self._key))
        return headers

    async def _forward_response(self, response: HttpResponse, call: RawCall, *, asked: bool) -> None:
        self.activity += 1
        _require_final(response)
        content_type = response.header("content-type")
        if len(content_type) > _MAX_CONTENT_TYPE or not _HEADER_VALUE.fullmatch(content_type):
            content_type = ""
        call.begin(response.status, content_type, _response_headers(response))
        receive, send = response.receive, call.send
        endpoint, encoding = call.request.endpoint, response.header("content-encoding")
        usage = usage_reader(endpoint, response.status, content_type, encoding, asked=asked)
        if (
            endpoint in _ENDPOINTS_WITH_END
            and content_type.lower().startswith("text/event-stream")
            and encoding.strip().lower() in ("", "identity")
        ):
            await self._forward_stream(response, call, usage)
        else:
            while piece := await receive():
                self.activity += 1
                # Also if the reader keeps all of it: an empty piece is a sign of life.
                await send(piece if usage is None else usage.feed(piece))
        if usage is not None:
            if rest := usage.end():
                await send(rest)
            _report(usage, call)

    async def _forward_stream(self, response: HttpResponse, call: RawCall, usage: UsageReader | None) -> None:
        """Forward the body of a response that is a stream with a last event.

        Raises:
            HttpError: the connection is lost before the last event, or was closed, and the framing does not show that.
        """
        end = EndDetector(endpoint_named(call.request.endpoint).failure)
        receive, until = response.receive, math.inf
        try:
            while piece := await (receive() if until == math.inf else _receive_until(until, receive)):
                self.activity += 1
                end.feed(piece)
                # What follows an error may be more of the stream; comments may go on forever.
                until = min(until, trio.current_time() + _LAST_WAIT) if end.has_ended else math.inf
                forwarded = piece if usage is None else usage.feed(piece)
                if usage is not None and until < math.inf:
                    _report(usage, call)
                # Also if the reader keeps all of it: an empty piece is a sign of life.
                await call.send(forwarded)
        except trio.Cancelled:
            if until < math.inf:
                with trio.move_on_after(_LAST_WAIT, shield=True):
                    await _drop_rest(receive)
            raise
        if response.close_delimited and until == math.inf:
            raise HttpError("the connection was closed before the stream was complete")


def authorization(key: str) -> list[tuple[str, str]]:
    """Return the header that carries an API key."""
    return [("authorization", f"Bearer {key}")]


def _report(usage: UsageReader, call: RawCall) -> None:
    """Report what has been read of the usage of an answer, if anything."""
    if (tokens := usage.usage) is not None:
        call.report_usage(**attrs.asdict(tokens))


async def _receive_until(deadline: float, receive: Callable[[], Awaitable[bytes]]) -> bytes:
    """Receive the next piece of a body whose stream is over; empty if there is none before the deadline."""
    with trio.move_on_at(deadline):
        try:
            return await receive()
        except HttpError:
            pass
    return b""


async def _drop_rest(receive: Callable[[], Awaitable[bytes]]) -> None:
    """Receive and drop the rest of a body whose stream is over, so that its connection can be used again.

    If there is much of it, this returns before its end, and the connection is closed.
    """
    size = 0
    try:
        while size < _LAST_BYTES and (piece := await receive()):
            size += len(piece)
    except HttpError:
        pass


def _require_final(response: HttpResponse) -> None:
    """Refuse what is no answer that a client could get.

    Raises:
        HttpError: the status is a redirect, or no status.
    """
    if 300 <= response.status < 400:
        raise HttpError(f"it answered with a redirect ({response.status}), which is not followed")
    if response.status > 599:
        raise HttpError(f"it answered with the invalid status {response.status}")


async def _beginning_of(response: HttpResponse) -> bytes:
    """Receive the beginning of a response, which is all of it if it is an error message of the usual size."""
    beginning = b""
    while len(beginning) < _REFUSAL_LIMIT and (piece := await response.receive()):
        beginning += piece
    return beginning


def _with_beginning(
    beginning: bytes, receive: Callable[[], Awaitable[bytes]]
) -> Callable[[], Awaitable[bytes]]:
    """Return a function that receives what was received already, and then the rest."""

    async def receive_all() -> bytes:
        nonlocal beginning
        if beginning:
            piece, beginning = beginning, b""
            return piece
        return await receive()

    return receive_all


async def _asking(body: bytes) -> bytes | None:
    """Return the body with a request for usage in it; ``None`` if it is to be sent as it is."""
    if len(body) < PARSE_IN_THREAD:
        return ask_for_usage(body)
    return await run_in_thread(ask_for_usage, body, abandon_on_cancel=True)


async def _request_body(model: str, call: RawCall, *, whole: bool) -> tuple[Body, int]:
    """Return the body to send, with the server's name of the model in it, and its size; -1 if that is not known.

    Args:
        model: the server's name.
        call: the call.
        whole: the body must be in memory.
    """
    request = call.request
    renamed, form = model != request.model, is_form(request.content_type)
    if whole or 0 <= request.size <= _BUFFERED_BODY or (renamed and not form):
        body = await _read_body(call)
        if renamed:
            body = rewrite_form(body, request.content_type, model) if form else rewrite_json(body, model)
        elif form:
            body = trim_form(body, request.content_type)
        return body, len(body)
    if not renamed:
        if form:
            return await trim_streamed_form(call.receive, request.content_type, request.size)
        return call.receive, request.size
    rewriter = FormRewriter(request.content_type, model)
    ended = False

    async def receive() -> bytes:
        nonlocal ended
        while not ended:
            data = await call.receive()
            ended = not data
            if piece := rewriter.feed(data) if data else rewriter.end():
                return piece
        return b""

    # The rewriter formats the headers of the parts anew, so that the size is not known in advance.
    return receive, -1


async def _read_body(call: RawCall) -> bytes:
    pieces: list[bytes] = []
    while piece := await call.receive():
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _path(endpoint: str) -> str:
    """Return the path of an endpoint below the server's base URL.

    Raises:
        InvalidRequest: the path would be outside of the API.
    """
    known = ENDPOINTS.get(endpoint)
    if known is not None:
        return known.path
    path = endpoint.removeprefix("/v1")
    if path == endpoint or not path.startswith("/") or {".", ".."} & set(path.split("/")):
        raise InvalidRequest(f"Unknown URL: {endpoint!r}", status=404)
    return quote(path, safe=_SAFE_IN_PATH)


def _query(query: str) -> str:
    """Return the query of a request as it is sent to the server.

    Raises:
        InvalidRequest: it would end the request line. No query that came through a gateway does.
    """
    if not QUERY.fullmatch(query):
        raise InvalidRequest("The query of the URL is not valid")
    return query


def _is_forwarded(name: str, listed: frozenset[str]) -> bool:
    return name in listed or (
        name.startswith(_API_PREFIXES)
        and name not in _BLOCKED_HEADERS
        and _SECRET_HEADER.search(name) is None
    )


def _response_headers(response: HttpResponse) -> tuple[tuple[str, str], ...]:
    headers: list[tuple[str, str]] = []
    room = _MAX_HEADER_SIZE
    for name, value in response.headers:
        if not _is_forwarded(name, _RESPONSE_HEADERS) or not _HEADER_VALUE.fullmatch(value):
            continue
        room -= len(name) + len(value)
        if room < 0 or len(headers) == _MAX_HEADERS:
            break
        # `x-request-id` is the id of the request in this cluster; the server's own id gets another name.
        headers.append(("x-upstream-request-id" if name == "x-request-id" else name, value))
    return tuple(headers)

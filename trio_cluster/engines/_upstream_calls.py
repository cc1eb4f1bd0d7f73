"""Forwarding of calls to an upstream server: what of a request is sent to it, and what of its response comes back.

Bodies are forwarded as they are, in both directions and in the pieces in which they arrive, with two exceptions: the
name of the model in a request is replaced, where the cluster calls the model by another name, and the preamble and the
epilogue of a form are dropped. Headers are forwarded if they are about the
content or about the API. Connection headers are not, because the connection ends here. Keys and cookies are not either:
the client's are not meant for the upstream server, and the upstream server's are not meant for the client.

Every response is the call's answer, whatever its status. The call fails, with ``UpstreamLost``, only if there is no
complete response, or with ``Overloaded`` if this machine has no room for the connection, which is not the server's
fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final
from urllib.parse import quote

from trio_cluster._version import __version__
from trio_cluster.core.request import Request
from trio_cluster.errors import InvalidRequest, Overloaded, UpstreamLost
from trio_cluster.local.passthrough import RawCall
from trio_cluster.openai import ENDPOINTS, EndDetector, endpoint_named, is_form

from ._form_trim import trim_form, trim_streamed_form
from ._http_client import Body, ConnectFailed, HttpClient, HttpRequest, HttpResponse, LocalExhaustion
from ._http_response import HttpError
from ._model_field import FormRewriter, rewrite_form, rewrite_json

__all__ = ["UpstreamCalls", "authorization"]

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

#: Endpoints whose event streams end with an event of a known type, whichever server writes them.
_ENDPOINTS_WITH_END: Final = frozenset({"chat.completions", "completions", "responses", "/v1/messages"})

_SAFE_IN_PATH: Final = "/:@!$&'()*+,;=-._~"


class UpstreamCalls:
    """Forwards calls to the upstream server of ``client``.

    Args:
        client: sends the requests.
        key: the API key to send; ``None`` if the server requires none.
        on_lost: called, synchronously, when a call fails because the server cannot be reached or its response is
            incomplete; the argument tells whether it cannot be reached.

    Attributes:
        activity: counts what is received from the server, heads and pieces of bodies. A change shows that it is alive.
    """

    def __init__(self, client: HttpClient, key: str | None, on_lost: Callable[[bool], None]) -> None:
        self._client = client
        self._key = key
        self._on_lost = on_lost
        self.activity = 0

    async def forward(self, model: str, call: RawCall) -> None:
        """Forward one call; with the first argument bound, a raw handler.

        Cancellation closes the connection to the server, which thereby learns that the call is over.

        Args:
            model: the model's name on the server.
            call: its request has the model's name in the cluster.

        Raises:
            UpstreamLost: the server cannot be reached, or its response is incomplete or not HTTP.
            Overloaded: this machine has no descriptor, memory or local port left for the connection.
            InvalidRequest: the request cannot be forwarded: a path outside of the API, or a body without a model.
        """
        request = call.request
        body, size = await _request_body(model, call)
        http_request = HttpRequest(
            "POST", _path(request.endpoint), self._request_headers(request), body, size
        )

        async def handle_response(response: HttpResponse) -> None:
            await self._forward_response(response, call)

        try:
            await self._client.send(http_request, handle_response)
        except LocalExhaustion as error:
            raise Overloaded(f"This server is out of resources: {error}; try again shortly") from error
        except HttpError as error:
            self._on_lost(isinstance(error, ConnectFailed))
            why = str(error)
            if isinstance(error, ConnectFailed):
                why = f"it cannot be reached ({why})"
            raise UpstreamLost(request.model, why) from error

    def _request_headers(self, request: Request) -> list[tuple[str, str]]:
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if _is_forwarded(name, _REQUEST_HEADERS)
            and name != "x-request-id"
            and _HEADER_VALUE.fullmatch(value)
        ]
        if request.content_type and _HEADER_VALUE.fullmatch(request.content_type):
            headers.append(("content-type", request.content_type))
        if "user-agent" not in request.headers:
            headers.append(("user-agent", f"trio-cluster/{__version__}"))
        if request.request_id:
            headers.append(("x-request-id", request.request_id))
        if self._key is not None:
            headers += authorization(self._key)
            if request.endpoint.startswith("/v1/messages"):
                headers.append(("x-api-key", self._key))
        return headers

    async def _forward_response(self, response: HttpResponse, call: RawCall) -> None:
        self.activity += 1
        if 300 <= response.status < 400:
            raise HttpError(f"it answered with a redirect ({response.status}), which is not followed")
        if response.status > 599:
            raise HttpError(f"it answered with the invalid status {response.status}")
        content_type = response.header("content-type")
        if len(content_type) > _MAX_CONTENT_TYPE or not _HEADER_VALUE.fullmatch(content_type):
            content_type = ""
        call.begin(response.status, content_type, _response_headers(response))
        receive, send = response.receive, call.send
        # The framing does not show whether such a body is complete, but the content does.
        end: EndDetector | None = None
        endpoint = call.request.endpoint
        if (
            response.close_delimited
            and endpoint in _ENDPOINTS_WITH_END
            and content_type.lower().startswith("text/event-stream")
        ):
            end = EndDetector(endpoint_named(endpoint).failure)
        while piece := await receive():
            self.activity += 1
            if end is not None:
                end.feed(piece)
            await send(piece)
        if end is not None and not end.has_ended:
            raise HttpError("the connection was closed before the stream was complete")


def authorization(key: str) -> list[tuple[str, str]]:
    """Return the header that carries an API key."""
    return [("authorization", f"Bearer {key}")]


async def _request_body(model: str, call: RawCall) -> tuple[Body, int]:
    """Return the body to send, with the server's name of the model in it, and its size; -1 if that is not known."""
    request = call.request
    renamed, form = model != request.model, is_form(request.content_type)
    if 0 <= request.size <= _BUFFERED_BODY or (renamed and not form):
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

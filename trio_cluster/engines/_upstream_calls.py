"""Calls that another server answers: what goes up to it, and what of its answer comes down.

Bodies pass as they are, in both directions and in the pieces in which they come. The one thing that may be changed is
the name of the model in a request, where the cluster calls it by another one. Headers pass if they are about the
content or about the API. Those about the connection do not, for it ends here, and keys and cookies do not: the
client's are not meant for that server, and that server's are not meant for the client.

Whatever status the server answers with is the answer. It was *lost* only if there is no answer, or half of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final
from urllib.parse import quote

from trio_cluster._version import __version__
from trio_cluster.core.request import Request
from trio_cluster.errors import InvalidRequest, UpstreamLost
from trio_cluster.local.passthrough import RawCall
from trio_cluster.openai import ENDPOINTS, is_form

from ._http_client import Answer, Body, ConnectFailed, HttpClient, Question
from ._http_response import HttpError
from ._model_field import FormRewriter, rewrite_form, rewrite_json

__all__ = ["UpstreamCalls", "authorization"]

_TO_SERVER: Final = frozenset({"accept", "accept-language", "user-agent"})
_TO_CLIENT: Final = frozenset(
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
#: Families that belong to the API, in both directions.
_API: Final = ("x-", "openai-", "anthropic-")
# Some frameworks let these change which route is meant, or how.
_NEVER: Final = frozenset(
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
_SECRET: Final = re.compile(r"api-?key|access-?key|token$|auth|cookie|secret|password")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
#: Headers of an answer that are passed on, and the characters that they may have together; a link bounds them, too.
_MOST_HEADERS: Final = 64
_HEADER_ROOM: Final = 16 * 1024
_LONGEST_TYPE: Final = 512

#: Bytes of a body that are waited for; it can be sent again then, on a connection that is kept. Others are passed on as
#: they come.
_WHOLE: Final = 256 * 1024

#: Endpoints whose streams say that they are complete.
_SAY_DONE: Final = frozenset({"chat.completions", "completions"})
_DONE: Final = b"[DONE]"
#: Bytes at the end of such a stream in which that is looked for; comments may follow it.
_TAIL: Final = 256

_SAFE_IN_PATH: Final = "/:@!$&'()*+,;=-._~"


class UpstreamCalls:
    """Answers calls by asking the server of ``client``.

    Args:
        client: asks it.
        key: what the server wants for one; ``None``: nothing.
        on_lost: called when the server could not be reached, or broke off.

    Attributes:
        heard: how often something has come from the server; it is alive if that changes.
    """

    def __init__(self, client: HttpClient, key: str | None, on_lost: Callable[[], None]) -> None:
        self._client = client
        self._key = key
        self._on_lost = on_lost
        self.heard = 0

    async def answer(self, model: str, call: RawCall) -> None:
        """Answer one call; with the first argument bound, a raw handler.

        Args:
            model: what the server calls the model.
            call: its request names the model as the cluster calls it.

        Raises:
            UpstreamLost: the server could not be reached, or broke off.
            ApiError: the request makes no sense.
        """
        request = call.request
        body, size = await _body(model, call)
        question = Question("POST", _path(request.endpoint), self._headers(request), body, size)

        async def pass_on(answer: Answer) -> None:
            await self._forward_upload(answer, call)

        try:
            await self._client.exchange(question, pass_on)
        except HttpError as error:
            self._on_lost()
            why = str(error)
            if isinstance(error, ConnectFailed):
                why = f"it cannot be reached ({why})"
            raise UpstreamLost(request.model, why) from error

    def _headers(self, request: Request) -> list[tuple[str, str]]:
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if _may_pass(name, _TO_SERVER) and name != "x-request-id" and _HEADER_VALUE.fullmatch(value)
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

    async def _forward_upload(self, answer: Answer, call: RawCall) -> None:
        self.heard += 1
        if 300 <= answer.status < 400:
            raise HttpError(f"it answered with a redirection ({answer.status}), which is not followed")
        if answer.status > 599:
            raise HttpError(f"it answered with the status {answer.status}, which is not one")
        content_type = answer.header("content-type")
        if len(content_type) > _LONGEST_TYPE or not _HEADER_VALUE.fullmatch(content_type):
            content_type = ""
        call.begin(answer.status, content_type, _headers_down(answer))
        receive, send = answer.receive, call.send
        # Where neither a length nor chunks tell a whole answer from half of one, the content may.
        unsure = (
            not answer.framed
            and call.request.endpoint in _SAY_DONE
            and content_type.lower().startswith("text/event-stream")
        )
        tail = b""
        while piece := await receive():
            self.heard += 1
            if unsure:
                tail = (tail + piece)[-_TAIL:]
            await send(piece)
        if unsure and _DONE not in tail:
            raise HttpError("the connection ended before the stream was complete")


def authorization(key: str) -> list[tuple[str, str]]:
    """Return the header that shows a key."""
    return [("authorization", f"Bearer {key}")]


async def _body(model: str, call: RawCall) -> tuple[Body, int]:
    """Return the body to send and its size; with the server's name of the model in it."""
    request = call.request
    renamed, form = model != request.model, is_form(request.content_type)
    if 0 <= request.size <= _WHOLE or (renamed and not form):
        body = await _read(call)
        if renamed:
            body = rewrite_form(body, request.content_type, model) if form else rewrite_json(body, model)
        return body, len(body)
    if not renamed:
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

    # How long it will be depends on how the client writes headers.
    return receive, -1


async def _read(call: RawCall) -> bytes:
    pieces: list[bytes] = []
    while piece := await call.receive():
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _path(endpoint: str) -> str:
    """Return where an endpoint is below the server's base.

    Raises:
        InvalidRequest: it would be somewhere else.
    """
    known = ENDPOINTS.get(endpoint)
    if known is not None:
        return known.path
    path = endpoint.removeprefix("/v1")
    if path == endpoint or not path.startswith("/") or {".", ".."} & set(path.split("/")):
        raise InvalidRequest(f"Unknown URL: {endpoint!r}", status=404)
    return quote(path, safe=_SAFE_IN_PATH)


def _may_pass(name: str, named: frozenset[str]) -> bool:
    return name in named or (name.startswith(_API) and name not in _NEVER and _SECRET.search(name) is None)


def _headers_down(answer: Answer) -> tuple[tuple[str, str], ...]:
    headers: list[tuple[str, str]] = []
    room = _HEADER_ROOM
    for name, value in answer.headers:
        if not _may_pass(name, _TO_CLIENT) or not _HEADER_VALUE.fullmatch(value):
            continue
        room -= len(name) + len(value)
        if room < 0 or len(headers) == _MOST_HEADERS:
            break
        # The client knows its request by the name that it has here.
        headers.append(("x-upstream-request-id" if name == "x-request-id" else name, value))
    return tuple(headers)

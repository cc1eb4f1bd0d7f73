"""What a client asks, made into a request: its body, the headers that matter, and how long it waits.

Reading and checking happen once, here, and so before anybody's slot is taken. What is only passed through (a large
upload, a body for another server) is looked at no further than to find its model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import trio

from ..core.channel import ByteChannel
from ..core.limits import PARSE_IN_THREAD
from ..core.model import ModelInfo
from ..core.request import Request
from ..errors import InvalidRequest
from ..openai import Endpoint, FormPeek, is_form, media_type, peek_model, require_one_model
from .body import SPOOL_THRESHOLD, RequestBody, SpooledBody, too_large
from .context import RequestContext
from .node_context import NodeContext

__all__ = ["Parse"]

#: Headers that travel to the handler: what clients say of themselves, the key under which they repeat a request, and the
#: trace context (W3C Trace Context and Baggage). Others do if they begin with one of the prefixes below.
_TRAVELLING: Final = frozenset(
    {"accept", "accept-language", "baggage", "idempotency-key", "traceparent", "tracestate", "user-agent"}
)

#: Seconds as they may stand in a header.
_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")


class Parse:
    """Makes a request of what a client sent. See ``Stage``.

    A body that arrived whole is checked, unless it is for a passthrough model. Of a form that is larger than that, only
    the model is found out; what has arrived until then is put into the context's spool, and the rest has still to be
    forwarded.

    Args:
        node_context: the node; its models and its options count.
    """

    def __init__(self, node_context: NodeContext) -> None:
        self._node_context = node_context

    async def admit(self, context: RequestContext) -> None:
        """See ``Stage``.

        Raises:
            ApiError: the request cannot be served.
            ClientLeft: the client left in the middle of it.
        """
        node_context, request_body, endpoint = self._node_context, context.request_body, context.endpoint
        assert endpoint is not None
        headers = _travelling_headers(context)
        _check_coding(context)
        content_type = (context.header(b"content-type") or b"").decode("latin-1")
        form = _is_form(content_type)
        idle_timeout, total_timeout = _timeouts(node_context, context)
        body, parsed, upload = b"", None, None
        first = await request_body.read(SPOOL_THRESHOLD)
        if form and not request_body.complete:
            context.spool = SpooledBody()
            context.form_peek = FormPeek(content_type)
            model = await _find_model(request_body, context.form_peek, first, context.spool)
            info = node_context.router.catalog.check(model, endpoint.kind, endpoint.name)
            size = context.declared_length()
            upload = ByteChannel(-1 if size is None else size)
        else:
            body = first if request_body.complete else await _rest_of(request_body, first, node_context)
            info, parsed = await _read_whole(node_context, endpoint, body, content_type, headers)
        context.request = Request(
            endpoint=endpoint.name,
            kind=endpoint.kind,
            model=info.name,
            body=body,
            content_type=content_type,
            headers=headers,
            request_id=context.request_id,
            idle_timeout=idle_timeout,
            total_timeout=total_timeout,
            parsed=parsed,
            checked=parsed is not None,
            client=context.client,
            upload=upload,
            principal=context.principal,
        )


# Clients choose the header; those that are sent all the time are few.
@lru_cache(maxsize=64)
def _is_form(content_type: str) -> bool:
    """Return whether the body is a form; otherwise it is JSON, also for a model that wants it untouched.

    A web page can send every other content type, and none, without asking first (CORS).

    Raises:
        InvalidRequest: it is neither (415).
    """
    if is_form(content_type):
        return True
    kind = media_type(content_type)
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise InvalidRequest(
            f"Unsupported content type '{kind}': expected application/json",
            status=415,
            param="content-type",
            code="unsupported_media_type",
        )
    return False


def _check_coding(context: RequestContext) -> None:
    """Refuse a body that is compressed: it would be taken for malformed JSON."""
    coding = (context.header(b"content-encoding") or b"").decode("latin-1").strip()
    if coding.lower() not in ("", "identity"):
        raise InvalidRequest(
            f"Unsupported content encoding '{coding}': send the body without one",
            status=415,
            param="content-encoding",
            code="unsupported_media_type",
        )


async def _rest_of(request_body: RequestBody, first: bytes, node_context: NodeContext) -> bytes:
    """Return a body that is kept in memory, of which ``first`` has come and more is to come."""
    request_body.limit = min(request_body.limit, node_context.options.server.max_json_size)
    if request_body.received > request_body.limit:
        raise too_large(request_body.limit)
    return await request_body.read(request_body.limit, first)


async def _find_model(request_body: RequestBody, peek: FormPeek, first: bytes, spool: SpooledBody) -> str:
    data = first
    while True:
        peek.feed(data)
        await spool.add(data, last=peek.model is not None)
        if peek.model == "":
            raise InvalidRequest("'model' must not be empty", param="model")
        if peek.model is not None:
            return peek.model
        if request_body.complete:
            raise InvalidRequest("Missing required field: 'model'", param="model")
        data = await request_body.next()


async def _read_whole(
    node_context: NodeContext, endpoint: Endpoint, body: bytes, content_type: str, headers: dict[str, str]
) -> tuple[ModelInfo, Any]:
    """Return the model that a body is for and, unless that wants it untouched, the body read and checked."""
    if not _is_form(content_type):
        await _look(require_one_model, body)
    if node_context.router.catalog.passthrough:
        untouched = node_context.router.catalog.info(await _look(peek_model, body, content_type) or "")
        if untouched is not None and untouched.kind == "any":
            return untouched, None
    parsed = await _look(endpoint.parse, body, content_type, headers)
    info = node_context.router.catalog.check(parsed.model, endpoint.kind, endpoint.name)
    if getattr(parsed, "has_image_inputs", False) and not info.options.supports_vision:
        where = "messages" if "messages" in parsed.raw else "input"
        raise InvalidRequest(
            f"The model '{info.name}' does not take images", param=where, code="vision_not_supported"
        )
    return info, parsed


async def _look(look: Callable[..., Any], body: bytes, *more: Any) -> Any:
    """Return what a function makes of a body; at a large one it looks in a thread."""
    if len(body) < PARSE_IN_THREAD:
        return look(body, *more)
    # Looking touches nothing else, so nobody needs to wait for it when the client has left.
    return await trio.to_thread.run_sync(look, body, *more, abandon_on_cancel=True)


def _travelling_headers(context: RequestContext) -> dict[str, str]:
    """Return the headers that a handler may want; keys and cookies are nobody's business but the gate's."""
    headers: dict[str, str] = {}
    for raw, value in context.headers:
        name = _travelling_name(raw)
        if name:
            text = value.decode("latin-1")
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return headers


# Clients choose the names; those that are sent all the time are few.
@lru_cache(maxsize=256)
def _travelling_name(raw: bytes) -> str:
    """Return the name of a header that travels; empty for one that does not."""
    name = raw.decode("latin-1")
    if name in _TRAVELLING or (name.startswith(("x-", "openai-", "anthropic-")) and not _is_secret(name)):
        return name
    return ""


def _is_secret(name: str) -> bool:
    return name.endswith(("api-key", "token", "authorization", "cookie", "secret"))


def _timeouts(node_context: NodeContext, context: RequestContext) -> tuple[float, float]:
    """Return how long the answer may be silent, and how long it may take altogether."""
    idle_timeout, total_timeout = node_context.options.server.default_timeout, math.inf
    listens = context.header(b"x-stainless-read-timeout")
    if listens is not None:
        # The official clients send this by themselves: a value that makes no sense is ignored, and not an error.
        idle_timeout = min(idle_timeout, _seconds(listens) or math.inf)
    asked = context.header(b"x-request-timeout")
    if asked is not None:
        seconds = _seconds(asked)
        if seconds is None:
            raise InvalidRequest(
                f"x-request-timeout: expected seconds, more than 0; got {asked.decode('latin-1')!r}",
                param="x-request-timeout",
            )
        total_timeout = seconds
        idle_timeout = min(idle_timeout, seconds)
    return idle_timeout, total_timeout


def _seconds(value: bytes) -> float | None:
    """Return a number of seconds more than 0; ``None`` if the value is none."""
    text = value.decode("latin-1").strip()
    return (float(text) or None) if _SECONDS.fullmatch(text) else None

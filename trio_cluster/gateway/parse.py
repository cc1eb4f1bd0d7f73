"""The parse stage: makes a request of the body, the headers and the timeouts that a client sent.

Bodies are parsed and validated once, here, before the request takes a slot. A body that only passes through (a large
upload, or a request for a passthrough model) is parsed only as far as is necessary to find its model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final

import attrs
import msgspec

from ..core.channel import ByteChannel
from ..core.limits import PARSE_IN_THREAD
from ..core.model import Kind, ModelInfo
from ..core.provenance import MAX_CLUSTERS, VIA_HEADER, format_via, parse_via
from ..core.request import Request
from ..core.threads import run_in_thread
from ..errors import ApiError, InvalidRequest, LoopDetected, ModelUnavailable, NotSupported, WrongKind
from ..openai import (
    Endpoint,
    FormPeek,
    ItemReferenced,
    is_form,
    media_type,
    peek_model,
    read_object,
    require_one_model,
)
from ..routing.catalog import Catalog
from .aliases import AliasedBody, aliased_form, read_aliased
from .auth import require_model
from .body import SPOOL_THRESHOLD, RequestBody, SpooledBody, too_large
from .context import RequestContext
from .node_context import NodeContext
from .query import forwarded_query
from .stored_responses import refuse_stored, resolve, without_store

__all__ = ["Parse"]

#: Headers that are passed to the handler: those with which clients describe themselves, the key under which they repeat
#: a request, the names of conversations, and the trace context (W3C Trace Context and Baggage). Others are passed if
#: they begin with one of the prefixes below.
_FORWARDED: Final = frozenset(
    {
        "accept",
        "accept-language",
        "baggage",
        "idempotency-key",
        "session-id",
        "session_id",
        "traceparent",
        "tracestate",
        "user-agent",
    }
)

#: Limits of an answer's tokens from here on are taken for none.
_MOST_TOKENS: Final = 1 << 31

#: A number of seconds in a header.
_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")


class Parse:
    """Makes the request of the context. See ``Stage``.

    A body that has arrived completely is parsed and validated, unless it is for a passthrough model. A larger form is
    read only until its model is known; what has arrived until then is in the context's spool, and the route stage
    forwards it with the rest.

    Args:
        node_context: the node, for its models and options.
    """

    def __init__(self, node_context: NodeContext) -> None:
        self._node_context = node_context

    async def admit(self, context: RequestContext) -> None:
        """See ``Stage``.

        Raises:
            ApiError: the request is not valid, or too large, or does not arrive in time; or its model does not exist or
                does not answer the endpoint; or its query cannot be passed on.
            ClientLeft: the client disconnected in the middle of its request.
        """
        node_context, request_body, endpoint = self._node_context, context.request_body, context.endpoint
        assert endpoint is not None
        catalog = node_context.router.catalog
        headers = _forwarded_headers(context)
        _check_coding(context)
        content_type = (context.header(b"content-type") or b"").decode("latin-1")
        form = _is_form(content_type)
        idle_timeout, total_timeout = _timeouts(node_context, context)
        body, parsed, upload = b"", None, None
        alias, aliased = "", None
        first = await request_body.read(SPOOL_THRESHOLD)
        if form and not request_body.complete:
            context.spool = SpooledBody()
            context.form_peek = FormPeek(content_type)
            model = await _find_model(request_body, context.form_peek, first, context.spool)
            _require_model_of_path(context, model)
            require_model(context.principal, model)
            if model in catalog.aliases.table:
                alias = model
                info, context.form_rewriter = aliased_form(context, catalog, alias, content_type, headers)
                size = None
            else:
                info = catalog.check(model, endpoint.kind, endpoint.name)
                size = context.declared_length()
            upload = ByteChannel(-1 if size is None else size)
        else:
            limit = node_context.options.server.max_json_size
            if not form and request_body.received > limit:
                raise too_large(limit)
            body = first if request_body.complete else await _rest_of(request_body, first, limit)
            if context.model_in_path:
                body = await _parse(_with_model_of_path, body, content_type, context)
            if context.principal.models:
                # Before anything is said about the model. A body without one is refused below.
                require_model(context.principal, await _parse(peek_model, body, content_type) or "")
            if catalog.aliases.table:
                alias = await _parse(peek_model, body, content_type) or ""
                alias = alias if alias in catalog.aliases.table else ""
            if alias:
                aliased = await _read_aliased(node_context, context, alias, body, content_type, headers)
                body, info, parsed = aliased.body, aliased.info, aliased.parsed
            elif endpoint.is_stored and not form:
                body, info, parsed = await _read_stored(node_context, context, body, content_type, headers)
            else:
                info, parsed = await _read_whole(node_context, endpoint, body, content_type, headers)
        if context.principal.models and not alias:
            require_model(context.principal, info.name)
        if (
            VIA_HEADER in headers
            or info.name in catalog.passthrough
            or (aliased is not None and not catalog.passthrough.isdisjoint(aliased.names))
        ):
            headers[VIA_HEADER] = _passed(headers.get(VIA_HEADER, ""), info.name, catalog)
        # Written out here, since a function would cost every request a move through the code.
        fields = _peek_fields(body) if parsed is None else parsed.raw
        max_tokens = (
            fields.get("max_completion_tokens") or fields.get("max_tokens") or fields.get("max_output_tokens")
        )
        if type(max_tokens) is not int or not 0 < max_tokens < _MOST_TOKENS:
            max_tokens = 0
        elif type(count := fields.get("n")) is int and 1 < count < _MOST_TOKENS // max_tokens:
            max_tokens *= count
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
            max_tokens=max_tokens,
            query=forwarded_query(context.query, alias or info.name) if context.query else "",
            alias=alias,
        )
        if aliased is not None and (otherwise := aliased.following(context.request)) is not None:
            context.request = attrs.evolve(context.request, otherwise=otherwise)


class _Fields(msgspec.Struct):
    """What is read of a body that is not parsed here. Everything else is skipped."""

    max_completion_tokens: Any = None
    max_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None


_fields: Final = msgspec.json.Decoder(_Fields)


def _peek_fields(body: bytes) -> dict[str, Any]:
    """Return the fields of a body that say how long the answer may be; none if it is no JSON, or large."""
    if not body or len(body) >= PARSE_IN_THREAD:
        return {}
    try:
        return msgspec.structs.asdict(_fields.decode(body))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}


def _passed(via: str, model: str, catalog: Catalog) -> str:
    """Return the clusters that a request has passed, this one included, as the value of a header.

    Raises:
        LoopDetected: this one is among them already, or they are too many.
    """
    passed = parse_via(via)
    if catalog.cluster_id in passed or len(passed) >= MAX_CLUSTERS:
        raise LoopDetected(model)
    return format_via((*passed, catalog.cluster_id))


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


def _with_model_of_path(body: bytes, content_type: str, context: RequestContext) -> bytes:
    """Return a body that asks for the model that the path names."""
    model = peek_model(body, content_type)
    if model == context.model_in_path:
        return body
    if is_form(content_type):
        _require_model_of_path(context, model or "")
    return msgspec.json.encode(read_object(body) | {"model": context.model_in_path})


def _require_model_of_path(context: RequestContext, model: str) -> None:
    """Refuse a form whose model is not that of the path: a form is passed on as it arrives."""
    if context.model_in_path not in ("", model):
        raise InvalidRequest(
            f"The path names the model '{context.model_in_path}': the field 'model' of the form must be the same",
            param="model",
        )


async def _rest_of(request_body: RequestBody, first: bytes, limit: int) -> bytes:
    """Return a body that is kept in memory, given its beginning, and wait for the rest."""
    request_body.limit = min(request_body.limit, limit)
    return await request_body.read(request_body.limit, first)


async def _find_model(request_body: RequestBody, peek: FormPeek, first: bytes, spool: SpooledBody) -> str:
    """Return the model that a form names, and put what was read until then into the spool."""
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
    """Return the model that a body is for, and the parsed body; ``None`` if only passthrough models answer."""
    catalog = node_context.router.catalog
    if not _is_form(content_type):
        await _parse(require_one_model, body)
    if catalog.passthrough or catalog.absent:
        name = await _parse(peek_model, body, content_type) or ""
        if catalog.is_away(name, endpoint.kind, endpoint.name):
            # What a passthrough model takes may be more than is accepted below.
            raise ModelUnavailable(name)
        untouched = catalog.takes_untouched(name, endpoint.kind, endpoint.name)
        if untouched is not None:
            return untouched, None
    parsed = await _parse(endpoint.parse, body, content_type, headers)
    try:
        info = catalog.check(parsed.model, endpoint.kind, endpoint.name)
    except (InvalidRequest, WrongKind) as error:
        if endpoint.optional is None:
            raise
        raise _not_answered(catalog, parsed.model, endpoint.optional, error) from None
    # Looked at here, since a function would cost every request a call.
    if getattr(parsed, "has_image_inputs", False) or getattr(parsed, "prompt_tokens", None) is not None:
        refusal = _unfit(info, parsed)
        if refusal is not None:
            raise refusal
    return info, parsed


def _unfit(info: ModelInfo, parsed: Any) -> InvalidRequest | None:
    """Return why a model does not take a body that is valid; ``None`` if it takes it."""
    if getattr(parsed, "has_image_inputs", False) and not info.options.supports_vision:
        where = "messages" if "messages" in parsed.raw else "input"
        return InvalidRequest(
            f"The model '{info.name}' does not take images", param=where, code="vision_not_supported"
        )
    if getattr(parsed, "prompt_tokens", None) is not None:
        if not info.options.accepts_token_ids:
            return InvalidRequest(
                f"The model '{info.name}' takes prompts of text, and none of token ids",
                param="prompt",
                code="token_ids_not_supported",
            )
        if parsed.raw.get("echo"):
            return InvalidRequest(
                "'echo' needs a prompt of text: the text of token ids is not known here",
                param="echo",
                code="unsupported_value",
            )
    return None


async def _read_aliased(
    node_context: NodeContext,
    context: RequestContext,
    alias: str,
    body: bytes,
    content_type: str,
    headers: dict[str, str],
) -> AliasedBody:
    """Do what :func:`_read_whole` and :func:`_read_stored` do, for a body that names an alias."""
    endpoint = context.endpoint
    assert endpoint is not None

    async def read_again(body: bytes) -> tuple[bytes, ModelInfo, Any]:
        info, parsed = await _read_whole(node_context, endpoint, body, content_type, headers)
        return body, info, parsed

    async def read(body: bytes) -> tuple[bytes, ModelInfo, Any]:
        return await _read_stored(node_context, context, body, content_type, headers)

    if not endpoint.is_stored or _is_form(content_type):
        read = read_again
    catalog = node_context.router.catalog
    return await read_aliased(
        context, catalog, alias, body, content_type, read=read, read_again=read_again, unfit=_unfit
    )


def _not_answered(catalog: Catalog, name: str, kind: Kind, error: ApiError) -> ApiError:
    """Return the error for a model that does not answer an optional route for models of a kind."""
    info = catalog.info(name)
    if info is None:
        return error
    return NotSupported(name, "count tokens") if info.kind == kind else WrongKind(name, info.kind, kind)


async def _read_stored(
    node_context: NodeContext,
    context: RequestContext,
    body: bytes,
    content_type: str,
    headers: dict[str, str],
) -> tuple[bytes, ModelInfo, Any]:
    """Do what :func:`_read_whole` does for a route whose answers are stored, and return the body to forward first."""
    endpoint, store = context.endpoint, node_context.responses
    assert endpoint is not None
    if store is not None and not store.enabled:
        store = None
    info: ModelInfo | None = None
    parsed: Any = None
    untouched = False
    raw: dict[str, Any]
    try:
        info, parsed = await _read_whole(node_context, endpoint, body, content_type, headers)
        if parsed is not None:
            raw = parsed.raw
        elif store is None:
            return body, info, None
        else:
            untouched = True
            raw = await _parse(read_object, body)
    except ItemReferenced:
        if store is None:
            raise
        raw = await _parse(read_object, body)
    except InvalidRequest:
        if info is None:
            raise
        # The server behind the model says what is wrong.
        return body, info, None
    if store is None:
        assert info is not None
        refuse_stored(raw)
        if raw.get("store") is not False:
            # The answer repeats it.
            body = await _parse(without_store, body, raw)
            raw["store"] = False
        return body, info, parsed
    most = node_context.options.stored_responses_size
    answer = await resolve(store, context.principal, body, raw, untouched=untouched, most=most)
    if answer is not None:
        if answer.is_needed:
            context.stored = answer
        if answer.body is not body:
            body = answer.body
            if len(body) > node_context.options.server.max_json_size:
                raise too_large(node_context.options.server.max_json_size)
            if not untouched:
                info, parsed = await _read_whole(node_context, endpoint, body, content_type, headers)
    assert info is not None
    return body, info, parsed


async def _parse(function: Callable[..., Any], body: bytes, *more: Any) -> Any:
    """Call a function that parses a body; in a thread, if the body is large."""
    if len(body) < PARSE_IN_THREAD:
        return function(body, *more)
    # The thread can be abandoned if the client disconnects, since parsing has no side effects.
    return await run_in_thread(partial(function, body, *more), abandon_on_cancel=True)


def _forwarded_headers(context: RequestContext) -> dict[str, str]:
    """Return the headers that are passed to the handler. API keys and cookies are not."""
    headers: dict[str, str] = {}
    for raw, value in context.headers:
        name = _forwarded_name(raw)
        if name:
            text = value.decode("latin-1")
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return headers


# Cached, since clients send the same few names with every request. Bounded, since they may send any others.
@lru_cache(maxsize=256)
def _forwarded_name(raw: bytes) -> str:
    """Return the name of a header that is passed to the handler; empty if it is not."""
    name = raw.decode("latin-1")
    if name in _FORWARDED or (name.startswith(("x-", "openai-", "anthropic-")) and not _is_secret(name)):
        return name
    return ""


def _is_secret(name: str) -> bool:
    return name.endswith(("api-key", "token", "authorization", "cookie", "secret"))


def _timeouts(node_context: NodeContext, context: RequestContext) -> tuple[float, float]:
    """Return the idle timeout and the total timeout of a request, in seconds.

    Raises:
        InvalidRequest: ``x-request-timeout`` is not a number of seconds.
    """
    idle_timeout, total_timeout = node_context.options.server.default_timeout, math.inf
    listens = context.header(b"x-stainless-read-timeout")
    if listens is not None:
        # The official clients send this header on their own, so a value that is not valid is ignored and not an error.
        idle_timeout = min(idle_timeout, _seconds(listens) or math.inf)
    asked = context.header(b"x-request-timeout")
    if asked is not None:
        seconds = _seconds(asked)
        if seconds is None:
            raise InvalidRequest(
                f"x-request-timeout: expected a number of seconds, more than 0; got {asked.decode('latin-1')!r}",
                param="x-request-timeout",
            )
        total_timeout = seconds
        idle_timeout = min(idle_timeout, seconds)
    return idle_timeout, total_timeout


def _seconds(value: bytes) -> float | None:
    """Return the number of seconds that a header has; ``None`` if it is not a number, or 0."""
    text = value.decode("latin-1").strip()
    return (float(text) or None) if _SECONDS.fullmatch(text) else None

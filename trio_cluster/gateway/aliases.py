"""Requests for aliases: which models they are for, in which order, and the request for each of them.

A request for an alias becomes a request for a model here, before it is routed: its body names the model, and so does
everything behind the gateway. ``Request.alias`` keeps the name that the client knows, for the answer and for whoever
counts.

An alias with several names makes a request for each of them that answers the route. The first is the request that is
routed; the others are made when they are needed, by ``Request.otherwise``. The body is checked once. What is different
for each model is its name, and whether the model gets the body untouched.

An alias with weights gives one conversation always the same model. What names the conversation is hashed: a header or a
field that clients send for that, otherwise the first message of the user, which is the same in every turn. Requests
that are no conversations go by their body. A form is never the same twice, so it gets a random model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeAlias

import attrs
import msgspec

from ..core import randomness
from ..core.aliases import expand, reachable
from ..core.limits import PARSE_IN_THREAD
from ..core.model import ModelInfo
from ..core.request import Request
from ..core.threads import run_in_thread
from ..errors import ApiError, InvalidRequest, ModelNotFound, ModelUnavailable, NotSupported, WrongKind
from ..openai import Endpoint, FormRewriter, JsonRewriter, is_form, require_one_model, rewrite_form
from ..routing.catalog import Catalog
from ..routing.prompt import CONVERSATION_HEADERS
from .context import RequestContext

__all__ = ["AliasedBody", "ReadBody", "aliased_form", "read_aliased"]

#: Reads a body that names a model: returns the body to forward, the model, and the parsed body.
ReadBody: TypeAlias = Callable[[bytes], Awaitable[tuple[bytes, ModelInfo, Any]]]
#: Says why a model does not take a request that is valid.
CheckModel: TypeAlias = Callable[[ModelInfo, Any], InvalidRequest | None]

#: Headers that name a conversation, as they are received; the first one that a client has sent counts.
_CONVERSATION_HEADERS: Final = tuple(name.encode("ascii") for name in CONVERSATION_HEADERS)
#: Errors that are about the model rather than about the request.
_ABOUT_MODELS: Final = (ModelNotFound, ModelUnavailable, WrongKind, NotSupported)
_ABOUT_MODEL_CODES: Final = frozenset({"vision_not_supported", "token_ids_not_supported"})


@attrs.frozen
class AliasedBody:
    """What a request for an alias has become."""

    body: bytes
    """The body for the first model."""
    info: ModelInfo
    """The first model."""
    parsed: Any
    """The parsed body for it; ``None`` if it gets the body untouched."""
    names: tuple[str, ...]
    """All models, in the order in which they are tried."""
    _others: tuple[tuple[str, Any], ...]
    _rewrite: Callable[[str], bytes]

    def following(self, request: Request, position: int = 0) -> Callable[[], Request | None] | None:
        """Return what makes the request for the next model; see ``Request.otherwise``.

        Args:
            request: the request for the first model.
            position: how many of the other models were tried before.
        """
        if position == len(self._others):
            return None

        def make() -> Request:
            name, parsed = self._others[position]
            return attrs.evolve(
                request,
                model=name,
                body=self._rewrite(name),
                parsed=parsed,
                checked=parsed is not None,
                otherwise=self.following(request, position + 1),
            )

        return make


async def read_aliased(
    context: RequestContext,
    catalog: Catalog,
    alias: str,
    body: bytes,
    content_type: str,
    *,
    read: ReadBody,
    read_again: ReadBody,
    unfit: CheckModel,
) -> AliasedBody:
    """Return what a request for an alias becomes. A checkpoint if the body is large.

    Args:
        context: of the request.
        catalog: the models and the aliases.
        alias: one of the aliases, which the body names.
        body, content_type: of the request.
        read: reads the body for a model, and everything that it refers to.
        read_again: the same for what ``read`` has returned.
        unfit: tells whether a model takes the parsed body.

    Raises:
        ApiError: the body is not valid, or none of the models answers the request.
    """
    endpoint, table = context.endpoint, catalog.aliases.table
    assert endpoint is not None
    if not is_form(content_type):
        # With a name in the body for each model, a second one would not be found any more.
        await _work(require_one_model, body)
    rewrite = await _rewriter(body, content_type)
    refusals: list[ApiError] = []
    found = None
    for name in reachable(table, alias):
        named = rewrite(name)
        try:
            forwarded, info, parsed = await read(named)
        except ApiError as error:
            if not _is_about_model(error):
                raise
            refusals.append(error.with_traceback(None))
            continue
        if forwarded is not named:
            rewrite = await _rewriter(forwarded, content_type)
        found = info.name, parsed
        break
    if found is None:
        raise _refusal(catalog, alias, refusals)
    key: bytes | None = None
    if any(isinstance(target, Mapping) for target in table.values()):
        key = await _conversation(context, body=forwarded, content_type=content_type)
    targets: list[tuple[ModelInfo, Any]] = []
    for name in expand(table, alias, partial(_draw, context.principal.name, key)):
        try:
            if name == found[0]:
                targets.append((info, found[1]))
            else:
                targets.append(await _read_for(catalog, endpoint, name, parsed, rewrite, read_again, unfit))
        except ApiError as error:
            if not _is_about_model(error):
                raise
            refusals.append(error.with_traceback(None))
    if not targets:
        raise _refusal(catalog, alias, refusals)
    (info, parsed), *others = targets
    return AliasedBody(
        body=rewrite(info.name),
        info=info,
        parsed=parsed,
        names=tuple(each.name for each, _ in targets),
        others=tuple((each.name, other) for each, other in others),
        rewrite=rewrite,
    )


async def _read_for(
    catalog: Catalog,
    endpoint: Endpoint,
    name: str,
    parsed: Any,
    rewrite: Callable[[str], bytes],
    read_again: ReadBody,
    unfit: CheckModel,
) -> tuple[ModelInfo, Any]:
    """Return another model, and the parsed body for it, given the body that was parsed for the first one."""
    info = catalog.check(name, endpoint.kind, endpoint.name)
    if catalog.takes_untouched(name, endpoint.kind, endpoint.name) is not None:
        return info, None
    if parsed is None:
        _, info, parsed = await read_again(rewrite(name))
        return info, parsed
    if (refusal := unfit(info, parsed)) is not None:
        raise refusal
    return info, attrs.evolve(parsed, model=name, raw={**parsed.raw, "model": name})


def aliased_form(
    context: RequestContext, catalog: Catalog, alias: str, content_type: str, headers: Mapping[str, str]
) -> tuple[ModelInfo, FormRewriter]:
    """Return the model for which a large form is, and what writes its name into the form. Synchronous.

    The form is forwarded as it arrives, so there can be no second attempt: it is the first model that can be given a
    request now.

    Raises:
        ApiError: none of the models answers the request.
    """
    endpoint = context.endpoint
    assert endpoint is not None
    key = _named(context)
    draw = partial(_draw, context.principal.name, key)
    chosen: ModelInfo | None = None
    refusals: list[ApiError] = []
    for name in expand(catalog.aliases.table, alias, draw):
        try:
            info = catalog.check(name, endpoint.kind, endpoint.name)
        except ApiError as error:
            refusals.append(error.with_traceback(None))
            continue
        chosen = info if chosen is None else chosen
        request = Request(endpoint=endpoint.name, kind=endpoint.kind, model=name, body=b"", headers=headers)
        if catalog.candidates(request):
            chosen = info
            break
    if chosen is None:
        raise _refusal(catalog, alias, refusals)
    return chosen, FormRewriter(content_type, chosen.name)


def _is_about_model(error: ApiError) -> bool:
    return isinstance(error, _ABOUT_MODELS) or error.code in _ABOUT_MODEL_CODES


def _refusal(catalog: Catalog, alias: str, refusals: list[ApiError]) -> ApiError:
    """Return the error of a request for an alias for which there is no model, given those of all its models."""
    for error in refusals:
        if isinstance(error, ModelUnavailable):
            return ModelUnavailable(alias)
    for error in refusals:
        if not isinstance(error, ModelNotFound):
            return error
    return ModelNotFound(alias, catalog.listed_names(), alias=True)


async def _work(function: Callable[..., Any], body: bytes, *more: Any) -> Any:
    if len(body) < PARSE_IN_THREAD:
        return function(body, *more)
    return await run_in_thread(partial(function, body, *more), abandon_on_cancel=True)


async def _rewriter(body: bytes, content_type: str) -> Callable[[str], bytes]:
    """Return a function that returns the body with the name of a model. It is quick, also for a large body."""
    if is_form(content_type):
        return partial(rewrite_form, body, content_type)
    rewriter: JsonRewriter = await _work(JsonRewriter, body)
    return rewriter.with_model


# Weights


class _Fields(msgspec.Struct):
    """What is read of a body to find out which conversation it belongs to."""

    prompt_cache_key: Any = None
    conversation: Any = None
    messages: Any = None
    input: Any = None


_fields: Final = msgspec.json.Decoder(_Fields)


def _named(context: RequestContext) -> bytes | None:
    for name in _CONVERSATION_HEADERS:
        if value := context.header(name):
            return value
    return None


async def _conversation(context: RequestContext, body: bytes, content_type: str) -> bytes | None:
    """Return what is the same for all requests of a conversation; ``None`` if nothing is."""
    key = _named(context)
    if key is not None:
        return key
    if is_form(content_type):
        return None
    found: bytes = await _work(_conversation_in, body)
    return found


def _conversation_in(body: bytes) -> bytes:
    with suppress(msgspec.MsgspecError, ValueError, RecursionError):
        fields = _fields.decode(body)
        named = fields.conversation
        if isinstance(named, dict):
            named = named.get("id")
        for value in (fields.prompt_cache_key, named):
            if isinstance(value, str) and value:
                return value.encode("utf-8", "surrogatepass")
        for said in (fields.messages, fields.input):
            if isinstance(said, list):
                for item in said:
                    if isinstance(item, dict) and item.get("role") == "user":
                        return _content(item.get("content"))
        if isinstance(fields.input, str):
            # What it is in the list with which the conversation goes on.
            return _content(fields.input)
    return body


def _content(content: Any) -> bytes:
    """Return the content of a message, which is the same whether it was sent as text or as a list of one text."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text", content)
    return msgspec.json.encode(content)


def _draw(principal: str, key: bytes | None, alias: str) -> float:
    """Return a number from 0 to 1 that is always the same for a conversation of a principal."""
    if key is None:
        return randomness.generator.random()
    name = f"{alias}\0{principal}\0".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name + key, digest_size=7).digest()
    return int.from_bytes(digest, "big") / (1 << 56)

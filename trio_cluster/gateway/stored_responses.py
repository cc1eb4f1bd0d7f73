"""Stored responses on the path of a request: what it refers to is put in, and its answer is stored.

Theory of operation
===================

Clients of the Responses API believe that the server remembers: ``previous_response_id``, ``conversation`` and
references to items stand for what was sent or answered before. Models and workers know nothing of that. The gateway
resolves all of it before a call is opened: the body that goes on has the whole input.

The answer is stored when it is complete, and before its client can know that: the last event of a stream, or the last
byte of a plain answer, is held back until it is stored. So a client that goes on at once finds it, also on another
master. This is done by the task of the request and ends with it; a client that leaves earlier leaves nothing behind.

What is stored of a stream is what its last event says (``response.completed``, ``.incomplete`` or ``.failed``). Only
that event must not take the fast path of the tokens; all others do.

A request for a passthrough model is resolved and stored like any other. The server behind it is told not to store
anything (``store: false``): it would keep the answers of all keys together, and another replica would not find them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import attrs
import msgspec

from ..accounts.errors import StoreError
from ..core.limits import PARSE_IN_THREAD
from ..core.principal import Principal
from ..core.threads import NoThread, run_in_thread
from ..errors import ApiError, InvalidRequest
from ..openai import UNKNOWN_RESPONSE, is_reference
from ..stored.items import CONVERSATION, continued, input_items, make_record
from ..stored.record import Item, ResponseStore, owner_of

__all__ = [
    "StoredAnswer",
    "conversation_not_found",
    "database_away",
    "refuse_stored",
    "resolve",
    "response_not_found",
    "without_store",
]

logger = logging.getLogger("trio_cluster.http")

#: The states of a response in which it is over.
_OVER: Final = frozenset({"completed", "incomplete", "failed"})


# Errors, with the codes of the OpenAI API


def response_not_found(response_id: str) -> ApiError:
    """Return the error of a route that names a response that is not stored, or not for this key."""
    return InvalidRequest(f"Response with id '{response_id}' not found.", status=404)


def conversation_not_found(conversation_id: str, param: str | None = None) -> ApiError:
    """Return the error of a request that names a conversation that is not stored, or not for this key."""
    return InvalidRequest(f"Conversation with id '{conversation_id}' not found.", status=404, param=param)


def database_away() -> ApiError:
    """Return the error of a request that refers to something in a database that cannot be reached."""
    return ApiError(
        503, "The database cannot be reached; try again shortly", code="database_unavailable", retry_after=5.0
    )


def refuse_stored(raw: Mapping[str, Any]) -> None:
    """Refuse a request that refers to something stored, on a node that stores nothing.

    Raises:
        InvalidRequest: it refers to a response or a conversation.
    """
    for name in ("previous_response_id", "conversation"):
        if raw.get(name) is not None:
            raise InvalidRequest(
                f"'{name}' is not supported: nothing is stored here, send the whole conversation as 'input'",
                param=name,
                code="unsupported_value",
            )


def without_store(body: bytes, raw: Mapping[str, Any]) -> bytes:
    """Return the body of a request, which is ``raw``, with ``store`` as ``false``."""
    if "store" in raw:
        return msgspec.json.encode({**raw, "store": False})
    # The text is a JSON object that is not empty. This costs less than writing it anew.
    return b'{"store":false,' + body.lstrip()[1:]


@attrs.define(eq=False)
class StoredAnswer:
    """Stores the answer to one request when it is complete.

    Attributes:
        body: the body that is forwarded.
    """

    body: bytes
    _store: ResponseStore
    _owner: str
    _context: tuple[Item, ...]
    """What comes before the input of the request."""
    _input: str | list[Any]
    """The input of the request; stored items are in the place of references to them."""
    _changes: dict[str, Any]
    """Members of the response that the model's server may not know."""
    _conversation: str | None
    _keeps: bool
    """The response is to be stored, and not only added to its conversation."""
    _most: int
    """A larger answer is not stored: its size in bytes."""

    async def complete(self, data: bytes, member: str | None) -> None:
        """Store a response, if it is one, and it is over. Never fails because of the store.

        Args:
            data: a JSON object.
            member: where in it the response is; ``None``: it is the response.
        """
        try:
            if len(data) < PARSE_IN_THREAD and len(self.body) < PARSE_IN_THREAD:
                made = self._make(data, member)
            else:
                made = await run_in_thread(self._make, data, member, abandon_on_cancel=True)
            if made is None:
                return
            record, items = made
            kept = record if self._keeps else None
            await self._store.put_answer(self._owner, kept, self._conversation, items)
        except (StoreError, NoThread) as error:
            logger.warning("a response is not stored: %s", error)

    def _make(self, data: bytes, member: str | None) -> tuple[Any, tuple[Item, ...]] | None:
        """Return the record, and the items that are new in it; ``None`` if there is nothing to store."""
        try:
            response = msgspec.json.decode(data)
            if member is not None:
                response = response[member]
            if response["object"] != "response" or response["status"] not in _OVER:
                return None
            if response["id"] == UNKNOWN_RESPONSE:
                # It failed before it began, and no client can ask for it.
                return None
            last = self._context[-1].id if self._context else ""
            own = input_items(self._input, self._owner, last)
            record = make_record(response, (*self._context, *own), self._owner, self._changes)
        except (msgspec.MsgspecError, ValueError, RecursionError, KeyError, TypeError):
            # A server behind a passthrough model has answered with something else.
            return None
        if record is None:
            return None
        return record, (*own, *record.output)

    @property
    def is_needed(self) -> bool:
        """Whether anything of the answer is to be stored."""
        return self._keeps or self._conversation is not None

    @property
    def most(self) -> int:
        """Bytes that an answer may have to be stored."""
        return self._most


# Resolving


async def resolve(
    store: ResponseStore,
    principal: Principal,
    body: bytes,
    raw: dict[str, Any],
    *,
    untouched: bool,
    most: int,
) -> StoredAnswer | None:
    """Put what a request refers to into its body.

    Args:
        store: where that is.
        principal: who sends the request.
        body: the body as it was sent.
        raw: the body, decoded. It may not have been checked yet.
        untouched: the body goes to a server behind a passthrough model, which checks it.
        most: how many bytes an answer may have to be stored.

    Returns:
        What stores the answer, with the body that is forwarded; ``None`` if the input is none, which the server behind
        a passthrough model will say.

    Raises:
        ApiError: 400 or 404: what the request refers to is not stored; 503: the database cannot be reached.
    """
    own: Any = raw.get("input")
    if untouched and not _is_input(own):
        return None
    owner = owner_of(principal)
    try:
        context, conversation = await _find_context(store, owner, raw)
        own, changed = await _find_items(store, owner, own, context)
    except StoreError as error:
        logger.warning("a stored response cannot be read: %s", error)
        raise database_away() from None
    previous = raw.get("previous_response_id")
    keeps = raw.get("store") is not False
    if changed or previous is not None or conversation is not None:
        forwarded = {**raw, "input": _forwarded(context, own)}
        if untouched:
            forwarded |= {"store": False}
            forwarded.pop("previous_response_id", None)
            forwarded.pop("conversation", None)
        size = len(body) + sum(len(item.json) for item in context)
        encode = partial(msgspec.json.encode, forwarded)
        if size < PARSE_IN_THREAD:
            body = encode()
        else:
            body = await run_in_thread(encode, abandon_on_cancel=True)
    elif untouched and keeps:
        body = without_store(body, raw)
    changes: dict[str, Any] = {"previous_response_id": previous, "store": True}
    if conversation is not None:
        changes["conversation"] = {"id": conversation}
    return StoredAnswer(body, store, owner, context, own, changes, conversation, keeps, most)


def _is_input(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(each, dict) for each in value)
    )


async def _find_context(
    store: ResponseStore, owner: str, raw: Mapping[str, Any]
) -> tuple[tuple[Item, ...], str | None]:
    """Return the items that come before the input of a request, and the id of its conversation."""
    previous, conversation = raw.get("previous_response_id"), raw.get("conversation")
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    if isinstance(previous, str) and previous:
        if conversation is not None:
            raise InvalidRequest(
                "'previous_response_id' and 'conversation' exclude each other: give one of them",
                param="previous_response_id",
                code="mutually_exclusive_parameters",
            )
        record = None if previous.startswith(CONVERSATION) else await store.get(owner, previous)
        if record is None:
            raise InvalidRequest(
                f"Previous response with id '{previous}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return continued(record), None
    if isinstance(conversation, str) and conversation:
        record = await store.get(owner, conversation) if conversation.startswith(CONVERSATION) else None
        if record is None:
            raise conversation_not_found(conversation, "conversation")
        return record.context, conversation
    return (), None


async def _find_items(
    store: ResponseStore, owner: str, own: str | list[Any], context: tuple[Item, ...]
) -> tuple[str | list[Any], bool]:
    """Return an input with stored items in the place of references to them, and whether there were any.

    A reference to an item that comes before the input anyway is left out.
    """
    if isinstance(own, str) or not any(map(is_reference, own)):
        return own, False
    wanted = [each["id"] for each in own if is_reference(each) and isinstance(each.get("id"), str)]
    found = await store.find_items(owner, wanted)
    there = {item.id for item in context}
    resolved: list[Any] = []
    for each in own:
        if not is_reference(each) or not isinstance(each.get("id"), str):
            resolved.append(each)
        elif each["id"] not in there:
            item = found.get(each["id"])
            if item is None:
                raise InvalidRequest(
                    f"Item with id '{each['id']}' not found. Items are kept for a limited time, and not at all with "
                    "'store' as false: send the item itself. With the AI SDK, set providerOptions.openai.store to "
                    "false",
                    status=404,
                    param="input",
                )
            resolved.append(item)
    return resolved, True


def _forwarded(context: tuple[Item, ...], own: str | list[Any]) -> list[Any]:
    """Return an input with everything in it, to be encoded."""
    items = [{"role": "user", "content": own}] if isinstance(own, str) else own
    return [msgspec.Raw(each.json) if isinstance(each, Item) else each for each in (*context, *items)]

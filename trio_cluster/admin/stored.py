"""The routes of stored responses and conversations. Each key sees its own ones only.

The route that makes a response is one of a model, and is answered by the gateway; see ``gateway/stored_responses.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs
import msgspec
from quart import request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from ..core import randomness
from ..errors import ApiError, InvalidRequest
from ..gateway.context import request_context
from ..gateway.node_context import NodeContext
from ..gateway.response import JSON, Reply, json_reply
from ..gateway.routes import PREFIXES
from ..gateway.stored_responses import conversation_not_found, response_not_found
from ..openai import METADATA, check_items
from ..stored.items import CONVERSATION, input_items, whole
from ..stored.record import Item, Record, ResponseStore, owner_of
from .body import json_object
from .web import respond

__all__ = ["add_stored_routes"]

#: Items in one list: at most, and if the request does not say how many.
_MOST_LISTED: Final = 100
_LISTED: Final = 20
#: Items that one request may add to a conversation.
_MOST_ADDED: Final = 20


def add_stored_routes(app: QuartTrio, node_context: NodeContext) -> None:
    """Add the routes to an application."""
    _add_responses(app, node_context)
    _add_conversations(app, node_context)


def _add_responses(app: QuartTrio, node_context: NodeContext) -> None:
    async def find(response_id: str) -> Record:
        return await _find(node_context, response_id, response_not_found, is_conversation=False)

    async def retrieve(response_id: str) -> TrioResponse:
        record = await find(response_id)
        if request.args.get("stream", "false").lower() not in ("false", "0"):
            raise InvalidRequest(
                "A stored response is not streamed again", param="stream", code="unsupported_value"
            )
        return respond(Reply(200, [JSON], whole(record)))

    async def delete(response_id: str) -> TrioResponse:
        await _delete(node_context, response_id, response_not_found, is_conversation=False)
        return respond(json_reply({"id": response_id, "object": "response", "deleted": True}))

    async def list_input(response_id: str) -> TrioResponse:
        return respond(_list_reply((await find(response_id)).context))

    async def cancel(response_id: str) -> TrioResponse:
        await find(response_id)
        raise InvalidRequest("Cannot cancel a synchronous response.")

    for prefix in PREFIXES:
        path = f"{prefix}/responses/<response_id>"
        app.add_url_rule(path, f"{prefix}response", retrieve, methods=["GET"])
        app.add_url_rule(path, f"{prefix}delete_response", delete, methods=["DELETE"])
        app.add_url_rule(f"{path}/input_items", f"{prefix}input_items", list_input, methods=["GET"])
        app.add_url_rule(f"{path}/cancel", f"{prefix}cancel_response", cancel, methods=["POST"])


def _add_conversations(app: QuartTrio, node_context: NodeContext) -> None:
    async def find(conversation_id: str) -> Record:
        return await _find(node_context, conversation_id, conversation_not_found, is_conversation=True)

    async def create() -> TrioResponse:
        body, store, owner = await json_object(), _store(node_context), _owner()
        conversation_id = CONVERSATION + randomness.token(16)
        head = {
            "id": conversation_id,
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": _metadata(body) or {},
        }
        items = _new_items(body, owner, "", required=False)
        if not await store.put(owner, Record(conversation_id, msgspec.json.encode(head), items)):
            raise ApiError(503, "The conversation cannot be stored at the moment", code="not_stored")
        return respond(json_reply(head))

    async def retrieve(conversation_id: str) -> TrioResponse:
        return respond(Reply(200, [JSON], (await find(conversation_id)).head))

    async def change(conversation_id: str) -> TrioResponse:
        body, record = await json_object(), await find(conversation_id)
        head = msgspec.json.decode(record.head) | {"metadata": _metadata(body) or {}}
        encoded = msgspec.json.encode(head)
        await _change(node_context, record.id, lambda found: attrs.evolve(found, head=encoded))
        return respond(json_reply(head))

    async def delete(conversation_id: str) -> TrioResponse:
        await _delete(node_context, conversation_id, conversation_not_found, is_conversation=True)
        deleted = {"id": conversation_id, "object": "conversation.deleted", "deleted": True}
        return respond(json_reply(deleted))

    async def list_items(conversation_id: str) -> TrioResponse:
        return respond(_list_reply((await find(conversation_id)).context))

    async def add_items(conversation_id: str) -> TrioResponse:
        body, owner, record = await json_object(), _owner(), await find(conversation_id)
        last = record.context[-1].id if record.context else ""
        items = _new_items(body, owner, last, required=True)
        if not await _store(node_context).extend(owner, conversation_id, items):
            raise ApiError(503, "The items cannot be stored at the moment", code="not_stored")
        return respond(_list_of(items, has_more=False))

    async def retrieve_item(conversation_id: str, item_id: str) -> TrioResponse:
        for item in (await find(conversation_id)).context:
            if item.id == item_id:
                return respond(Reply(200, [JSON], item.json))
        raise _item_not_found(item_id)

    async def delete_item(conversation_id: str, item_id: str) -> TrioResponse:
        record = await find(conversation_id)
        if not any(item.id == item_id for item in record.context):
            raise _item_not_found(item_id)

        def without(found: Record) -> Record:
            return attrs.evolve(found, context=tuple(item for item in found.context if item.id != item_id))

        await _change(node_context, record.id, without)
        return respond(Reply(200, [JSON], record.head))

    for prefix in PREFIXES:
        path = f"{prefix}/conversations"
        for name, rule, view, method in (
            ("create_conversation", path, create, "POST"),
            ("conversation", f"{path}/<conversation_id>", retrieve, "GET"),
            ("change_conversation", f"{path}/<conversation_id>", change, "POST"),
            ("delete_conversation", f"{path}/<conversation_id>", delete, "DELETE"),
            ("conversation_items", f"{path}/<conversation_id>/items", list_items, "GET"),
            ("add_conversation_items", f"{path}/<conversation_id>/items", add_items, "POST"),
            ("conversation_item", f"{path}/<conversation_id>/items/<item_id>", retrieve_item, "GET"),
            ("delete_conversation_item", f"{path}/<conversation_id>/items/<item_id>", delete_item, "DELETE"),
        ):
            app.add_url_rule(rule, prefix + name, view, methods=[method])


def _owner() -> str:
    return owner_of(request_context(request.scope).principal)


def _store(node_context: NodeContext) -> ResponseStore:
    store = node_context.responses
    if store is None or not store.enabled:
        raise InvalidRequest("Nothing is stored here", code="unsupported_value")
    return store


async def _find(
    node_context: NodeContext,
    record_id: str,
    not_found: Callable[[str], ApiError],
    *,
    is_conversation: bool,
) -> Record:
    store = node_context.responses
    record = None
    if store is not None and store.enabled and record_id.startswith(CONVERSATION) == is_conversation:
        record = await store.get(_owner(), record_id)
    if record is None:
        raise not_found(record_id)
    return record


async def _delete(
    node_context: NodeContext,
    record_id: str,
    not_found: Callable[[str], ApiError],
    *,
    is_conversation: bool,
) -> None:
    store = node_context.responses
    if store is None or record_id.startswith(CONVERSATION) != is_conversation:
        raise not_found(record_id)
    if not await store.delete(_owner(), record_id):
        raise not_found(record_id)


async def _change(node_context: NodeContext, record_id: str, change: Callable[[Record], Record]) -> None:
    if not await _store(node_context).change(_owner(), record_id, change):
        raise ApiError(503, "The conversation cannot be stored at the moment", code="not_stored")


def _item_not_found(item_id: str) -> ApiError:
    return InvalidRequest(f"Item with id '{item_id}' not found.", status=404)


def _metadata(body: Mapping[str, Any]) -> dict[str, Any] | None:
    metadata: dict[str, Any] | None = body.get("metadata")
    if metadata is not None:
        METADATA(metadata, "metadata")
    return metadata


def _new_items(body: Mapping[str, Any], owner: str, after: str, *, required: bool) -> tuple[Item, ...]:
    """Return the items in the body of a request."""
    given = body.get("items")
    if given is None and not required:
        return ()
    if given is None:
        raise InvalidRequest("Missing required field: 'items'", param="items")
    check_items(given, "items")
    if len(given) > _MOST_ADDED:
        raise InvalidRequest(f"'items' has more than {_MOST_ADDED} items", param="items")
    return input_items(given, owner, after)


def _list_reply(items: tuple[Item, ...]) -> Reply:
    """Return the part of a list that the query of the current request asks for.

    Raises:
        InvalidRequest: ``limit`` or ``order`` is not valid, or there is no item ``after`` which to begin.
    """
    try:
        limit = int(request.args.get("limit", _LISTED))
    except ValueError:
        limit = 0
    if not 1 <= limit <= _MOST_LISTED:
        raise InvalidRequest(f"'limit' must be a whole number from 1 to {_MOST_LISTED}", param="limit")
    order = request.args.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("'order' must be 'asc' or 'desc'", param="order")
    listed = list(items if order == "asc" else reversed(items))
    after = request.args.get("after")
    if after is not None:
        places = [place for place, item in enumerate(listed) if item.id == after]
        if not places:
            raise InvalidRequest(f"There is no item with id '{after}'", param="after")
        listed = listed[places[0] + 1 :]
    return _list_of(listed[:limit], has_more=len(listed) > limit)


def _list_of(items: Iterable[Item], *, has_more: bool) -> Reply:
    items = list(items)
    return json_reply(
        {
            "object": "list",
            "data": [msgspec.Raw(item.json) for item in items],
            "first_id": items[0].id if items else None,
            "last_id": items[-1].id if items else None,
            "has_more": has_more,
        }
    )

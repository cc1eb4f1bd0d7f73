"""The items of inputs and outputs, as they are stored: complete, each with an id.

Clients give most items of an input no id. Such an item gets one that follows from its content and from the id of the
item before it. So a client that sends a whole conversation again, and a little more, makes the same items again, and
nothing of them is stored twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from ..openai.json_values import dumps
from .record import Item, Record

__all__ = ["CONVERSATION", "continued", "input_items", "make_record", "whole"]

#: The beginning of the id of a conversation. No response has such an id.
CONVERSATION: Final = "conv_"

#: The beginnings of the ids of items, by type.
_PREFIXES: Final = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
#: A longer id than any that is given to an item here, or by servers that are known.
_LONGEST_ID: Final = 256
_DIGEST: Final = 16


def input_items(value: str | list[Any], owner: str, after: str = "") -> tuple[Item, ...]:
    """Return the items of an input, which has been checked.

    Args:
        value: the field ``input``, or a list in which some items are stored ones already.
        owner: makes the ids of different owners different.
        after: the id of the item before them; empty if there is none.
    """
    given = [{"role": "user", "content": value}] if isinstance(value, str) else value
    items = []
    for each in given:
        item = each if isinstance(each, Item) else _make_item(each, owner, after)
        after = item.id
        items.append(item)
    return tuple(items)


def make_record(
    response: Mapping[str, Any], context: Iterable[Item], owner: str, changes: Mapping[str, Any]
) -> Record | None:
    """Return the record of a response; ``None`` if it is no complete response object.

    Args:
        response: the object.
        context: its whole input.
        owner: who has asked for it.
        changes: members in which what is stored differs from ``response``.
    """
    response_id, output = response.get("id"), response.get("output")
    if not isinstance(response_id, str) or not _is_id(response_id) or response_id.startswith(CONVERSATION):
        return None
    if not isinstance(output, list) or not all(isinstance(each, dict) for each in output):
        return None
    head = _kept(dumps({**response, **changes, "output": None}))
    return Record(response_id, head, tuple(context), input_items(output, owner, response_id))


def whole(record: Record) -> bytes:
    """Return a response with its output, as JSON."""
    head = msgspec.json.decode(record.head)
    head["output"] = [msgspec.Raw(item.json) for item in record.output]
    return msgspec.json.encode(head)


def continued(record: Record) -> tuple[Item, ...]:
    """Return the items that the next input continues: the context of a record, and its output."""
    return record.context + record.output


def _make_item(given: dict[str, Any], owner: str, after: str) -> Item:
    """Return an item with the members that clients may leave out."""
    kind = given.get("type")
    if not isinstance(kind, str):
        kind = "message"
    item = given | {"type": kind}
    if kind == "message":
        content = given.get("content")
        if isinstance(content, str):
            is_answer = given.get("role") == "assistant"
            part = {"type": "output_text", "annotations": []} if is_answer else {"type": "input_text"}
            content = [part | {"text": content}]
        item = {"status": "completed"} | item | {"content": content}
    item_id = item.pop("id", None)
    if not _is_id(item_id):
        text = b"\n".join((owner.encode(), after.encode(), dumps(item)))
        digest = hashlib.blake2b(text, digest_size=_DIGEST).hexdigest()
        item_id = f"{_PREFIXES.get(kind, 'item')}_{digest}"
    return Item(item_id, _kept(dumps({"id": item_id} | item)))


def _kept(text: bytes) -> bytes:
    """Return a copy that takes no more memory than it has bytes: the encoder allocates more, and keeps it."""
    return bytes(memoryview(text))


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_ID and value.isprintable()

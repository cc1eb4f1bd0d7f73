"""The content of requests to ``/v1/messages``, translated into the messages of a chat.

Theory of operation
===================

In the Messages API, a message is a list of blocks, and the result of a tool is a block in a message of the user. In a
chat, a result is a message of its own, behind the message with the calls. So one message of the user becomes the
messages of its results, and one with the rest; the results come first, whatever their place in the message, because
nothing may stand between a call and its result.

What a chat has no form for is kept beside what the model reads:

- *Thinking.* An assistant's message has the text of its thinking blocks as ``reasoning_content``, and the blocks
  themselves, with signatures and encrypted data as they came, as ``thinking_blocks``.
- *Errors of tools.* The message of a result with ``is_error`` has this member, too. Its text is not changed.

Files that would have to be fetched from elsewhere are refused, since without them it would be another conversation. So
are the blocks of tools that only the server could have run. ``cache_control`` and everything else that changes nothing
about the conversation stays in the request as it was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import attrs

from ..json_values import dumps
from .checks import (
    ANY_OBJECT,
    ANY_STRING,
    BOOLEAN,
    NOT_EMPTY,
    Check,
    Custom,
    ObjectOf,
    OneOf,
    missing,
    nothing_in,
    wrong_type,
)
from .responses_api_input import of_type, unsupported
from .schemas import Schema, any_of, members_of, or_null

__all__ = ["CONVERSATION", "SYSTEM"]

_Object: TypeAlias = dict[str, Any]
_Content: TypeAlias = "str | list[_Object]"

#: Between the texts of several blocks that become one text.
_BETWEEN: Final = "\n\n"


@attrs.frozen
class _Block:
    """One type of block.

    Attributes:
        check: the check of such a block; its type is known.
        schema: what the check takes, without the type.
        convert: returns the parts of a chat's message that say the same.
    """

    check: Callable[[Any, str], object]
    schema: Schema
    convert: Callable[[_Object], list[_Object]] = lambda block: []


def _text_part(text: str) -> _Object:
    return {"type": "text", "text": text}


# Sources of images and documents

_BASE64: Final = ObjectOf({"media_type": NOT_EMPTY, "data": NOT_EMPTY}, ("media_type", "data"))
_URL: Final = ObjectOf({"url": NOT_EMPTY}, ("url",))
_PLAIN: Final = ObjectOf({"media_type": ANY_STRING, "data": ANY_STRING}, ("data",))
_TYPED: Final = ObjectOf({"type": ANY_STRING}, ("type",))


def _check_source(block: _Object, name: str, known: Mapping[str, Callable[[Any, str], object]]) -> None:
    if block.get("source") is None:
        raise missing(f"{name}.source")
    source, name = block["source"], f"{name}.source"
    kind = _TYPED(source, name)["type"]
    if kind in ("file", "url") and kind not in known:
        raise unsupported(
            f"'{name}' of type '{kind}' is not supported: files are neither kept nor fetched here, send the content "
            "itself",
            f"{name}.type",
        )
    known[OneOf(tuple(known))(kind, f"{name}.type")](source, name)


def _sources(known: Mapping[str, Schema]) -> Schema:
    return members_of({"source": any_of(*(of_type(kind, each) for kind, each in known.items()))}, ("source",))


def _data_url(source: _Object) -> str:
    return f"data:{source['media_type']};base64,{source['data']}"


def _check_image(block: _Object, name: str) -> None:
    _check_source(block, name, {"base64": _BASE64, "url": _URL})


def _convert_image(block: _Object) -> list[_Object]:
    source = block["source"]
    url = _data_url(source) if source["type"] == "base64" else source["url"]
    return [{"type": "image_url", "image_url": {"url": url}}]


_TEXT: Final = ObjectOf({"text": ANY_STRING}, ("text",))
_TEXT_BLOCK: Final = _Block(_TEXT, _TEXT.schema(), lambda block: [_text_part(block["text"])])
_IMAGE_BLOCK: Final = _Block(
    _check_image, _sources({"base64": _BASE64.schema(), "url": _URL.schema()}), _convert_image
)


def _check_blocks(value: Any, name: str, known: Mapping[str, _Block], *, least: int = 0) -> None:
    """Check a list of blocks."""
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of blocks", value)
    if len(value) < least:
        raise nothing_in(name, "block")
    for i, block in enumerate(value):
        if not isinstance(block, dict):
            raise wrong_type(f"{name}[{i}]", "an object", block)
        if block.get("type") is None:
            raise missing(f"{name}[{i}].type")
        kind = OneOf(tuple(known))(block["type"], f"{name}[{i}].type")
        known[kind].check(block, f"{name}[{i}]")


def _blocks_schema(known: Mapping[str, _Block], least: int = 0) -> Schema:
    items = any_of(*(of_type(kind, each.schema) for kind, each in known.items()))
    return {"type": "array", "items": items} | ({"minItems": least} if least else {})


def _parts(value: Any, known: Mapping[str, _Block]) -> list[_Object]:
    """Return the content of something as parts of a chat's message."""
    if isinstance(value, str):
        return [_text_part(value)]
    return [part for block in value or () for part in known[block["type"]].convert(block)]


def _content(parts: list[_Object]) -> _Content:
    """Return parts as the content of a message: as text, if one text can express them."""
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


# Documents

#: What may be inside of a document.
_INNER: Final = {"text": _TEXT_BLOCK, "image": _IMAGE_BLOCK}
_ABOUT: Final = ObjectOf({"title": ANY_STRING, "context": ANY_STRING})


def _check_inner(source: _Object, name: str) -> None:
    content = source.get("content")
    if content is None:
        raise missing(f"{name}.content")
    if not isinstance(content, str):
        _check_blocks(content, f"{name}.content", _INNER)


def _check_document(block: _Object, name: str) -> None:
    _ABOUT(block, name)
    _check_source(block, name, {"text": _PLAIN, "base64": _BASE64, "content": _check_inner})


def _convert_document(block: _Object) -> list[_Object]:
    """Return a document as text, under its title; one that is a file (PDF) as a file."""
    source, title = block["source"], block.get("title")
    above = [_text_part(text) for text in (title, block.get("context")) if text]
    if source["type"] == "base64":
        file = {"file_data": _data_url(source)} | ({"filename": title} if title else {})
        return [*above[bool(title) :], {"type": "file", "file": file}]
    inner = [_text_part(source["data"])] if source["type"] == "text" else _parts(source["content"], _INNER)
    parts = [*above, *inner]
    if all(part["type"] == "text" for part in parts):
        return [_text_part(_BETWEEN.join(part["text"] for part in parts))]
    return parts


def _with(schema: Schema, more: Mapping[str, Schema]) -> Schema:
    return schema | {"properties": schema.get("properties", {}) | more}


_DOCUMENT_BLOCK: Final = _Block(
    _check_document,
    _with(
        _sources(
            {
                "text": _PLAIN.schema(),
                "base64": _BASE64.schema(),
                "content": members_of(
                    {"content": any_of(ANY_STRING.schema(), _blocks_schema(_INNER))}, ("content",)
                ),
            }
        ),
        _ABOUT.schema()["properties"],
    ),
    _convert_document,
)


# What a search of the client has found

_SEARCH: Final = ObjectOf({"source": ANY_STRING, "title": ANY_STRING}, ("source", "title", "content"))
_TEXTS: Final = {"text": _TEXT_BLOCK}


def _check_search(block: _Object, name: str) -> None:
    _SEARCH(block, name)
    _check_blocks(block["content"], f"{name}.content", _TEXTS)


def _convert_search(block: _Object) -> list[_Object]:
    texts = [block["title"], block["source"], *(each["text"] for each in block["content"])]
    return [_text_part(_BETWEEN.join(text for text in texts if text))]


_SEARCH_BLOCK: Final = _Block(
    _check_search,
    members_of(
        {"source": ANY_STRING.schema(), "title": ANY_STRING.schema(), "content": _blocks_schema(_TEXTS)},
        ("source", "title", "content"),
    ),
    _convert_search,
)


# Results of tools

_TOOL_NAME: Final = ObjectOf({"tool_name": NOT_EMPTY}, ("tool_name",))
#: What may be in the result of a tool.
_RESULT_BLOCKS: Final = {
    "text": _TEXT_BLOCK,
    "image": _IMAGE_BLOCK,
    "document": _DOCUMENT_BLOCK,
    "search_result": _SEARCH_BLOCK,
    # What a search for tools has found.
    "tool_reference": _Block(_TOOL_NAME, _TOOL_NAME.schema(), lambda block: [_text_part(block["tool_name"])]),
}
_RESULT: Final = ObjectOf({"tool_use_id": NOT_EMPTY, "is_error": BOOLEAN}, ("tool_use_id",))


def _check_result(block: _Object, name: str) -> None:
    _RESULT(block, name)
    content = block.get("content")
    if content is not None and not isinstance(content, str):
        _check_blocks(content, f"{name}.content", _RESULT_BLOCKS)


def _result_message(block: _Object) -> _Object:
    content = _content(_parts(block.get("content"), _RESULT_BLOCKS))
    message: _Object = {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}
    return message | {"is_error": True} if block.get("is_error") else message


_RESULT_BLOCK: Final = _Block(
    _check_result,
    _with(
        _RESULT.schema(),
        {"content": or_null(any_of(ANY_STRING.schema(), _blocks_schema(_RESULT_BLOCKS)))},
    ),
)


# Messages

_USER_BLOCKS: Final = {
    "text": _TEXT_BLOCK,
    "image": _IMAGE_BLOCK,
    "document": _DOCUMENT_BLOCK,
    "search_result": _SEARCH_BLOCK,
    "tool_result": _RESULT_BLOCK,
}


def _plain_block(members: Mapping[str, Check], required: tuple[str, ...]) -> _Block:
    check = ObjectOf(members, required)
    return _Block(check, check.schema())


_ASSISTANT_BLOCKS: Final = {
    "text": _TEXT_BLOCK,
    "tool_use": _plain_block(
        {"id": NOT_EMPTY, "name": NOT_EMPTY, "input": ANY_OBJECT}, ("id", "name", "input")
    ),
    # Servers other than Anthropic's sign nothing.
    "thinking": _plain_block({"thinking": ANY_STRING, "signature": ANY_STRING}, ("thinking",)),
    "redacted_thinking": _plain_block({"data": ANY_STRING}, ("data",)),
}
_THINKING: Final = ("thinking", "redacted_thinking")

#: The blocks of each role, and how many a message must have.
_ROLES: Final[dict[str, tuple[Mapping[str, _Block], int]]] = {
    "user": (_USER_BLOCKS, 1),
    "assistant": (_ASSISTANT_BLOCKS, 0),
    "system": (_TEXTS, 1),
}
_ROLE: Final = OneOf(tuple(_ROLES))


def _check_conversation(value: Any, name: str) -> None:
    if not isinstance(value, list):
        raise wrong_type(name, "an array", value)
    if not value:
        raise nothing_in(name, "message")
    for i, message in enumerate(value):
        _check_message(message, f"{name}[{i}]")


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise wrong_type(name, "an object", message)
    if message.get("role") is None:
        raise missing(f"{name}.role")
    known, least = _ROLES[_ROLE(message["role"], f"{name}.role")]
    content = message.get("content")
    if content is None:
        raise missing(f"{name}.content")
    if not isinstance(content, str):
        _check_blocks(content, f"{name}.content", known, least=least)


def _convert_conversation(value: list[_Object]) -> list[_Object]:
    messages: list[_Object] = []
    for message in value:
        content = message["content"]
        if isinstance(content, str):
            messages.append({"role": message["role"], "content": content})
        elif message["role"] == "user":
            messages += _user_messages(content)
        elif message["role"] == "system":
            messages.append({"role": "system", "content": _joined(content)})
        else:
            messages.append(_assistant_message(content))
    return messages


def _user_messages(blocks: list[_Object]) -> list[_Object]:
    messages = [_result_message(block) for block in blocks if block["type"] == "tool_result"]
    others = [block for block in blocks if block["type"] != "tool_result"]
    if others:
        messages.append({"role": "user", "content": _content(_parts(others, _USER_BLOCKS))})
    return messages


def _assistant_message(blocks: list[_Object]) -> _Object:
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    calls = [block for block in blocks if block["type"] == "tool_use"]
    thinking = [block for block in blocks if block["type"] in _THINKING]
    message: _Object = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    if thinking:
        if text := "".join(block.get("thinking", "") for block in thinking):
            message["reasoning_content"] = text
        message["thinking_blocks"] = thinking
    if calls:
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": dumps(call["input"]).decode()},
            }
            for call in calls
        ]
    return message


def _joined(value: Any) -> str:
    return value if isinstance(value, str) else _BETWEEN.join(block["text"] for block in value)


def _check_system(value: Any, name: str) -> None:
    if not isinstance(value, str):
        _check_blocks(value, name, _TEXTS)


def _message_schema() -> Schema:
    variants = []
    for role, (known, least) in _ROLES.items():
        content = any_of(ANY_STRING.schema(), _blocks_schema(known, least))
        variants.append(
            members_of({"role": {"type": "string", "enum": [role]}, "content": content}, ("role", "content"))
        )
    return any_of(*variants)


#: The field ``messages``; it is read into the messages of a chat.
CONVERSATION: Final = Custom(
    _check_conversation,
    {"type": "array", "items": _message_schema(), "minItems": 1},
    _convert_conversation,
)

#: The field ``system``; it is read into one text.
SYSTEM: Final = Custom(_check_system, any_of(ANY_STRING.schema(), _blocks_schema(_TEXTS)), _joined)

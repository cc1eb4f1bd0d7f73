"""The input of a response, translated into the messages of a chat.

A handler gets one form of conversation, by whichever route it came. The two forms differ in one point. In a chat, an
assistant's message has everything in it: reasoning, text, tool calls. In a response, each of these is an item. So
consecutive items of the assistant become one message, as long as a chat could have them in one: the items into which an
answer of a model was split are joined again when the client sends them back.

References to stored items never come here: the gateway has put the items in their place, or they are refused. Items of
other types belong to tools that the server would have to run. They are refused, since without them it would be another
conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from trio_cluster.errors import InvalidRequest

from ..tool_names import flat_name
from .checks import (
    ANY_STRING,
    NOT_EMPTY,
    Custom,
    ListOf,
    ObjectOf,
    OneOf,
    missing,
    nothing_in,
    shown_name,
    wrong_type,
    wrong_value,
)
from .schemas import Schema, any_of, members_of

__all__ = ["INPUT", "ItemReferenced", "check_items", "is_reference", "of_type", "present", "unsupported"]

_ROLE: Final = OneOf(("user", "assistant", "system", "developer"))


#: ``check(value, name)`` raises ``InvalidRequest`` for a wrong value.
_Check: TypeAlias = Callable[[Any, str], object]


def unsupported(message: str, name: str) -> InvalidRequest:
    """Return the error for a feature of the API that this server does not have."""
    return InvalidRequest(message, param=name, code="unsupported_value")


class ItemReferenced(InvalidRequest):
    """An item of the input is only the id of a stored one. The gateway puts that in its place, if it stores any."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"'{name}' refers to an item, and nothing is stored here: send the item itself. With the AI SDK, set "
            "providerOptions.openai.store to false, or use openai.chat(...), which asks /v1/chat/completions",
            param=f"{name}.id",
            code="unsupported_value",
        )


def is_reference(item: Any) -> bool:
    """Return whether an item of an input is only the id of a stored one."""
    return isinstance(item, dict) and _type_of(item) == "item_reference"


def present(given: dict[str, Any], members: Iterable[str]) -> dict[str, Any]:
    """Return those of the members that an object has; ``null`` is the same as absent."""
    return {member: given[member] for member in members if given.get(member) is not None}


# Parts of a message

_PART_TEXT: Final = ObjectOf({"text": ANY_STRING}, ("text",))
_PART_REFUSAL: Final = ObjectOf({"refusal": ANY_STRING}, ("refusal",))
_PART_IMAGE: Final = ObjectOf({"image_url": NOT_EMPTY, "detail": ANY_STRING})
_PART_FILE: Final = ObjectOf({"file_data": NOT_EMPTY, "filename": ANY_STRING})
_PART_AUDIO: Final = ObjectOf(
    {"input_audio": ObjectOf({"data": ANY_STRING, "format": ANY_STRING}, ("data", "format"))},
    ("input_audio",),
)


def _require_content(part: dict[str, Any], name: str, member: str) -> None:
    """Refuse a part that refers to its content, instead of having it."""
    for elsewhere in ("file_id", "file_url"):
        if part.get(elsewhere) is not None:
            raise unsupported(
                f"'{name}.{elsewhere}' is not supported: files are neither kept nor fetched here, "
                f"send the content itself as '{member}'",
                f"{name}.{elsewhere}",
            )
    if part.get(member) is None:
        raise missing(f"{name}.{member}")


def _check_image(part: dict[str, Any], name: str) -> None:
    _require_content(part, name, "image_url")
    _PART_IMAGE(part, name)


def _convert_image(part: dict[str, Any]) -> dict[str, Any]:
    image = {"url": part["image_url"]} | present(part, ("detail",))
    return {"type": "image_url", "image_url": image}


def _check_file(part: dict[str, Any], name: str) -> None:
    _require_content(part, name, "file_data")
    _PART_FILE(part, name)


def _convert_file(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "file", "file": present(part, ("file_data", "filename"))}


def _convert_text(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "text", "text": part["text"]}


def _convert_refusal(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "refusal", "refusal": part["refusal"]}


def _convert_audio(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": part["input_audio"]}


_Convert: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
#: For each type of part, its check and its conversion into a part of a chat's message.
_PARTS: Final[dict[str, tuple[_Check, _Convert]]] = {
    "input_text": (_PART_TEXT, _convert_text),
    "output_text": (_PART_TEXT, _convert_text),
    "refusal": (_PART_REFUSAL, _convert_refusal),
    "input_image": (_check_image, _convert_image),
    "input_file": (_check_file, _convert_file),
    "input_audio": (_PART_AUDIO, _convert_audio),
}
_PART_TYPE: Final = OneOf(tuple(_PARTS))


def _check_content(value: Any, name: str) -> None:
    """Check the content of a message: a string, or a list of parts."""
    if value is None:
        raise missing(name)
    if isinstance(value, str):
        return
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of parts", value)
    if not value:
        raise nothing_in(name, "part")
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise wrong_type(f"{name}[{i}]", "an object", part)
        if part.get("type") is None:
            raise missing(f"{name}[{i}].type")
        check, _ = _PARTS[_PART_TYPE(part["type"], f"{name}[{i}].type")]
        check(part, f"{name}[{i}]")


def _convert_content(
    value: str | list[dict[str, Any]], *, joined: bool = False
) -> str | list[dict[str, Any]]:
    """Return the content of a message: text where one text can express it, or else the parts of a chat's message.

    Args:
        value: a string, or a list of parts.
        joined: join several parts that are text to one text.
    """
    if isinstance(value, str):
        return value
    parts = []
    for part in value:
        _, convert = _PARTS[part["type"]]
        parts.append(convert(part))
    if (joined or len(parts) == 1) and all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


# Items

_CALL: Final = ObjectOf(
    {"call_id": NOT_EMPTY, "name": NOT_EMPTY, "arguments": ANY_STRING, "namespace": NOT_EMPTY},
    ("call_id", "name", "arguments"),
)
_CUSTOM_CALL: Final = ObjectOf(
    {"call_id": NOT_EMPTY, "name": NOT_EMPTY, "input": ANY_STRING, "namespace": NOT_EMPTY},
    ("call_id", "name", "input"),
)
_OUTPUT: Final = ObjectOf({"call_id": NOT_EMPTY}, ("call_id", "output"))
_REFERENCE: Final = ObjectOf({"id": NOT_EMPTY}, ("id",))
_TEXTS: Final = ListOf(_PART_TEXT)
_REASONING: Final = ObjectOf({"content": _TEXTS, "summary": _TEXTS})


def _check_message(item: dict[str, Any], name: str) -> None:
    if item.get("role") is None:
        raise missing(f"{name}.role")
    _ROLE(item["role"], f"{name}.role")
    _check_content(item.get("content"), f"{name}.content")


def _check_output(item: dict[str, Any], name: str) -> None:
    _OUTPUT(item, name)
    _check_content(item["output"], f"{name}.output")


class _Conversation:
    """The messages so far, made of items that have been checked.

    ``_answer`` is the assistant's message that the next items may be added to, and ``_reasoning`` the text of reasoning
    items that no message has taken yet.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._answer: dict[str, Any] | None = None
        self._reasoning = ""

    def add_message(self, item: dict[str, Any]) -> None:
        role = item["role"]
        content = _convert_content(item["content"], joined=role == "assistant")
        if role != "assistant":
            self.end_answer()
            self.messages.append({"role": role, "content": content})
            return
        answer = self._answer
        if answer is not None and "tool_calls" in answer and isinstance(content, str):
            earlier = answer["content"]
            if earlier is None or isinstance(earlier, str):
                # Text after a call whose result has not come yet: in a chat, both are in one message.
                self._open_answer()["content"] = (earlier or "") + content
                return
        if answer is not None:
            self._answer = None
        self._open_answer()["content"] = content

    def add_call(self, item: dict[str, Any]) -> None:
        name = flat_name(item.get("namespace"), item["name"])
        if item["type"] == "custom_tool_call":
            call = {"type": "custom", "custom": {"name": name, "input": item["input"]}}
        else:
            call = {"type": "function", "function": {"name": name, "arguments": item["arguments"]}}
        self._open_answer().setdefault("tool_calls", []).append({"id": item["call_id"]} | call)

    def add_output(self, item: dict[str, Any]) -> None:
        self.end_answer()
        content = _convert_content(item["output"])
        self.messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})

    def add_reasoning(self, item: dict[str, Any]) -> None:
        self._reasoning += "".join(part["text"] for part in item.get("content") or item.get("summary") or ())

    def end_answer(self) -> None:
        """Let the next item of the assistant begin a new message."""
        if self._reasoning:
            # Nothing followed it: the model was cut off while it was reasoning.
            self._answer = None
            self._open_answer()["content"] = ""
        self._answer = None

    def _open_answer(self) -> dict[str, Any]:
        """Return the assistant's message that items are added to, with the reasoning that came before it."""
        answer = self._answer
        if answer is None:
            answer = self._answer = {"role": "assistant", "content": None}
            self.messages.append(answer)
        if self._reasoning:
            answer["reasoning_content"] = answer.get("reasoning_content", "") + self._reasoning
            self._reasoning = ""
        return answer


#: For each type of item, its check, and what adds it to a conversation.
_ITEMS: Final[dict[str, tuple[_Check, Callable[[_Conversation, dict[str, Any]], None]]]] = {
    "message": (_check_message, _Conversation.add_message),
    "function_call": (_CALL, _Conversation.add_call),
    "function_call_output": (_check_output, _Conversation.add_output),
    "custom_tool_call": (_CUSTOM_CALL, _Conversation.add_call),
    "custom_tool_call_output": (_check_output, _Conversation.add_output),
    "reasoning": (_REASONING, _Conversation.add_reasoning),
}


def _type_of(item: dict[str, Any]) -> Any:
    """Return the type of an item, which the API allows to be left out."""
    kind = item.get("type")
    if kind is not None:
        return kind
    # A bare id is a reference.
    return "item_reference" if "role" not in item and "id" in item else "message"


def _check_item(item: Any, name: str) -> None:
    if not isinstance(item, dict):
        raise wrong_type(name, "an object", item)
    kind = _type_of(item)
    if not isinstance(kind, str):
        raise wrong_type(f"{name}.type", "a string", kind)
    if kind in _ITEMS:
        check, _ = _ITEMS[kind]
        check(item, name)
    elif kind == "item_reference":
        _REFERENCE(item, name)
        raise ItemReferenced(name)
    else:
        known = ", ".join(f"'{each}'" for each in _ITEMS)
        raise unsupported(
            f"'{name}' is an item of a type that is not supported: expected one of {known}, "
            f"but got '{shown_name(kind)}'",
            f"{name}.type",
        )


def _check_input(value: Any, name: str) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of items", value)
    if not value:
        raise wrong_value(name, "at least 1 item", value)
    check_items(value, name)


def check_items(value: Any, name: str) -> None:
    """Check a list of items that is not the input of a request, but may become a part of one.

    Raises:
        InvalidRequest: it is no list, or an item is not valid.
    """
    if not isinstance(value, list):
        raise wrong_type(name, "an array of items", value)
    for i, item in enumerate(value):
        _check_item(item, f"{name}[{i}]")


def _convert_input(value: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    conversation = _Conversation()
    for item in value:
        _, add = _ITEMS[_type_of(item)]
        add(conversation, item)
    conversation.end_answer()
    return conversation.messages


# Descriptions


def of_type(kind: str, schema: Schema, members: Schema | None = None) -> Schema:
    """Return the schema of an object of a type, with ``members`` added to those of ``schema``."""
    properties = {"type": {"type": "string", "enum": [kind]}} | schema.get("properties", {}) | (members or {})
    return schema | {"properties": properties, "required": ["type", *schema.get("required", ())]}


def _content_schema() -> Schema:
    nowhere_else: Schema = {"file_id": {"type": "null"}, "file_url": {"type": "null"}}
    part = any_of(
        of_type("input_text", _PART_TEXT.schema()),
        of_type("output_text", _PART_TEXT.schema()),
        of_type("refusal", _PART_REFUSAL.schema()),
        of_type("input_image", ObjectOf(_PART_IMAGE.members, ("image_url",)).schema(), nowhere_else),
        of_type("input_file", ObjectOf(_PART_FILE.members, ("file_data",)).schema(), nowhere_else),
        of_type("input_audio", _PART_AUDIO.schema()),
    )
    return any_of({"type": "string"}, {"type": "array", "items": part, "minItems": 1})


def _input_schema() -> Schema:
    content = _content_schema()
    message = members_of(
        {"type": {"type": "string", "enum": ["message"]}, "role": _ROLE.schema(), "content": content},
        ("role", "content"),
    )
    item = any_of(
        message,
        of_type("function_call", _CALL.schema()),
        of_type("function_call_output", _OUTPUT.schema(), {"output": content}),
        of_type("custom_tool_call", _CUSTOM_CALL.schema()),
        of_type("custom_tool_call_output", _OUTPUT.schema(), {"output": content}),
        of_type("reasoning", _REASONING.schema()),
    )
    return any_of({"type": "string"}, {"type": "array", "items": item, "minItems": 1})


#: The field ``input``; it is read into a list of a chat's messages.
INPUT: Final = Custom(_check_input, _input_schema(), _convert_input)

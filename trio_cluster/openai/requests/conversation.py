"""The shape of a conversation: messages, their parts, the tools they may call.

Strict about the shape of what is known, lenient about what is not: a part of an unknown type passes as it is,
since models learn new ones faster than routers. Every error names the place, for instance
``messages[2].content[0].text``.
"""

from __future__ import annotations

from typing import Any, Final

from .checks import (
    ANY_OBJECT,
    ANY_STRING,
    NOT_EMPTY,
    Check,
    Custom,
    ListOf,
    ObjectOf,
    OneOf,
    missing,
    nothing_in,
    wrong_type,
    wrong_value,
)
from .schemas import Schema, any_of, by_type, members_of

__all__ = ["FUNCTIONS", "MESSAGES", "RESPONSE_FORMAT", "TOOLS", "TOOL_CHOICE"]

ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")


#: What the parts that are known must carry.
_PARTS: Final[dict[str, Check]] = {
    "text": ObjectOf({"text": ANY_STRING}, ("text",)),
    "image_url": ObjectOf(
        {"image_url": ObjectOf({"url": NOT_EMPTY, "detail": ANY_STRING}, ("url",))}, ("image_url",)
    ),
    "input_audio": ObjectOf(
        {"input_audio": ObjectOf({"data": ANY_STRING, "format": ANY_STRING}, ("data", "format"))},
        ("input_audio",),
    ),
    "file": ObjectOf({"file": ANY_OBJECT}, ("file",)),
    "refusal": ObjectOf({"refusal": ANY_STRING}, ("refusal",)),
}

_FUNCTION_CALLED: Final = ObjectOf({"name": NOT_EMPTY, "arguments": ANY_STRING}, ("name", "arguments"))


def _check_tool_call(value: Any, name: str) -> Any:
    _TOOL_CALL(value, name)
    if value.get("type", "function") == "function":
        if value.get("function") is None:
            raise missing(f"{name}.function")
        _FUNCTION_CALLED(value["function"], f"{name}.function")
    return value


_TOOL_CALL: Final = ObjectOf({"id": ANY_STRING, "type": ANY_STRING}, ("id",))
_TOOL_CALLS: Final = ListOf(
    Custom(
        _check_tool_call,
        by_type(
            {"function": members_of({"function": _FUNCTION_CALLED.schema()}, ("function",))},
            common=_TOOL_CALL.schema(),
            default="function",
        ),
    )
)

#: Members that any message may have.
_MEMBERS: Final[dict[str, Check]] = {
    "name": ANY_STRING,
    "refusal": ANY_STRING,
    "tool_calls": _TOOL_CALLS,
    "tool_call_id": ANY_STRING,
    "function_call": _FUNCTION_CALLED,
    "audio": ANY_OBJECT,
}

#: Members that a message of this role must have, apart from its content.
_REQUIRED: Final = {"tool": "tool_call_id", "function": "name"}

#: What can stand in for the content of an assistant's message.
_INSTEAD: Final = ("tool_calls", "function_call", "refusal", "audio")


def _check_parts(parts: list[Any], name: str) -> None:
    if not parts:
        raise nothing_in(name, "part")
    for i, part in enumerate(parts):
        if not isinstance(part, dict):
            raise wrong_type(f"{name}[{i}]", "an object", part)
        kind = part.get("type")
        if not isinstance(kind, str):
            raise (
                missing(f"{name}[{i}].type")
                if kind is None
                else wrong_type(f"{name}[{i}].type", "a string", kind)
            )
        check = _PARTS.get(kind)
        if check is not None:
            check(part, f"{name}[{i}]")


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise wrong_type(name, "an object", message)
    role = message.get("role")
    if role is None:
        raise missing(f"{name}.role")
    if not isinstance(role, str):
        raise wrong_type(f"{name}.role", "a string", role)
    if role not in ROLES:
        raise wrong_value(f"{name}.role", "one of " + ", ".join(f"'{each}'" for each in ROLES), role)

    content = message.get("content")
    if isinstance(content, list):
        _check_parts(content, f"{name}.content")
    elif content is None:
        stands_in = role == "assistant" and any(message.get(member) for member in _INSTEAD)
        if not stands_in and role != "function":
            raise missing(f"{name}.content")
    elif not isinstance(content, str):
        raise wrong_type(f"{name}.content", "a string or an array of parts", content)

    # Most messages are a role and a content, and done.
    if len(message) > 2 or content is None:
        for member, value in message.items():
            check = _MEMBERS.get(member)
            if check is not None and value is not None:
                check(value, f"{name}.{member}")
    required = _REQUIRED.get(role)
    if required is not None and message.get(required) is None:
        raise missing(f"{name}.{required}")


def _check_messages(value: Any, name: str) -> Any:
    if not isinstance(value, list):
        raise wrong_type(name, "an array", value)
    if not value:
        raise nothing_in(name, "message")
    for i, message in enumerate(value):
        _check_message(message, f"{name}[{i}]")
    return value


def _describe_message() -> Schema:
    """Return the schema of a message: a variant for each way in which one may be complete."""
    members = {name: check.schema() for name, check in _MEMBERS.items()}
    parts = by_type({kind: check.schema() for kind, check in _PARTS.items()})
    content = any_of(ANY_STRING.schema(), {"type": "array", "items": parts, "minItems": 1})

    def by(*roles: str, needed: tuple[str, ...] = ("content",), **narrower: Schema) -> Schema:
        role = OneOf(roles).schema()
        return members_of(members | {"role": role, "content": content} | narrower, ("role", *needed))

    some = {
        "tool_calls": _TOOL_CALLS.schema() | {"minItems": 1},
        "function_call": _FUNCTION_CALLED.schema(),
        "refusal": NOT_EMPTY.schema(),
        "audio": ANY_OBJECT.schema() | {"minProperties": 1},
    }
    return any_of(
        by(*(role for role in ROLES if role != "assistant" and role not in _REQUIRED)),
        by("assistant"),
        *(by("assistant", needed=(member,), **{member: some[member]}) for member in _INSTEAD),
        by("tool", needed=("content", _REQUIRED["tool"])),
        by("function", needed=(_REQUIRED["function"],)),
    )


_FUNCTION: Final = ObjectOf(
    {"name": NOT_EMPTY, "description": ANY_STRING, "parameters": ANY_OBJECT}, ("name",)
)
_TOOL: Final = ObjectOf({"type": ANY_STRING}, ("type",))
_NAMED: Final = ObjectOf({"name": NOT_EMPTY}, ("name",))


def _check_tool(value: Any, name: str) -> Any:
    _TOOL(value, name)
    if value["type"] == "function":
        if value.get("function") is None:
            raise missing(f"{name}.function")
        _FUNCTION(value["function"], f"{name}.function")
    return value


_CHOICES: Final = ("none", "auto", "required")


def _check_tool_choice(value: Any, name: str) -> Any:
    if isinstance(value, str):
        if value not in _CHOICES:
            raise wrong_value(name, "'none', 'auto', 'required' or an object", value)
        return value
    if not isinstance(value, dict):
        raise wrong_type(name, "a string or an object", value)
    _TOOL(value, name)
    if value["type"] == "function":
        if value.get("function") is None:
            raise missing(f"{name}.function")
        _NAMED(value["function"], f"{name}.function")
    return value


_FORMAT: Final = ObjectOf({"type": OneOf(("text", "json_object", "json_schema"))}, ("type",))
_SCHEMA: Final = ObjectOf({"name": NOT_EMPTY, "schema": ANY_OBJECT}, ("name",))


def _check_response_format(value: Any, name: str) -> Any:
    _FORMAT(value, name)
    if value["type"] == "json_schema":
        if value.get("json_schema") is None:
            raise missing(f"{name}.json_schema")
        _SCHEMA(value["json_schema"], f"{name}.json_schema")
    return value


def _describe_function(function: Check) -> Schema:
    return by_type({"function": members_of({"function": function.schema()}, ("function",))})


MESSAGES: Final = Custom(_check_messages, {"type": "array", "items": _describe_message(), "minItems": 1})
TOOLS: Final = ListOf(Custom(_check_tool, _describe_function(_FUNCTION)), most=128)
FUNCTIONS: Final = ListOf(_FUNCTION, least=1, most=128)
TOOL_CHOICE: Final = Custom(_check_tool_choice, any_of(OneOf(_CHOICES).schema(), _describe_function(_NAMED)))
RESPONSE_FORMAT: Final = Custom(
    _check_response_format,
    by_type(
        {
            "text": members_of({}),
            "json_object": members_of({}),
            "json_schema": members_of({"json_schema": _SCHEMA.schema()}, ("json_schema",)),
        },
        closed=True,
    ),
)

"""The checks of a conversation: messages, their parts, and the tools that they may call.

Known types are checked strictly, and unknown ones pass: models learn new types of parts sooner than this table. Every
error names the place, for instance ``messages[2].content[0].text``.
"""

from __future__ import annotations

from typing import Any, Final

from trio_cluster.errors import InvalidRequest

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
    missing_in,
    nothing_in,
    wrong_type,
    wrong_value,
)
from .schemas import Schema, any_of, by_type, members_of

__all__ = ["FUNCTIONS", "MESSAGES", "RESPONSE_FORMAT", "TOOLS", "TOOL_CHOICE"]

ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")


#: The known types of parts, and the members that they must have.
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


def _check_member(value: dict[str, Any], name: str, member: str, check: Check) -> None:
    """Check a member that must be there."""
    if value.get(member) is None:
        raise missing_in(value, member, f"{name}.{member}")
    check(value[member], f"{name}.{member}")


def _check_tool_call(value: Any, name: str) -> None:
    _TOOL_CALL(value, name)
    if value.get("type", "function") == "function":
        _check_member(value, name, "function", _FUNCTION_CALLED)


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
    "reasoning_content": ANY_STRING,
    "tool_calls": _TOOL_CALLS,
    "tool_call_id": ANY_STRING,
    "function_call": _FUNCTION_CALLED,
    "audio": ANY_OBJECT,
}

#: The member that a message of this role must have beside its content.
_REQUIRED: Final = {"tool": "tool_call_id", "function": "name"}

#: Members that an assistant's message may have instead of a content.
_INSTEAD: Final = ("tool_calls", "function_call", "refusal", "reasoning_content", "audio")


def _check_messages(value: Any, name: str) -> None:
    if not isinstance(value, list):
        raise wrong_type(name, "an array", value)
    if not value:
        raise nothing_in(name, "message")
    for i, message in enumerate(value):
        _check_message(message, f"{name}[{i}]")


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise wrong_type(name, "an object", message)
    role, content = message.get("role"), message.get("content")
    # Most messages are one of the known roles and a text. They take no further calls.
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong_role(role, name)
    if not isinstance(content, str):
        _check_content(content, message, name)
    if len(message) > 2 or content is None:
        _check_members(message, name)
    required = _REQUIRED.get(role)
    if required is not None and message.get(required) is None:
        raise missing(f"{name}.{required}")


def _wrong_role(role: Any, name: str) -> InvalidRequest:
    if role is None:
        return missing(f"{name}.role")
    if not isinstance(role, str):
        return wrong_type(f"{name}.role", "a string", role)
    return wrong_value(f"{name}.role", "one of " + ", ".join(f"'{each}'" for each in ROLES), role)


def _check_content(content: Any, message: dict[str, Any], name: str) -> None:
    """Check the content of a message that is not text."""
    if isinstance(content, list):
        _check_parts(content, f"{name}.content")
    elif content is not None:
        raise wrong_type(f"{name}.content", "a string or an array of parts", content)
    elif message["role"] == "assistant":
        if all(message.get(member) is None for member in _INSTEAD):
            raise missing_in(message, "content", f"{name}.content")
    elif message["role"] != "function":
        raise missing_in(message, "content", f"{name}.content")


def _check_parts(parts: list[Any], name: str) -> None:
    if not parts:
        raise nothing_in(name, "part")
    for i, part in enumerate(parts):
        if not isinstance(part, dict):
            raise wrong_type(f"{name}[{i}]", "an object", part)
        kind = part.get("type")
        if kind is None:
            raise missing(f"{name}[{i}].type")
        if not isinstance(kind, str):
            raise wrong_type(f"{name}[{i}].type", "a string", kind)
        check = _PARTS.get(kind)
        if check is not None:
            check(part, f"{name}[{i}]")


def _check_members(message: dict[str, Any], name: str) -> None:
    for member, value in message.items():
        check = _MEMBERS.get(member)
        if check is not None and value is not None:
            check(value, f"{name}.{member}")


def _describe_message() -> Schema:
    """Return the schema of a message: one variant for each set of members that makes it complete."""
    members = {name: check.schema() for name, check in _MEMBERS.items()}
    parts = by_type({kind: check.schema() for kind, check in _PARTS.items()})
    content = any_of(ANY_STRING.schema(), {"type": "array", "items": parts, "minItems": 1})

    def by(*roles: str, needed: tuple[str, ...] = ("content",), **narrower: Schema) -> Schema:
        role = OneOf(roles).schema()
        return members_of(members | {"role": role, "content": content} | narrower, ("role", *needed))

    some = {
        "tool_calls": _TOOL_CALLS.schema(),
        "function_call": _FUNCTION_CALLED.schema(),
        "refusal": ANY_STRING.schema(),
        "reasoning_content": ANY_STRING.schema(),
        "audio": ANY_OBJECT.schema(),
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


def _check_tool(value: Any, name: str) -> None:
    _TOOL(value, name)
    if value["type"] == "function":
        _check_member(value, name, "function", _FUNCTION)


_CHOICES: Final = ("none", "auto", "required")


def _check_tool_choice(value: Any, name: str) -> None:
    if isinstance(value, str):
        if value not in _CHOICES:
            raise wrong_value(name, "'none', 'auto', 'required' or an object", value)
        return
    if not isinstance(value, dict):
        raise wrong_type(name, "a string or an object", value)
    _TOOL(value, name)
    if value["type"] == "function":
        _check_member(value, name, "function", _NAMED)


_FORMAT: Final = ObjectOf({"type": OneOf(("text", "json_object", "json_schema"))}, ("type",))
_SCHEMA: Final = ObjectOf({"name": NOT_EMPTY, "schema": ANY_OBJECT}, ("name",))


def _check_response_format(value: Any, name: str) -> None:
    _FORMAT(value, name)
    if value["type"] == "json_schema":
        _check_member(value, name, "json_schema", _SCHEMA)


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

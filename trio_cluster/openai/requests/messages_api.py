"""Requests to ``/v1/messages`` and ``/v1/messages/count_tokens``, translated into chat requests.

Everything that both forms can express is translated, so a chat handler need not know which route a request came by; see
``messages_api_content.py`` for the conversation. ``raw`` has the body as it was sent: also what has no form in a chat,
such as ``thinking``, ``top_k``, ``context_management`` and every ``cache_control``.

Tools that the server would have to run, or that only models of one company know (``web_search_20250305`` ...), are
accepted and not offered to the model, like those of ``/v1/responses``. Only a ``tool_choice`` that demands one is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .checks import (
    ANY_OBJECT,
    ANY_STRING,
    BOOLEAN,
    NOT_EMPTY,
    Check,
    Custom,
    Integer,
    ListOf,
    Number,
    ObjectOf,
    OneOf,
    missing,
)
from .fields import Table
from .messages_api_content import CONVERSATION, SYSTEM
from .readers import read_json
from .responses_api_input import present, unsupported
from .schemas import any_of, members_of
from .types import ChatRequest

__all__ = ["COUNT", "MESSAGE", "read_count", "read_message"]

# Tools

_TYPED: Final = ObjectOf({"type": ANY_STRING})
_TOOL: Final = ObjectOf(
    {"name": NOT_EMPTY, "description": ANY_STRING, "input_schema": ANY_OBJECT, "strict": BOOLEAN},
    ("name", "input_schema"),
)


def _is_client_tool(tool: dict[str, Any]) -> bool:
    return tool.get("type") in (None, "custom")


def _check_tool(value: Any, name: str) -> None:
    if _is_client_tool(_TYPED(value, name)):
        _TOOL(value, name)


_TOOL_SCHEMA: Final = any_of(
    members_of(
        _TOOL.schema()["properties"] | {"type": {"type": "string", "enum": ["custom"]}},
        ("name", "input_schema"),
    ),
    members_of({"type": {"type": "string", "not": {"enum": ["custom"]}}}, ("type",)),
)
_TOOLS: Final = ListOf(Custom(_check_tool, _TOOL_SCHEMA))


def _convert_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": present(tool, ("name", "description", "strict"))
            | {"parameters": tool["input_schema"]},
        }
        for tool in tools
        if _is_client_tool(tool)
    ]


_CHOICE: Final = ObjectOf(
    {
        "type": OneOf(("auto", "any", "tool", "none")),
        "name": NOT_EMPTY,
        "disable_parallel_tool_use": BOOLEAN,
    },
    ("type",),
)
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}


def _check_choice(value: Any, name: str) -> None:
    if _CHOICE(value, name)["type"] == "tool" and value.get("name") is None:
        raise missing(f"{name}.name")


_CHOICE_SCHEMA: Final = any_of(
    members_of(_CHOICE.schema()["properties"] | {"type": {"type": "string", "enum": [*_CHOICES]}}, ("type",)),
    members_of(
        _CHOICE.schema()["properties"]
        | {"type": {"type": "string", "enum": ["tool"]}, "name": NOT_EMPTY.schema()},
        ("type", "name"),
    ),
)


# The other fields

_FORMAT: Final = ObjectOf({"type": OneOf(("json_schema",)), "schema": ANY_OBJECT}, ("type", "schema"))

#: The fields that decide how many tokens a request has.
_PROMPT: Final[dict[str, Check]] = {
    "model": NOT_EMPTY,
    "messages": CONVERSATION,
    "system": SYSTEM,
    "tools": _TOOLS,
    "tool_choice": Custom(_check_choice, _CHOICE_SCHEMA),
    "thinking": ObjectOf({"type": ANY_STRING, "budget_tokens": Integer(0)}, ("type",)),
    "output_config": ObjectOf({"effort": ANY_STRING, "format": _FORMAT}),
}

#: The documented fields of ``/v1/messages/count_tokens``.
COUNT: Final = Table(("model", "messages"), _PROMPT)

#: The documented fields of ``/v1/messages``.
MESSAGE: Final = Table(
    ("model", "messages", "max_tokens"),
    {
        **_PROMPT,
        "max_tokens": Integer(1),
        "stream": BOOLEAN,
        "stop_sequences": ListOf(ANY_STRING),
        "temperature": Number(0, 1),
        "top_p": Number(0, 1),
        "top_k": Integer(0),
        "metadata": ObjectOf({"user_id": ANY_STRING}),
        "service_tier": ANY_STRING,
    },
)

#: Fields with the same name and the same meaning in a chat.
_SAME: Final = ("model", "stream", "max_tokens", "temperature", "top_p", "metadata", "service_tier")


def read_message(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> ChatRequest:
    """Read a request to ``/v1/messages``: a chat, for any chat model.

    ``system`` is the first message. ``stop_sequences`` becomes ``stop``, ``metadata.user_id`` also ``user``, and
    ``output_config`` becomes ``response_format`` and ``reasoning_effort``.
    """
    return _read(MESSAGE, body, content_type, headers, checked=checked)


def read_count(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> ChatRequest:
    """Read a request to ``/v1/messages/count_tokens``: the same as one to ``/v1/messages`` that asks for no answer."""
    return _read(COUNT, body, content_type, headers, checked=checked)


def _read(
    table: Table, body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool
) -> ChatRequest:
    raw = read_json(body, content_type, checked=checked)
    known = table.read(raw, checked=checked)
    messages = known["messages"]
    if known.get("system"):
        messages = [{"role": "system", "content": known["system"]}, *messages]
    fields: dict[str, Any] = {name: known[name] for name in _SAME if name in known}
    if tools := _convert_tools(known.get("tools", [])):
        fields["tools"] = tools
    if (choice := known.get("tool_choice")) is not None:
        fields |= _convert_choice(choice, known.get("tools", []))
    if known.get("stop_sequences"):
        fields["stop"] = known["stop_sequences"]
    if (user := known.get("metadata", {}).get("user_id")) is not None:
        fields["user"] = user
    config = known.get("output_config", {})
    if config.get("effort") is not None:
        fields["reasoning_effort"] = config["effort"]
    if (wanted := config.get("format")) is not None:
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "output", "schema": wanted["schema"]},
        }
    return ChatRequest(messages=messages, raw=raw, headers=headers, **fields)


def _convert_choice(choice: dict[str, Any], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of a chat about the choice of a tool.

    Raises:
        InvalidRequest: it demands a tool that the model is not offered.
    """
    if choice["type"] == "tool":
        name = choice["name"]
        if any(tool.get("name") == name and not _is_client_tool(tool) for tool in tools):
            raise unsupported(
                "'tool_choice' demands a tool that the server would have to have, and it has no tools of its own: only "
                "the client's tools can be demanded",
                "tool_choice.name",
            )
        fields: dict[str, Any] = {"tool_choice": {"type": "function", "function": {"name": name}}}
    else:
        fields = {"tool_choice": _CHOICES[choice["type"]]}
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields

"""The tools of a response, translated into those of a chat, and the names of their calls translated back.

Theory of operation
===================

A client of ``/v1/responses`` declares three kinds of tools of its own, and tools that the server would have to run:

- ``function``: the same as in a chat;
- ``custom``: takes text instead of JSON; the same as in a chat;
- ``namespace``: a group of the client's functions, for instance those of one MCP server. A chat has no groups, so each
  function gets the name of its group before its own. A call comes back with the two names apart, because that is how
  the client looks its function up (see ``../tool_names.py``);
- everything else (``web_search``, ``file_search``, ``mcp`` ...) is run by the server in the OpenAI API. Clients declare
  such tools without knowing whether the server has them, and a model may answer without them. So they are accepted and
  not offered to the model. Only a ``tool_choice`` that demands one is refused.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from trio_cluster.errors import InvalidRequest

from ..tool_names import callables, flat_name
from .checks import (
    ANY_OBJECT,
    ANY_STRING,
    BOOLEAN,
    NOT_EMPTY,
    Custom,
    ListOf,
    ObjectOf,
    OneOf,
    missing,
    shown_name,
    wrong_type,
)
from .responses_api_input import of_type, present, unsupported
from .schemas import Schema, any_of, by_type, members_of

__all__ = ["TOOLS", "TOOL_CHOICE"]

_MOST_TOOLS: Final = 128

_TYPED: Final = ObjectOf({"type": ANY_STRING}, ("type",))
_FUNCTION: Final = ObjectOf(
    {"name": NOT_EMPTY, "description": ANY_STRING, "parameters": ANY_OBJECT, "strict": BOOLEAN}, ("name",)
)
_CUSTOM: Final = ObjectOf({"name": NOT_EMPTY, "description": ANY_STRING, "format": ANY_OBJECT}, ("name",))
#: The tools of the client that have no others inside.
_CALLABLE: Final = {"function": _FUNCTION, "custom": _CUSTOM}
_NAMESPACE: Final = ObjectOf({"name": NOT_EMPTY, "description": ANY_STRING}, ("name", "tools"))

_Tool: TypeAlias = dict[str, Any]


def _check_tool(value: Any, name: str) -> None:
    kind = _TYPED(value, name)["type"]
    if kind in _CALLABLE:
        _CALLABLE[kind](value, name)
    elif kind == "namespace":
        _NAMESPACE(value, name)
        _INNER(value["tools"], f"{name}.tools")


def _check_inner(value: Any, name: str) -> None:
    kind = _TYPED(value, name)["type"]
    if kind in _CALLABLE:
        _CALLABLE[kind](value, name)


_INNER: Final = ListOf(Custom(_check_inner), most=_MOST_TOOLS)
_DECLARED: Final = ListOf(Custom(_check_tool), most=_MOST_TOOLS)


def _check_tools(value: Any, name: str) -> None:
    _DECLARED(value, name)
    seen: dict[str, tuple[str | None, str]] = {}
    for namespace, tool in callables(value):
        flat, apart = flat_name(namespace, tool["name"]), (namespace, tool["name"])
        if seen.setdefault(flat, apart) != apart:
            raise InvalidRequest(
                f"'{name}' has two tools that a model would know as '{flat[:60]}'",
                param=name,
                code="invalid_value",
            )


def _convert_tools(value: list[_Tool]) -> list[_Tool]:
    return [_convert_tool(namespace, tool) for namespace, tool in callables(value)]


def _convert_tool(namespace: str | None, tool: _Tool) -> _Tool:
    kind = tool["type"]
    inner = present(tool, _CALLABLE[kind].members) | {"name": flat_name(namespace, tool["name"])}
    if kind == "custom" and isinstance(given := inner.get("format"), dict) and given.get("type") == "grammar":
        # In a chat, the members of a grammar are in an object of their own.
        inner["format"] = {
            "type": "grammar",
            "grammar": {name: each for name, each in given.items() if name != "type"},
        }
    return {"type": kind, kind: inner}


# The choice of a tool

_WORDS: Final = OneOf(("none", "auto", "required"))
_ALLOWED: Final = ObjectOf({"mode": OneOf(("auto", "required"))}, ("mode", "tools"))
_CHOSEN: Final = ObjectOf({"name": NOT_EMPTY, "namespace": NOT_EMPTY}, ("name",))


def _not_here(kind: str, name: str) -> InvalidRequest:
    return unsupported(
        f"'{name}' demands a tool of type '{shown_name(kind)}', and the server has no tools of its own: "
        "only the client's functions and custom tools can be demanded",
        f"{name}.type",
    )


def _check_chosen(value: Any, name: str) -> None:
    kind = _TYPED(value, name)["type"]
    if kind not in _CALLABLE:
        raise _not_here(kind, name)
    if value.get("name") is None:
        raise missing(f"{name}.name")
    _CHOSEN(value, name)


def _convert_chosen(value: dict[str, Any]) -> dict[str, Any]:
    kind = value["type"]
    return {"type": kind, kind: {"name": flat_name(value.get("namespace"), value["name"])}}


def _check_listed(value: Any, name: str) -> None:
    if _TYPED(value, name)["type"] in _CALLABLE:
        _check_chosen(value, name)


_LISTED: Final = ListOf(Custom(_check_listed), least=1)


def _check_tool_choice(value: Any, name: str) -> None:
    if isinstance(value, str):
        _WORDS(value, name)
    elif not isinstance(value, dict):
        raise wrong_type(name, "a string or an object", value)
    elif value.get("type") == "allowed_tools":
        _ALLOWED(value, name)
        _LISTED(value["tools"], f"{name}.tools")
        kinds = [each["type"] for each in value["tools"]]
        if not any(kind in _CALLABLE for kind in kinds) and value["mode"] == "required":
            raise _not_here(kinds[0], f"{name}.tools[0]")
    else:
        _check_chosen(value, name)


def _convert_tool_choice(value: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(value, str):
        return value
    if value["type"] == "allowed_tools":
        tools = [_convert_chosen(each) for each in value["tools"] if each["type"] in _CALLABLE]
        if not tools:
            # None of the allowed tools is one that the model is offered.
            return "none"
        return {"type": "allowed_tools", "allowed_tools": {"mode": value["mode"], "tools": tools}}
    return _convert_chosen(value)


# Descriptions


def _choice_schema(*, closed: bool) -> Schema:
    return by_type(dict.fromkeys(_CALLABLE, _CHOSEN.schema()), closed=closed)


def _allowed_schema(mode: str, *, closed: bool) -> Schema:
    schema = of_type("allowed_tools", members_of({"mode": OneOf((mode,)).schema()}, ("mode", "tools")))
    schema["properties"]["tools"] = {"type": "array", "items": _choice_schema(closed=closed), "minItems": 1}
    return schema


def _tools_schema() -> Schema:
    callables = {kind: check.schema() for kind, check in _CALLABLE.items()}
    inner = {"type": "array", "items": by_type(callables), "maxItems": _MOST_TOOLS}
    named = {"name": NOT_EMPTY.schema(), "description": ANY_STRING.schema(), "tools": inner}
    namespace = members_of(named, ("name", "tools"))
    return {
        "type": "array",
        "items": by_type(callables | {"namespace": namespace}),
        "maxItems": _MOST_TOOLS,
    }


TOOLS: Final = Custom(_check_tools, _tools_schema(), _convert_tools)
TOOL_CHOICE: Final = Custom(
    _check_tool_choice,
    any_of(
        _WORDS.schema(),
        _choice_schema(closed=True),
        _allowed_schema("auto", closed=False),
        _allowed_schema("required", closed=True),
    ),
    _convert_tool_choice,
)

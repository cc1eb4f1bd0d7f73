"""Requests to ``/v1/responses``, translated into chat requests.

Everything that both forms can express is translated, so a chat handler need not know which route a request came by.
Tools that the server would run are not offered (see ``responses_api_tools.py``). What refers to stored responses
(``previous_response_id``, ``conversation``, references in ``input``) is resolved by the gateway, or refused there: the
body that comes to a model has the whole input, and these fields only to be repeated in the answer. Most values of
``include`` change nothing about the answer; they are accepted and ignored.
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
    wrong_type,
)
from .fields import OnlyIf, Table
from .readers import read_json
from .responses_api_input import INPUT, of_type, present, unsupported
from .responses_api_tools import TOOL_CHOICE, TOOLS
from .schemas import Schema, any_of
from .tables import METADATA
from .types import ChatRequest

__all__ = ["RESPONSE", "read_response"]

#: The value of ``include`` that asks for the log probabilities of the tokens.
_LOGPROBS: Final = "message.output_text.logprobs"


def _refused(why: str, *, allowed: tuple[Any, ...] = ()) -> Check:
    """Return the check of a field that is not supported, except for values that change nothing."""

    def check(value: Any, name: str) -> None:
        if not any(value is each for each in allowed):
            raise unsupported(f"'{name}' is not supported: {why}", name)

    return Custom(check, {"enum": [*allowed] or [None]})


# Text

_FORMAT: Final = ObjectOf({"type": OneOf(("text", "json_object", "json_schema"))}, ("type",))
_JSON_SCHEMA: Final = ObjectOf(
    {"name": NOT_EMPTY, "schema": ANY_OBJECT, "description": ANY_STRING, "strict": BOOLEAN},
    ("name", "schema"),
)
_VERBOSITY: Final = OneOf(("low", "medium", "high"))


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    if (verbosity := value.get("verbosity")) is not None:
        _VERBOSITY(verbosity, f"{name}.verbosity")
    if (wanted := value.get("format")) is not None:
        _FORMAT(wanted, f"{name}.format")
        if wanted["type"] == "json_schema":
            _JSON_SCHEMA(wanted, f"{name}.format")


def _convert_text(value: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a chat with the same meaning."""
    fields = present(value, ("verbosity",))
    if (wanted := value.get("format")) is not None:
        fields["response_format"] = {"type": wanted["type"]}
        if wanted["type"] == "json_schema":
            fields["response_format"]["json_schema"] = present(wanted, _JSON_SCHEMA.members)
    return fields


_TEXT_SCHEMA: Final[Schema] = {
    "type": "object",
    "properties": {
        "format": any_of(
            of_type("text", {"type": "object"}),
            of_type("json_object", {"type": "object"}),
            of_type("json_schema", _JSON_SCHEMA.schema()),
            {"type": "null"},
        ),
        "verbosity": any_of(_VERBOSITY.schema(), {"type": "null"}),
    },
}


_REASONING: Final = ObjectOf({"effort": ANY_STRING, "summary": ANY_STRING, "generate_summary": ANY_STRING})

_CONVERSATION: Final = ObjectOf({"id": NOT_EMPTY}, ("id",))
_CONVERSATION_SCHEMA: Final[Schema] = any_of(NOT_EMPTY.schema(), _CONVERSATION.schema())


def _check_conversation(value: Any, name: str) -> None:
    (NOT_EMPTY if isinstance(value, str) else _CONVERSATION)(value, name)


#: The documented fields of the route.
RESPONSE: Final = Table(
    ("model", "input"),
    {
        "model": NOT_EMPTY,
        "input": INPUT,
        "instructions": ANY_STRING,
        "stream": BOOLEAN,
        "stream_options": ObjectOf({"include_obfuscation": BOOLEAN}),
        "temperature": Number(0, 2),
        "top_p": Number(0, 1),
        "max_output_tokens": Integer(1),
        "max_tool_calls": Integer(1),
        "top_logprobs": Integer(0, 20),
        "tools": TOOLS,
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": BOOLEAN,
        "text": Custom(_check_text, _TEXT_SCHEMA, _convert_text),
        "reasoning": _REASONING,
        "include": ListOf(ANY_STRING),
        "truncation": OneOf(("auto", "disabled")),
        "metadata": METADATA,
        "store": BOOLEAN,
        "service_tier": ANY_STRING,
        "prompt_cache_key": ANY_STRING,
        "safety_identifier": ANY_STRING,
        "user": ANY_STRING,
        "previous_response_id": NOT_EMPTY,
        "conversation": Custom(_check_conversation, _CONVERSATION_SCHEMA),
        "prompt": _refused("templates are not stored, send 'instructions' and 'input'"),
        "background": _refused("a response ends with the request that asked for it", allowed=(False,)),
    },
    rules=(OnlyIf("stream_options", "stream", (True,)),),
)

#: Fields with the same name and the same meaning in a chat.
_SAME: Final = (
    "model",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "safety_identifier",
    "user",
)


def read_response(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> ChatRequest:
    """Read a request to ``/v1/responses``: a chat, for any chat model.

    ``max_output_tokens`` becomes ``max_tokens``, ``text`` and ``reasoning`` become ``response_format``,
    ``verbosity`` and ``reasoning_effort``; ``instructions`` are the first message.
    """
    raw = read_json(body, content_type, checked=checked)
    known = RESPONSE.read(raw, checked=checked)
    messages = known["input"]
    if known.get("instructions"):
        messages = [{"role": "system", "content": known["instructions"]}, *messages]
    fields = {name: known[name] for name in _SAME if name in known} | known.get("text", {})
    if not fields.get("tools", True):
        # All tools were such as the server would have to run.
        del fields["tools"]
    if "max_output_tokens" in known:
        fields["max_tokens"] = known["max_output_tokens"]
    if (effort := known.get("reasoning", {}).get("effort")) is not None:
        fields["reasoning_effort"] = effort
    if "top_logprobs" in known or _LOGPROBS in known.get("include", ()):
        fields["logprobs"] = True
    return ChatRequest(messages=messages, raw=raw, headers=headers, **fields)

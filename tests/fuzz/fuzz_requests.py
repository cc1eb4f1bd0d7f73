"""Fuzz target: the bodies of requests for text, as bytes and as a valid request that is changed in some places.

The routes are ``/v1/messages``, ``/v1/messages/count_tokens``, ``/v1/responses`` and ``/v1/chat/completions``. Checked
for any body:

- It is taken, or refused with an ``InvalidRequest``: a status from 400 to 499, a message and a field that are one short
  line, and an error object that is JSON.
- What a handler and the gateway read of a request that was taken raises nothing.
- The same request is made of a body that has been checked before, by the worker that gets it from the master.
- A conversation that was translated into a chat is one: ``/v1/chat/completions`` takes it, with its tools, and makes
  the same conversation of it.
- The CPU time is proportional to the bytes.
"""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any, Final

import attrs
from fuzz_input import Bytecode, Input, seed, timed

from trio_cluster.errors import InvalidRequest
from trio_cluster.openai import ENDPOINTS, ChatRequest, Endpoint

__all__ = ["EXAMPLES", "FINDINGS", "SEEDS", "check"]

#: The routes, in the order of the parts of an input; each as bytes, and changed.
ROUTES: Final = ("messages", "messages.count_tokens", "responses", "chat.completions")
_JSON: Final = "application/json"
#: Bytes of a program: each can change a place of the request.
_PROGRAM_MAX: Final = 512
#: Characters of what a change may copy.
_COPIED_MAX: Final = 1000
#: Characters of a message, and of the name of a field. Values that were sent are cut short in them.
_MESSAGE_MAX: Final = 1000
_FIELD_MAX: Final = 400

_IMAGE: Final = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
_PDF: Final = {"type": "base64", "media_type": "application/pdf", "data": "aGk="}
_SCHEMA: Final[dict[str, Any]] = {"type": "object", "properties": {"a": {"type": "string"}}}
_PARTS: Final[list[dict[str, Any]]] = [
    {"type": "text", "text": "look", "cache_control": {"type": "ephemeral"}},
    _IMAGE,
    {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}},
    {"type": "document", "source": _PDF, "title": "t", "context": "c"},
    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "d"}},
    {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "d"}]}},
    {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "found"}]},
]
_MESSAGE: Final[dict[str, Any]] = {
    "model": "m",
    "max_tokens": 9,
    "stream": True,
    "system": [{"type": "text", "text": "be kind"}],
    "tools": [
        {"name": "f", "description": "d", "input_schema": _SCHEMA, "strict": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 3},
    ],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 2000},
    "stop_sequences": ["x"],
    "temperature": 1,
    "metadata": {"user_id": "u"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": _SCHEMA}},
    "messages": [
        {"role": "user", "content": _PARTS},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "d"},
                {"type": "text", "text": "let me see"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "b"}},
                {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [*_PARTS[:2]], "is_error": True},
                {"type": "tool_result", "tool_use_id": "t2", "content": "done"},
                {"type": "text", "text": "and?"},
            ],
        },
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "go on"},
    ],
}
_RESPONSE: Final[dict[str, Any]] = {
    "model": "m",
    "instructions": "be kind",
    "max_output_tokens": 5,
    "stream": True,
    "reasoning": {"effort": "low", "summary": "auto"},
    "text": {"verbosity": "low", "format": {"type": "json_schema", "name": "n", "schema": _SCHEMA}},
    "tools": [
        {"type": "function", "name": "f", "parameters": _SCHEMA, "strict": None},
        {"type": "custom", "name": "g", "format": {"type": "text"}},
        {"type": "web_search"},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"k": "v"},
    "input": [
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "a"},
                {"type": "input_image", "image_url": "u", "detail": "low"},
                {"type": "input_file", "file_data": "d", "filename": "f"},
                {"type": "input_audio", "input_audio": {"data": "d", "format": "wav"}},
            ],
        },
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "e"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x"}]},
        {"type": "function_call_output", "call_id": "c", "output": "o"},
        {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "i"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "p"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "developer", "content": "go on"},
    ],
}
_CHAT: Final[dict[str, Any]] = {
    "model": "m",
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "n": 2,
    "stop": ["x", "y"],
    "max_completion_tokens": 5,
    "logit_bias": {"1": 5},
    "logprobs": True,
    "top_logprobs": 2,
    "seed": 1,
    "user": "u",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": _SCHEMA, "strict": True}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}},
    "metadata": {"k": "v"},
    "messages": [
        {"role": "system", "content": "be kind"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": "u", "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": "d", "format": "wav"}},
                {"type": "file", "file": {"file_data": "d", "filename": "f"}},
            ],
            "name": "Ada",
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "o"}]},
        {"role": "assistant", "content": "so", "refusal": None},
        {"role": "user", "content": "go on"},
    ],
}
#: For each route, a request with something of everything.
EXAMPLES: Final[dict[str, dict[str, Any]]] = {
    "messages": _MESSAGE,
    "messages.count_tokens": {
        name: _MESSAGE[name] for name in ("model", "system", "tools", "tool_choice", "thinking", "messages")
    },
    "responses": _RESPONSE,
    "chat.completions": _CHAT,
}

#: Values that may be right somewhere, and hardly anywhere else.
_VALUES: Final[list[Any]] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    1e308,
    10**30,
    -(2**63) - 1,
    "",
    "x",
    "m",
    "f",
    "\n\x00\x1b[0m\u2028",
    "\ud800",
    "ä" * 300,
    [],
    {},
    [[]],
    [None],
    [{}],
    ["x"],
    [1],
    {"": ""},
    {"type": None},
    {"type": "x" * 300},
    {"type": []},
    {"type": "text"},
    {"type": "text", "text": 1},
    {"type": "text", "text": "x"},
    {"role": "user"},
    {"role": []},
    {"role": "user", "content": ""},
    "user",
    "assistant",
    "system",
    "tool",
    "auto",
    "any",
    "none",
    "required",
    "function",
    "custom",
    "text",
    "image",
    "document",
    "tool_use",
    "tool_result",
    "input_text",
    "output_text",
    "refusal",
    "item_reference",
    "base64",
    "url",
    "data:,",
    "{",
    "[]",
]


def check(encoded: bytes) -> None:
    """Check one input."""
    given = Input.of(encoded)
    route = ROUTES[given.part // 2 % len(ROUTES)]
    body = given.data if given.part % 2 == 0 else _changed(route, Bytecode(given.data[:_PROGRAM_MAX]))
    endpoint = ENDPOINTS[route]
    request = timed(lambda: _parsed(endpoint, body), len(body))
    if request is None:
        return
    _check_request(request)
    checked = endpoint.parse(body, _JSON, {"x": "y"}, checked=True)
    # As text, in which 1, 1.0 and true differ.
    assert repr(attrs.asdict(checked)) == repr(attrs.asdict(request)), "another request of a checked body"
    if route != "chat.completions":
        _check_translation(request)


def _parsed(endpoint: Endpoint, body: bytes) -> ChatRequest | None:
    try:
        request = endpoint.parse(body, _JSON, {"x": "y"})
    except InvalidRequest as error:
        _check_refusal(error)
        return None
    assert isinstance(request, ChatRequest)
    return request


def _check_refusal(error: InvalidRequest) -> None:
    assert 400 <= error.status < 500
    for text, most in ((error.message, _MESSAGE_MAX), (error.param or "x", _FIELD_MAX)):
        assert 0 < len(text) <= most, f"{len(text)} characters: {text[:200]!r} ..."
        assert "\n" not in text, f"more than one line: {text!r}"
        text.encode()


def _check_request(request: ChatRequest) -> None:
    """Read what a handler may read."""
    assert request.model
    assert request.messages
    assert all(isinstance(message, dict) and message["role"] for message in request.messages)
    for name in dir(type(request)):
        if isinstance(getattr(type(request), name, None), property):
            getattr(request, name)


def _check_translation(request: ChatRequest) -> None:
    """Ask for the same as a chat."""
    names = ("messages", "tools", "tool_choice", "stop", "max_tokens", "response_format", "reasoning_effort")
    fields = {name: value for name in names if (value := getattr(request, name)) is not None}
    body = json.dumps({"model": request.model, **fields}).encode()
    try:
        chat = ENDPOINTS["chat.completions"].parse(body, _JSON, {})
    except InvalidRequest as error:
        raise AssertionError(f"what was translated is no chat: {error.param}: {error.message}") from error
    for name in names:
        assert getattr(chat, name) == getattr(request, name), f"another {name} as a chat"


# A program is a number of changes


def _changed(route: str, program: Bytecode) -> bytes:
    """Return the body of a request of which some places are changed."""
    request: Any = deepcopy(EXAMPLES[route])
    while not program.over:
        request = _change(request, program)
    # An application may send a lone surrogate as an escape.
    return json.dumps(request).encode()


def _change(value: Any, program: Bytecode) -> Any:
    """Return the value after one change: here, or further inside."""
    action = program.byte()
    if isinstance(value, dict | list) and value and action < 224:
        key: Any = program.pick(list(value)) if isinstance(value, dict) else program.byte() % len(value)
        if action < 176:
            value[key] = _change(value[key], program)
        elif action < 192:
            del value[key]
        elif action < 208 and isinstance(value, list):
            copied = value[program.byte() % len(value)]
            # Otherwise, a program could double a request with each of its steps.
            if len(repr(copied)) <= _COPIED_MAX:
                value.insert(key, deepcopy(copied))
        elif isinstance(value, dict):
            value[program.pick(_NAMES)] = _value(program)
        else:
            value.append(_value(program))
        return value
    if action >= 250:
        return [value] if program.byte() % 2 else {program.pick(_NAMES): value}
    return _value(program)


def _value(program: Bytecode) -> Any:
    return deepcopy(program.pick(_VALUES))


def _names_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(_names_in, value.values()))
    return set().union(*map(_names_in, value)) if isinstance(value, list) else set()


_NAMES: Final = sorted({"unknown", "", "\n", "x" * 300, *_names_in(list(EXAMPLES.values()))})


def _seeds() -> list[bytes]:
    found = []
    for number, route in enumerate(ROUTES):
        example = EXAMPLES[route]
        whole = json.dumps(example).encode()
        found += [seed(whole, part=2 * number), seed(b"", part=2 * number + 1)]
        # Each field alone is changed to each of a few values, and taken away.
        for field in range(len(example)):
            found += [
                seed(bytes((0, field, 255 - 6, value)), part=2 * number + 1) for value in (0, 2, 10, 17, 18)
            ]
            found.append(seed(bytes((180, field)), part=2 * number + 1))
        least = json.dumps({name: example[name] for name in ("model", "max_tokens") if name in example})
        deep = b'{"model":"m","messages":[{"role":"user","content":[' + b'{"type":"text","text":"x"},'
        found += [
            seed(whole[:-1], part=2 * number),
            seed(json.dumps(example | {"tool_choice": "x" * 3000}).encode(), part=2 * number),
            seed(json.dumps(example | {"tool_choice": {"type": "x" * 3000}}).encode(), part=2 * number),
            seed(least.encode(), part=2 * number),
            seed(b'{"model":' + b"[" * 16, part=2 * number, times=1024, start=9, length=16),
            seed(deep + b'{"type":"text"}]}]}', part=2 * number, times=1024, start=51, length=27),
        ]
    return found


SEEDS: Final = _seeds()

#: What was found once, and must not come back.
FINDINGS: Final = [
    # What a client had named was in the message as it came, with line breaks and the escape sequences of terminals.
    seed(json.dumps(_RESPONSE | {"input": [{"type": "\n\x1b[0m"}]}).encode(), part=4),
    seed(json.dumps(_RESPONSE | {"tool_choice": {"type": "\n"}}).encode(), part=4),
    seed(json.dumps(_CHAT | {"metadata": {"\n": 1}}).encode(), part=6),
]

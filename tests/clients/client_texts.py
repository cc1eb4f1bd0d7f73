"""Cases about texts: chats, completions, responses."""

from __future__ import annotations

import json
from typing import Any, Final
from unittest.mock import ANY

from client_case import USER, Beginning, Case

__all__ = ["RESPONSES", "TEXTS"]


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _chat(model: str, choices: list[Any], usage: Any) -> dict[str, Any]:
    return {
        "id": Beginning("chatcmpl-"), "object": "chat.completion", "created": ANY, "model": model,
        "choices": choices, "usage": usage,
    }  # fmt: skip


def _message(content: str | None, reason: str = "stop", index: int = 0, **members: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": None, **members}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}


def _chunk(model: str, delta: dict[str, Any], reason: str | None = None, index: int = 0, **more: Any) -> Any:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {
        "id": Beginning("chatcmpl-"), "object": "chat.completion.chunk", "created": ANY, "model": model,
        "choices": [choice], **more,
    }  # fmt: skip


_FIRST: Final = {"role": "assistant", "content": "", "refusal": None}


def _streamed(model: str, *pieces: str, reason: str = "stop", **more: Any) -> list[Any]:
    return [
        _chunk(model, _FIRST, **more),
        *(_chunk(model, {"content": piece}, **more) for piece in pieces),
        _chunk(model, {}, reason, **more),
    ]


def _text(model: str, text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    return {
        "id": Beginning("cmpl-"), "object": "text_completion", "created": ANY, "model": model,
        "choices": [choice], **more,
    }  # fmt: skip


_WEATHER: Final = {"name": "weather", "arguments": '{"city": "Kyoto"}'}
_CALL: Final = {"id": "call_1", "type": "function", "function": _WEATHER}


def _sees_the_mirror(answer: Any, expected: Any) -> None:
    assert json.loads(answer["choices"][0]["message"]["content"]) == expected


def _sees_the_call(answer: Any, expected: Any) -> None:
    """The helper of each client puts the answer together from its chunks, and adds something of its own."""
    [choice] = answer["choices"]
    [call] = choice["message"]["tool_calls"]
    function = {name: call["function"][name] for name in ("name", "arguments")}
    assert {"id": call["id"], "type": call["type"], "function": function} == expected
    assert choice["finish_reason"] == "tool_calls"


# The fields of a response that say how it was asked for, where nothing was said.
_UNASKED: Final[dict[str, Any]] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}


def _response(model: str, output: list[Any], usage: Any, status: str = "completed", **asked: Any) -> Any:
    return {
        "id": Beginning("resp_"), "object": "response", "created_at": ANY, "model": model, "status": status,
        "error": None, "incomplete_details": None, "output": output, "usage": usage, **_UNASKED, **asked,
    }  # fmt: skip


def _response_usage(read: int, written: int) -> dict[str, Any]:
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _said(*texts: str, status: str = "completed") -> dict[str, Any]:
    return {
        "id": Beginning("msg_"), "type": "message", "role": "assistant", "status": status,
        "content": [_part(text) for text in texts],
    }  # fmt: skip


def _called(arguments: str, status: str = "completed") -> dict[str, Any]:
    return {
        "id": Beginning("fc_"), "type": "function_call", "call_id": "call_1", "name": "weather",
        "arguments": arguments, "status": status,
    }  # fmt: skip


def _numbered(model: str, *events: dict[str, Any], output: list[Any], usage: Any, **asked: Any) -> list[Any]:
    """Return the events of a whole response, whose only item is told by ``events``."""
    begun = _response(model, [], None, "in_progress", **asked)
    whole = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        *({"output_index": 0, **event} for event in events),
        {"type": "response.completed", "response": _response(model, output, usage, **asked)},
    ]
    return [{"sequence_number": number, **event} for number, event in enumerate(whole)]


def _of_text(kind: str, **members: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", "item_id": Beginning("msg_"), "content_index": 0, **members}


def _of_call(kind: str, **members: Any) -> dict[str, Any]:
    return {"type": f"response.function_call_arguments.{kind}", "item_id": Beginning("fc_"), **members}


def _sees_the_response(answer: Any, expected: Any) -> None:
    """The client for Node adds what it has put together; its helper adds what it has parsed."""
    added = {"output_text", "output_parsed"}
    assert {name: value for name, value in answer.items() if name not in added} == expected


def _sees_the_item(answer: Any, expected: Any) -> None:
    [item] = answer["output"]
    assert {name: value for name, value in item.items() if name != "parsed_arguments"} == expected


_UNKNOWN: Final = {"top_k": 7, "lora": {"name": "x", "weights": [1, 2.5, None]}}
_TOOL: Final = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
_IMAGE: Final = {
    "role": "user",
    "content": [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ],
}
_FLOWERS: Final = {"model": "mirror", "messages": [{"role": "user", "content": "h\u00e9llo \U0001f33c"}]}

TEXTS: Final = {
    "chat": Case(
        method="chat.completions.create",
        body={"model": "echo", "messages": [USER], "temperature": 0.25},
        value=_chat("echo", [_message("a fine  day")], _usage(4, 8)),
        asked={"temperature": 0.25, "last_text": "a fine  day"},
    ),
    "chat, streamed": Case(
        method="chat.completions.create",
        body={"model": "echo", "messages": [USER], "stream": True},
        events=_streamed("echo", "a", " fine", " ", " day"),
    ),
    "chat, streamed with usage": Case(
        method="chat.completions.create",
        body={
            "model": "echo",
            "messages": [USER],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        events=[
            *_streamed("echo", "a", " fine", " ", " day", usage=None),
            {**_chunk("echo", {}), "choices": [], "usage": _usage(4, 8)},
        ],
    ),
    "chat with several choices": Case(
        method="chat.completions.create",
        body={"model": "choices", "messages": [USER], "n": 2},
        value=_chat(
            "choices",
            [_message("one of 0;two of 0;", "length"), _message("one of 1;two of 1;", index=1)],
            _usage(0, 0),
        ),
    ),
    "chat with several choices, streamed": Case(
        method="chat.completions.create",
        body={"model": "choices", "messages": [USER], "n": 2, "stream": True},
        events=[
            _chunk("choices", _FIRST, index=0),
            _chunk("choices", {"content": "one of 0;"}, index=0),
            _chunk("choices", _FIRST, index=1),
            _chunk("choices", {"content": "one of 1;"}, index=1),
            _chunk("choices", {"content": "two of 0;"}, index=0),
            _chunk("choices", {"content": "two of 1;"}, index=1),
            _chunk("choices", {}, "length", index=0),
            _chunk("choices", {}, "stop", index=1),
        ],
    ),
    "chat with fields that nobody knows": Case(
        method="chat.completions.create",
        body={**_FLOWERS, "tools": [_TOOL], "tool_choice": "auto", **_UNKNOWN},
        value={**_FLOWERS, "tools": [_TOOL], "tool_choice": "auto", **_UNKNOWN},
        see=_sees_the_mirror,
    ),
    "chat with tools": Case(
        method="chat.completions.create",
        body={"model": "tools", "messages": [USER], "tools": [_TOOL]},
        value=_chat("tools", [_message(None, "tool_calls", tool_calls=[_CALL])], _usage(0, 0)),
    ),
    "chat with tools, put together from a stream": Case(
        method="chat.completions.stream",
        body={"model": "tools", "messages": [USER]},
        value=_CALL,
        see=_sees_the_call,
    ),
    "chat with an image": Case(
        method="chat.completions.create",
        body={"model": "org/vision-model", "messages": [_IMAGE]},
        value=_chat("org/vision-model", [_message("an image")], _usage(0, 0)),
        asked={"last_text": "what is this?"},
    ),
    "completion": Case(
        method="completions.create",
        body={"model": "echo", "prompt": "to be or", "echo": True},
        value=_text("echo", "to be orto be or", "stop", usage=_usage(3, 6)),
        asked={"prompt": "to be or"},
    ),
    "completion, streamed": Case(
        method="completions.create",
        body={"model": "echo", "prompt": "to be or", "stream": True},
        events=[
            _text("echo", "to"), _text("echo", " be"), _text("echo", " or"), _text("echo", "", "stop"),
        ],
        untyped="choices.0.finish_reason",
    ),
}  # fmt: skip

_FUNCTION: Final = {
    "type": "function",
    "name": "weather",
    "description": None,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}

RESPONSES: Final = {
    "response": Case(
        method="responses.create",
        body={"model": "echo", "input": "to be or", "instructions": "be brief", "metadata": {"a": "b"}},
        value=_response(
            "echo",
            [_said("to be or")],
            _response_usage(3, 6),
            instructions="be brief",
            metadata={"a": "b"},
        ),
        see=_sees_the_response,
        asked={"last_text": "to be or"},
    ),
    "response, streamed": Case(
        method="responses.create",
        body={"model": "echo", "input": "to be", "stream": True},
        events=_numbered(
            "echo",
            {"type": "response.output_item.added", "item": _said(status="in_progress")},
            _of_text("content_part.added", part=_part("")),
            _of_text("output_text.delta", delta="to", logprobs=[]),
            _of_text("output_text.delta", delta=" be", logprobs=[]),
            _of_text("output_text.done", text="to be", logprobs=[]),
            _of_text("content_part.done", part=_part("to be")),
            {"type": "response.output_item.done", "item": _said("to be")},
            output=[_said("to be")],
            usage=_response_usage(2, 4),
        ),
    ),
    "response with tools": Case(
        method="responses.create",
        body={"model": "tools", "input": "to be", "tools": [_FUNCTION]},
        value=_response("tools", [_called('{"city": "Kyoto"}')], _response_usage(0, 0), tools=[_FUNCTION]),
        see=_sees_the_response,
    ),
    "response with tools, streamed": Case(
        method="responses.create",
        body={"model": "tools", "input": "to be", "tools": [_FUNCTION], "stream": True},
        events=_numbered(
            "tools",
            {"type": "response.output_item.added", "item": _called("", "in_progress")},
            _of_call("delta", delta='{"city":'),
            _of_call("delta", delta=' "Kyoto"}'),
            _of_call("done", arguments='{"city": "Kyoto"}', name="weather"),
            {"type": "response.output_item.done", "item": _called('{"city": "Kyoto"}')},
            output=[_called('{"city": "Kyoto"}')],
            usage=_response_usage(0, 0),
            tools=[_FUNCTION],
        ),
    ),
    "response, put together from a stream": Case(
        method="responses.stream",
        body={"model": "tools", "input": "to be", "tools": [_FUNCTION]},
        value=_called('{"city": "Kyoto"}'),
        see=_sees_the_item,
    ),
}

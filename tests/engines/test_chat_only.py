"""The Messages API in front of a server that has only chat."""

from __future__ import annotations

import json
from typing import Any

import pytest
from raw_server import Visit, reply
from test_openai_engine import Outcome, ask, engine_with, posts, request

from trio_cluster.core.answer import Done, Failed, Usage
from trio_cluster.testing import read_stream

BODY: dict[str, Any] = {
    "model": "m",
    "max_tokens": 5,
    "temperature": 0.5,
    "system": "be brief",
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t", "content": "no", "is_error": True}],
        },
    ],
}
CHAT = {
    "model": "m",
    "max_tokens": 5,
    "temperature": 0.5,
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "t", "content": "no"},
    ],
}
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
WHOLE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "system_fingerprint": "fp",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "a", "tool_calls": [CALL]},
            "finish_reason": "tool_calls",
        }
    ],
    "usage": USAGE,
}
CHUNKS: list[dict[str, Any]] = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]},
    {"choices": [], "usage": USAGE},
]
JSON = "application/json"


def events(*values: Any, end: bytes = b"data: [DONE]\n\n") -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(value).encode() for value in values) + end


def server_with(chat: bytes, kind: str = JSON, status: str = "200 OK", unknown: str = "404 Not Found") -> Any:
    """Return a server that has only chat, and answers it with this."""

    async def script(visit: Visit) -> None:
        received = await visit.request()
        if received.target == "/v1/chat/completions":
            await visit.send(reply(chat, status, kind))
        else:
            await visit.send(reply(b'{"detail":"Not Found"}', unknown, JSON))

    return script


async def ask_message(server: Any, **fields: Any) -> Outcome:
    return await ask(server, request(json.dumps(BODY | fields).encode(), "messages", content_type=JSON))


@pytest.mark.parametrize("unknown", ["404 Not Found", "405 Method Not Allowed", "501 Not Implemented"])
async def test_a_request_is_translated_there_and_back(unknown: str) -> None:
    async with engine_with(server_with(json.dumps(WHOLE).encode(), unknown=unknown)) as (server, raw, _):
        for _ in range(2):
            outcome = await ask_message(server)
            message = json.loads(outcome.body)
            assert message["content"] == [
                {"type": "text", "text": "a"},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}},
            ]
            assert (message["model"], message["stop_reason"]) == ("m", "tool_use")
            assert (message["usage"]["input_tokens"], message["usage"]["cache_read_input_tokens"]) == (5, 4)
            assert "system_fingerprint" not in message
    # That the server has only chat is remembered.
    first, *others = posts(raw)
    assert first.target == "/v1/messages"
    assert [json.loads(each.body) for each in others] == [CHAT, CHAT]


async def test_a_renamed_model_has_the_servers_name_there_and_the_clusters_name_here() -> None:
    async with engine_with(server_with(json.dumps(WHOLE).encode()), ",prefix=gpu/") as (server, raw, _):
        body = json.dumps(BODY | {"model": "gpu/m"}).encode()
        outcome = await ask(server, request(body, "messages", "gpu/m", content_type=JSON))
    assert json.loads(outcome.body)["model"] == "gpu/m"
    assert json.loads(posts(raw)[1].body)["model"] == "m"


@pytest.mark.parametrize("end", [b"data: [DONE]\n\n", b"", b"data:[DONE]"])
async def test_a_stream_is_translated(end: bytes) -> None:
    async with engine_with(server_with(events(*CHUNKS, end=end), "text/event-stream")) as (server, raw, _):
        outcome = await ask_message(server, stream=True)
    assert outcome.error is None
    report = read_stream(outcome.body)
    assert (report.ending, report.text, report.finish_reasons) == ("finished", "Hello", {0: "length"})
    sent = json.loads(posts(raw)[1].body)
    assert (sent["stream"], sent["stream_options"]) == (True, {"include_usage": True})


async def test_the_usage_is_reported() -> None:
    async with engine_with(server_with(json.dumps(WHOLE).encode())) as (server, _, _):
        call = server.router.open(request(json.dumps(BODY).encode(), "messages", content_type=JSON))
        while not isinstance(await call.receive(), Done):
            pass
        assert isinstance(call.end, Done)
        assert call.end.usage == Usage(9, 2, 4)


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (events(CHUNKS[1], end=b""), 502, "before the stream was complete"),
        (events(CHUNKS[1], {"error": {"message": "it broke"}}, end=b""), 502, "it broke"),
        (events(CHUNKS[1], end=b"data: nonsense\n\n"), 502, "cannot be read"),
        (events(CHUNKS[1], {"choices": 3}, end=b""), 502, "cannot be read"),
    ],
)
async def test_a_stream_that_fails_is_never_complete(sent: bytes, status: int, message: str) -> None:
    async with engine_with(server_with(sent, "text/event-stream")) as (server, _, _):
        outcome = await ask_message(server, stream=True)
    assert outcome.error is not None
    assert outcome.error.status == status
    assert message in outcome.error.message
    assert read_stream(outcome.body).ending == "cut"


@pytest.mark.parametrize(
    ("body", "status", "message", "code"),
    [
        (
            b'{"error":{"message":"too long","code":"context","param":"x"}}',
            "400 Bad Request",
            "too long",
            "context",
        ),
        (b'{"error":{"message":"slow","code":7}}', "429 Too Many", "slow", None),
        (b"<html>", "404 Not Found", "The server behind the model answered with status 404", None),
        (b'{"error":"no"}', "500 Oh", "The server behind the model answered with status 500", None),
    ],
)
async def test_an_error_of_the_server_is_one_of_this_api(
    body: bytes, status: str, message: str, code: str | None
) -> None:
    async with engine_with(server_with(body, status=status)) as (server, _, _):
        outcome = await ask_message(server)
        assert server.list_models() == ["m"]
    assert outcome.head is None
    assert outcome.error is not None
    assert (outcome.error.status, outcome.error.message, outcome.error.code) == (
        int(status[:3]),
        message,
        code,
    )


@pytest.mark.parametrize(
    ("status", "busy"), [("429 Too Many", True), ("503 Busy", True), ("400 Bad", False), ("500 Oh", False)]
)
async def test_a_server_that_has_no_room_is_told_from_one_that_has_failed(status: str, busy: bool) -> None:
    """The next name of an alias is asked then."""
    async with engine_with(server_with(b"{}", status=status)) as (server, _, _):
        call = server.router.open(request(json.dumps(BODY).encode(), "messages", content_type=JSON))
        event = await call.receive()
    assert isinstance(event, Failed)
    assert (event.over_capacity, event.movable, event.retryable) == (busy, busy, False)


async def test_what_cannot_be_translated_is_the_clients_error() -> None:
    async with engine_with(server_with(b"{}")) as (server, raw, _):
        outcome = await ask_message(server, max_tokens="many")
    assert outcome.error is not None
    assert (outcome.error.status, outcome.error.param) == (400, "max_tokens")
    assert len(posts(raw)) == 1


async def test_a_server_that_knows_the_route_gets_it_as_it_is() -> None:
    async def script(visit: Visit) -> None:
        received = await visit.request()
        await visit.send(reply(received.body, "400 Bad Request", JSON))

    async with engine_with(script) as (server, raw, _):
        outcome = await ask_message(server, unknown=[1])
    assert json.loads(outcome.body) == BODY | {"unknown": [1]}
    assert [each.target for each in posts(raw)] == ["/v1/messages"]

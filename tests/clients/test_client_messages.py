"""The official clients of the Messages API, for Python and for Node, get what they expect, wherever the model runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from client_drivers import NODE_FOLDER
from served import Placement, Served, open_served

from trio_cluster import ApiError, ChatRequest, ClusterServer, OutputChunk

PACKAGE: Final = "@anthropic-ai/sdk"
USER: Final = {"role": "user", "content": "hi"}
TOOL: Final = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}
THOUGHT: Final = {"type": "thinking", "thinking": "hm", "signature": "EqQB=="}
CALL: Final = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": [1, "é"]}}


async def answer(request: ChatRequest) -> AsyncIterator[Any]:
    """Do what the last text says."""
    text = request.last_text
    if text == "fail":
        raise ApiError(503, "as you wish", code="wished")
    if "think" in text:
        yield {"delta": {"thinking_blocks": [{"type": "thinking", "thinking": "h"}]}}
        yield {"delta": {"thinking_blocks": [THOUGHT | {"thinking": "m"}]}}
    yield "some "
    if text == "fail late":
        raise ApiError(503, "as you wish", code="wished")
    yield "words"
    if request.tools:
        yield OutputChunk.tool_call("f", {"x": [1, "é"]}, id="toolu_1")
    yield {
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    }
    if text == "stop":
        yield {"stop_sequence": "END"}


def count(request: ChatRequest) -> int:
    return len(request.messages)


def add_model(server: ClusterServer) -> None:
    server.register_chat("claude", answer, count_tokens=count)
    server.register_chat("uncounted", answer)


@pytest.fixture
async def served(placement: Placement) -> AsyncIterator[Served]:
    async with open_served(placement, api_key="a-key") as running:
        add_model(running.back)
        yield running


def order(method: str, body: dict[str, Any], **client: Any) -> dict[str, Any]:
    least = {"model": "claude", "messages": [USER]}
    if method != "count_tokens":
        least["max_tokens"] = 100
    return {"method": method, "body": least | body, "client": client}


def ask_python(url: str, orders: list[dict[str, Any]]) -> list[Any]:
    import anthropic

    def ask(method: str, body: dict[str, Any], client: dict[str, Any]) -> dict[str, Any]:
        key = client.get("apiKey", "a-key")
        settings = (
            {"auth_token": client["authToken"], "api_key": None}
            if "authToken" in client
            else {"api_key": key}
        )
        with anthropic.Anthropic(base_url=url, max_retries=0, timeout=10, **settings) as asked:
            texts: list[str] = []
            try:
                if method == "stream":
                    with asked.messages.stream(**body) as stream:
                        for text in stream.text_stream:
                            texts.append(text)
                        return {"value": stream.get_final_message().to_dict(mode="json"), "texts": texts}
                value = getattr(asked.messages, method)(**body)
                return {"value": value.to_dict(mode="json"), "has_request_id": bool(value._request_id)}
            except anthropic.APIStatusError as error:
                described = {
                    "name": type(error).__name__,
                    "status": error.status_code,
                    "type": error.body["error"]["type"],
                    "message": str(error),
                    "has_request_id": bool(error.response.headers.get("request-id")),
                }
                return {"error": described, "texts": texts}

    return [ask(**each) for each in orders]


def ask_node(url: str, orders: list[dict[str, Any]]) -> list[Any]:
    node, folder = shutil.which("node"), os.environ[NODE_FOLDER]
    assert node is not None
    program = Path(__file__).parent / "node" / "anthropic.mjs"
    run = subprocess.run(
        [node, str(program), folder, url, json.dumps(orders)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    outcomes: list[Any] = json.loads(run.stdout)
    return outcomes


@pytest.fixture(params=[ask_python, ask_node], ids=["python", "node"])
def client(request: pytest.FixtureRequest) -> Any:
    if request.param is ask_python:
        pytest.importorskip("anthropic")
    else:
        node, folder = shutil.which("node"), os.environ.get(NODE_FOLDER)
        if node is None or folder is None or not (Path(folder) / "node_modules" / PACKAGE).is_dir():
            pytest.skip(f"{NODE_FOLDER} does not name a folder with {PACKAGE} in it; see docs/testing.md")
    return request.param


TEXT: Final = {"type": "text", "text": "some words"}
USAGE: Final = {
    "input_tokens": 5,
    "output_tokens": 2,
    "cache_read_input_tokens": 4,
    "cache_creation_input_tokens": 0,
}

#: What is asked, the blocks of the answer, and why it ends.
CASES: Final[dict[str, tuple[dict[str, Any], list[Any], str]]] = {
    "text": ({}, [TEXT], "end_turn"),
    "system and blocks": (
        {
            "system": [{"type": "text", "text": "brief", "cache_control": {"type": "ephemeral"}}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "metadata": {"user_id": "u"},
        },
        [TEXT],
        "end_turn",
    ),
    "a tool": ({"tools": [TOOL], "tool_choice": {"type": "any"}}, [TEXT, CALL], "tool_use"),
    "the result of a tool": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [THOUGHT, CALL]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no", "is_error": True},
                        {"type": "text", "text": "and?"},
                    ],
                },
            ]
        },
        [TEXT],
        "end_turn",
    ),
    "thinking": (
        {
            "messages": [{"role": "user", "content": "think"}],
            "max_tokens": 2000,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        },
        [THOUGHT, TEXT],
        "end_turn",
    ),
    "a stop sequence": (
        {"messages": [{"role": "user", "content": "stop"}], "stop_sequences": ["END"]},
        [TEXT],
        "stop_sequence",
    ),
}


async def test_every_case_has_its_answer_streamed_and_plain(served: Served, client: Any) -> None:
    orders = [order(method, body) for body, _, _ in CASES.values() for method in ("create", "stream")]
    outcomes = await trio.to_thread.run_sync(client, served.url, orders)
    for name, (plain, streamed) in zip(CASES, zip(outcomes[::2], outcomes[1::2], strict=True), strict=True):
        _, blocks, reason = CASES[name]
        for outcome in (plain, streamed):
            assert "error" not in outcome, (name, outcome)
            message = outcome["value"]
            # Some versions of the clients add members of their own.
            seen = [
                {member: each.get(member) for member in block}
                for each, block in zip(message["content"], blocks, strict=True)
            ]
            assert seen == blocks, name
            assert message["stop_reason"] == reason
            assert message["stop_sequence"] == ("END" if reason == "stop_sequence" else None)
            assert {member: message["usage"][member] for member in USAGE} == USAGE
        assert plain["has_request_id"]
        assert "".join(streamed["texts"]) == "some words"


REFUSED: Final[dict[str, tuple[dict[str, Any], set[str], int, str]]] = {
    "key": (order("create", {}, apiKey="wrong"), {"AuthenticationError"}, 401, "authentication_error"),
    "model": (order("create", {"model": "nobody"}), {"NotFoundError"}, 404, "not_found_error"),
    "field": (order("create", {"max_tokens": 0}), {"BadRequestError"}, 400, "invalid_request_error"),
    "failure": (
        order("create", {"messages": [{"role": "user", "content": "fail"}]}),
        {"InternalServerError", "OverloadedError"}, 529, "overloaded_error",
    ),
    "failure of a stream": (
        order("stream", {"messages": [{"role": "user", "content": "fail"}]}),
        {"InternalServerError", "OverloadedError"}, 529, "overloaded_error",
    ),
    "not counted": (
        order("count_tokens", {"model": "uncounted"}),
        {"InternalServerError", "HTTPNotImplementedError", "NotImplementedError"}, 501, "api_error",
    ),
}  # fmt: skip


async def test_every_refusal_is_the_right_exception(served: Served, client: Any) -> None:
    orders = [asked for asked, *_ in REFUSED.values()]
    outcomes = await trio.to_thread.run_sync(client, served.url, orders)
    for name, outcome in zip(REFUSED, outcomes, strict=True):
        _, names, status, kind = REFUSED[name]
        error = outcome["error"]
        assert (error["status"], error["type"]) == (status, kind), name
        assert error["name"] in names, name
        assert error["has_request_id"], name


async def test_a_stream_that_fails_late_raises_with_the_reason(served: Served, client: Any) -> None:
    asked = order("stream", {"messages": [{"role": "user", "content": "fail late"}]})
    [outcome] = await trio.to_thread.run_sync(client, served.url, [asked])
    assert outcome["texts"] == ["some "]
    assert "as you wish" in outcome["error"]["message"]
    assert outcome["error"]["type"] == "overloaded_error"


async def test_tokens_are_counted_and_the_key_may_be_a_bearer_token(served: Served, client: Any) -> None:
    orders = [order("count_tokens", {"system": "s"}), order("create", {}, authToken="a-key", apiKey=None)]
    counted, answered = await trio.to_thread.run_sync(client, served.url, orders)
    assert counted["value"]["input_tokens"] == 2
    assert "error" not in answered, answered

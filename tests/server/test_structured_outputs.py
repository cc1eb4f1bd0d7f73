"""Models that were registered with ``validate=True``: answers that do not fit what the client has asked for."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from trio_cluster import ChatRequest, ClusterServer, OutputChunk, Provider
from trio_cluster.errors import ClusterError
from trio_cluster.local.handler import HandlerTask
from trio_cluster.testing import SimulatedCluster, open_cluster, read_stream, settle, worker

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}
GOOD = '{"name": "Ada", "age": 36}'
WRONG = {
    "not JSON": "Ada is 36",
    "not complete": GOOD[:-1],
    "not an object": "[]",
    "nothing": "",
    "a missing member": '{"name": "Ada"}',
    "a wrong type": '{"name": "Ada", "age": "36"}',
    "too much": '{"name": "Ada", "age": 36, "more": 1}',
    "no number": '{"name": "Ada", "age": NaN}',
}


def serve(server: ClusterServer) -> None:
    async def say(request: ChatRequest) -> AsyncIterator[str]:
        for letter in request.last_text:
            yield letter

    server.register_chat("checked", say, validate=True)
    server.chat("unchecked")(say)


@pytest.fixture
async def cluster() -> AsyncIterator[SimulatedCluster]:
    async with open_cluster() as opened:
        server = worker("w")
        serve(server)
        await opened.start_worker(server)
        yield opened
        await settle(opened)


def format_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}


async def ask(
    cluster: SimulatedCluster,
    text: str,
    model: str = "checked",
    *,
    stream: bool = False,
    response_format: dict[str, Any] | None = None,
) -> tuple[int, bytes]:
    body = {
        "model": model,
        "stream": stream,
        "messages": [{"role": "user", "content": text}],
        "response_format": response_format or format_of(SCHEMA),
    }
    answer = await cluster.client().post("/v1/chat/completions", body)
    return answer.status, answer.body


async def error_of(cluster: SimulatedCluster, text: str, **options: Any) -> tuple[int, str, str]:
    status, body = await ask(cluster, text, **options)
    error = json.loads(body)["error"]
    return status, error["code"], error["message"]


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
async def test_an_answer_that_does_not_fit_is_an_error(cluster: SimulatedCluster, text: str) -> None:
    assert (await error_of(cluster, text))[:2] == (500, "invalid_structured_output")
    status, data = await ask(cluster, text, stream=True)
    # A stream that has not begun can still have another status.
    assert status == (200 if text else 500)
    if text:
        report = read_stream(data)
        assert (report.ending, report.text) == ("failed", text)
    assert b"invalid_structured_output" in data
    assert b"[DONE]" not in data
    assert b'"finish_reason":"stop"' not in data
    # What nobody has asked to be checked passes.
    assert (await ask(cluster, text, "unchecked"))[0] == 200
    assert (await ask(cluster, text, response_format={"type": "text"}))[0] == 200


async def test_an_answer_that_fits_passes(cluster: SimulatedCluster) -> None:
    status, body = await ask(cluster, GOOD)
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, GOOD)
    report = read_stream((await ask(cluster, GOOD, stream=True))[1])
    assert (report.ending, report.text) == ("finished", GOOD)
    assert (await ask(cluster, "[1]", response_format=format_of({"type": "array"})))[0] == 200
    assert (await ask(cluster, "{}", response_format={"type": "json_object"}))[0] == 200
    assert (await error_of(cluster, "[]", response_format={"type": "json_object"}))[0] == 500


async def test_the_error_says_where_the_answer_does_not_fit(cluster: SimulatedCluster) -> None:
    message = (await error_of(cluster, WRONG["a wrong type"]))[2]
    assert "$.age: '36' is not of type 'integer'" in message


async def test_a_response_fails_in_its_own_grammar(cluster: SimulatedCluster) -> None:
    wanted = {"type": "json_schema", "name": "person", "schema": SCHEMA}
    body = {"model": "checked", "input": "no", "text": {"format": wanted}}
    answer = await cluster.client().post("/v1/responses", body)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (500, "invalid_structured_output")
    answer = await cluster.client().post("/v1/responses", body | {"stream": True})
    assert b"response.failed" in answer.body
    assert b"response.completed" not in answer.body
    assert (await cluster.client().post("/v1/responses", body | {"input": GOOD})).status == 200


HOSTILE: dict[str, tuple[Any, str]] = {
    "not a schema": ({"type": "nothing"}, "$.type"),
    "too large": ({"enum": ["x" * 300_000]}, "bytes"),
    "elsewhere": ({"$ref": "http://127.0.0.1:1/schema.json"}, "Unresolvable"),
    "nowhere": ({"$ref": "#/$defs/missing"}, "cannot be used"),
    "in a circle": ({"$ref": "#"}, "cannot be used"),
    "exponential": (
        {
            "$ref": "#/$defs/0",
            "$defs": {
                **{str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 10} for i in range(9)},
                "9": {"type": "object"},
            },
        },
        "too far",
    ),
}


@pytest.mark.parametrize(("schema", "why"), HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_schema_that_cannot_be_used_is_the_clients_fault(
    cluster: SimulatedCluster, schema: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    monkeypatch.setattr(urllib.request, "urlopen", fetched.append)
    status, code, message = await error_of(cluster, "{}", response_format=format_of(schema))
    assert (status, code) == (400, "invalid_json_schema")
    assert why in message
    assert fetched == []


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"pattern": "^(x+x+)+y$"}}},
        {"patternProperties": {"^(x+x+)+y$": {}}, "additionalProperties": False},
        {"patternProperties": {"^(x+x+)+y$": {}}, "unevaluatedProperties": False},
    ],
)
async def test_a_regular_expression_of_a_client_is_not_evaluated(
    cluster: SimulatedCluster, schema: Any
) -> None:
    began = time.monotonic()
    text = json.dumps({"a": "x" * 40, "x" * 40: 1})
    assert (await ask(cluster, text, response_format=format_of(schema)))[0] == 200
    assert time.monotonic() - began < 5


async def test_what_the_model_has_not_finished_is_not_checked(cluster: SimulatedCluster) -> None:
    @cluster.master.server.chat("ends", validate=True)
    async def ends(request: ChatRequest) -> AsyncIterator[Any]:
        if request.last_text == "length":
            yield "{"
            yield OutputChunk.finish("length")
        elif request.last_text == "tool":
            yield OutputChunk.tool_call("f", {})
        elif request.last_text == "refusal":
            yield {"refusal": "No."}
        elif request.last_text == "second":
            yield OutputChunk.text_delta("{}", 0)
            yield OutputChunk.text_delta("[]", 1)
        elif request.last_text == "final":
            yield "draft"
            yield OutputChunk.final_text("{}")
        else:
            yield {"content": GOOD[:5]}
            yield {"content": GOOD[5:]}

    wanted = {"type": "json_object"}
    for text in ("length", "tool", "refusal", "final", "dict"):
        assert (await ask(cluster, text, "ends", response_format=wanted))[0] == 200, text
    body = {"model": "ends", "n": 2, "messages": [{"role": "user", "content": "second"}]}
    answer = await cluster.client().post("/v1/chat/completions", body | {"response_format": wanted})
    assert answer.status == 500
    assert b"Choice 1 does not fit" in answer.body


async def test_a_handler_that_ends_its_output_early_is_checked_when_it_returns(
    cluster: SimulatedCluster,
) -> None:
    seen = []

    @cluster.master.server.chat("pushes", validate=True)
    async def pushes(request: ChatRequest, provider: Provider) -> None:
        await provider.push(request.last_text)
        provider.end()
        provider.end()
        with pytest.raises(trio.ClosedResourceError):
            await provider.push("more")
        seen.append("after")

    assert (await ask(cluster, GOOD, "pushes"))[0] == 200
    assert (await ask(cluster, "no", "pushes"))[0] == 500
    assert seen == ["after"] * 2


async def test_nothing_is_collected_for_a_client_that_asks_for_text(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = []
    monkeypatch.setattr(HandlerTask, "end", lambda self, end=HandlerTask.end: (tasks.append(self), end(self)))
    await ask(cluster, "text", response_format={"type": "text"})
    assert [task._check for task in tasks] == [None]


def test_a_missing_library_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from trio_cluster.openai.responses import structured

    structured._validator_class.cache_clear()
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    server = ClusterServer()
    with pytest.raises(ClusterError, match=r"jsonschema: pip install jsonschema$"):
        server.register_chat("m", lambda request: "x", validate=True)
    server.register_chat("m", lambda request: "x")

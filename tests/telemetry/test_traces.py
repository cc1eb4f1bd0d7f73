"""Traces over all nodes, as a collector gets them: one trace, the right parents, and how everything has ended."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import patience
import pytest
import trio
from raw_server import Visit, open_raw_server, reply

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra 'otel' is not installed")

from opentelemetry import trace
from traced import PARENT, SPAN_OF_CLIENT, TRACE, open_traced

from trio_cluster import ASRRequest, ChatRequest, ClusterServer, CustomRequest, OutputChunk, from_asyncio
from trio_cluster.engines import parse_serve, serve_engine
from trio_cluster.errors import ApiError
from trio_cluster.telemetry import names

tracer = trace.get_tracer("a handler")


async def answer(request: ChatRequest) -> AsyncIterator[Any]:
    yield "a"
    yield OutputChunk.usage(7, 5)


def serving(handler: Any, model: str = "m") -> Any:
    return lambda server: server.register_chat(model, handler)


WHOLE = [("POST /v1/chat/completions", [("chat m", [("attempt", [("link", ["handler"])])])])]


@pytest.mark.parametrize("stories", [0, 100])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("otel", [False, True], ids=["master only", "both"])
async def test_one_trace_over_a_master_and_a_worker(
    otel: bool, stream: bool, stories: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.time_ns()
    async with open_traced(monkeypatch, stories=stories) as traced:
        await traced.worker("w1", serving(answer), otel=otel)
        headers = {**PARENT, "x-request-id": "r1", "user-agent": "tests/1"}
        assert (
            await traced.ask(headers=headers, stream=stream, max_tokens=9, temperature=0.5)
        ).status_code == 200
        port = traced.master.port
        await traced.stop()
        traced.check_tree(WHOLE)
        spans = {span.name: span for span in traced.collector.spans}
    assert {span.trace_id for span in spans.values()} == {TRACE}
    assert {span.status for span in spans.values()} == {"unset"}
    for span in spans.values():
        assert began <= span.begin <= span.end <= time.time_ns()
    server = spans["POST /v1/chat/completions"]
    assert (server.kind, server.parent) == ("server", SPAN_OF_CLIENT)
    assert server.attributes.pop("client.port") > 0
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "http.request.header.x-request-id": ["r1"],
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "server.address": "127.0.0.1",
        "server.port": port,
        "client.address": "127.0.0.1",
        "user_agent.original": "tests/1",
        "trio_cluster.request.id": "r1",
        "trio_cluster.outcome": "completed",
        "trio_cluster.ended_by": "model",
    }
    inference = spans["chat m"]
    assert inference.kind == "client"
    if stream:
        assert 0 <= inference.attributes.pop("gen_ai.response.time_to_first_chunk") < 10
        assert inference.attributes.pop("gen_ai.request.stream") is True
    assert inference.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "trio_cluster",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 5,
        "trio_cluster.request.id": "r1",
        "trio_cluster.outcome": "completed",
        "trio_cluster.ended_by": "model",
        "trio_cluster.attempts": 1,
    }
    attempt = spans["attempt"]
    assert attempt.attributes.pop("trio_cluster.delivered_bytes") > 10
    assert attempt.attributes == {
        "trio_cluster.attempt.number": 1,
        "trio_cluster.attempt.why": "the only one",
        "trio_cluster.node": "w1",
        "trio_cluster.model": "m",
        "trio_cluster.outcome": "completed",
    }
    assert attempt.events == [("first output", {})]
    handler = spans["handler"]
    assert handler.kind == ("server" if otel else "internal")
    assert handler.resource["trio_cluster.node"] == ("w1" if otel else "master")
    assert handler.attributes == {
        "trio_cluster.node": "w1",
        "trio_cluster.model": "m",
        "trio_cluster.endpoint": "chat.completions",
        "trio_cluster.request.id": "r1",
        "trio_cluster.outcome": "completed",
    }
    assert server.resource["service.name"] == "trio-cluster"
    assert server.resource["service.instance.id"] == f"master-{os.getpid()}"
    assert {(span.scope, span.schema) for span in spans.values()} == {("trio_cluster", names.SCHEMA_URL)}


@pytest.mark.parametrize("sampled", ["01", "00"])
@pytest.mark.parametrize("otel", [False, True], ids=["master only", "both"])
async def test_the_server_behind_a_worker_gets_the_context_of_its_handler(
    otel: bool, sampled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(visit: Visit) -> None:
        while True:
            received = await visit.request()
            models = {"object": "list", "data": [{"id": "m", "object": "model"}]}
            answer = models if received.method == "GET" else {"object": "chat.completion", "choices": []}
            await visit.send(reply(json.dumps(answer).encode()))

    headers = {"traceparent": f"00-{TRACE}-{SPAN_OF_CLIENT}-{sampled}", "tracestate": "vendor=1"}
    async with (
        open_traced(monkeypatch) as traced,
        open_raw_server(script) as raw,
        trio.open_nursery() as nursery,
    ):
        worker = await traced.worker("w1", lambda server: None, otel=otel)
        await nursery.start(serve_engine, parse_serve(f"openai:{raw.url}"), worker)
        with patience.fail_after(5):
            while "m" not in traced.master.list_models():  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert (await traced.ask(headers=headers)).status_code == 200
        nursery.cancel_scope.cancel()
        await traced.stop()
        (asked,) = [each for each in raw.received if each.method == "POST"]
        assert asked.headers["tracestate"] == "vendor=1"
        if sampled == "00":
            assert asked.headers["traceparent"][:36] == f"00-{TRACE}-"
            assert asked.headers["traceparent"].endswith("-00")
            assert traced.collector.spans == []
            return
        assert asked.headers["traceparent"] == f"00-{TRACE}-{traced.collector.one('handler').id}-01"
        traced.check_tree(WHOLE)


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
@pytest.mark.parametrize("stream", [False, True])
async def test_why_an_answer_ended(stream: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cut(request: ChatRequest) -> AsyncIterator[Any]:
        yield "a"
        for index in range(request.n):
            yield OutputChunk.finish("length" if index == request.n - 1 else "stop", index)

    body: dict[str, Any] = {"model": "m", "stream": stream, "max_tokens": 5}
    expected = ["length"]
    if path == "responses":
        body["input"] = "hi"
    else:
        body["messages"] = [{"role": "user", "content": "hi"}]
    if path == "chat/completions":
        body["n"] = 2
        expected = ["stop", "length"]
    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", serving(cut), otel=False)
        async with traced.client(**PARENT) as client:
            assert (await client.post(f"/v1/{path}", json=body)).status_code == 200
        await traced.stop()
        assert traced.collector.one(f"POST /v1/{path}").status == "unset"
        assert traced.collector.one("chat m").attributes["gen_ai.response.finish_reasons"] == expected


async def test_a_large_upload_and_a_route_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def size(request: ASRRequest) -> str:
        with tracer.start_as_current_span("inner"):
            return str(len(request.audio))

    async def echo(request: CustomRequest) -> Any:
        return {"header": request.headers["traceparent"]}

    def add(server: ClusterServer) -> None:
        server.register_asr("a", size)
        server.route("/v1/tokenize", "t", echo)

    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", add)
        async with traced.client(**PARENT) as client:
            audio = {"file": ("a.wav", b"x" * 3_000_000)}
            response = await client.post("/v1/audio/transcriptions", data={"model": "a"}, files=audio)
            assert response.json()["text"] == "3000000"
            response = await client.post("/v1/tokenize", json={"model": "t"})
        await traced.stop()
        traced.check_tree(
            [
                (
                    f"POST /v1/{path}",
                    [(name, [("attempt", [("link", [("handler", below) if below else "handler"])])])],
                )
                for path, name, below in (
                    ("audio/transcriptions", "transcription a", ["inner"]),
                    ("tokenize", "tokenize t", []),
                )
            ]
        )
        handler = traced.collector.named("handler")[-1]
    assert response.json()["header"] == f"00-{TRACE}-{handler.id}-01"


async def test_a_client_without_a_trace_begins_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", serving(answer))
        for headers in (
            {},
            {"traceparent": "nonsense"},
            {"traceparent": f"00-{'0' * 32}-{SPAN_OF_CLIENT}-01"},
        ):
            await traced.ask(headers=headers)
        await traced.stop()
        traced.check_tree(WHOLE * 3)
        roots = traced.collector.named("POST /v1/chat/completions")
    assert {span.parent for span in roots} == {""}
    assert len({span.trace_id for span in roots}) == 3


async def test_no_span_has_a_key_or_a_part_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "tc-" + "a1b2c3d4" * 5
    async with open_traced(monkeypatch) as traced:
        traced.master.options.server.api_key = key
        await traced.worker("w1", serving(answer))
        headers = {"authorization": f"Bearer {key}", "x-request-id": key, "user-agent": f"curl {key}"}
        response = await traced.ask(headers=headers, user="my prompt")
        assert response.status_code == 200
        await traced.stop()
        shown = repr(traced.collector.spans)
    assert key not in shown
    assert "prompt" not in shown
    assert traced.collector.one("chat m").trace_id


# Sampling


@pytest.mark.parametrize(
    ("variables", "headers"),
    [
        ({}, {"traceparent": f"00-{TRACE}-{SPAN_OF_CLIENT}-00"}),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, PARENT),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, {}),
    ],
)
async def test_of_a_request_that_is_not_sampled_nothing_is_made(
    variables: dict[str, str], headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def handler(request: ChatRequest) -> str:
        seen.append(trace.get_current_span().get_span_context())
        with tracer.start_as_current_span("inner") as span:
            seen.append(span)
        return request.headers["traceparent"]

    made: list[object] = []

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for what in ("exporting.ReadableSpan", "exporting.HandlerSpan", "request_spans.ending_of"):
        monkeypatch.setattr(f"trio_cluster.telemetry.{what}", lambda *args, **more: made.append(args))
    async with open_traced(monkeypatch, stories=0) as traced:
        await traced.worker("w1", serving(handler))
        response = await traced.ask(headers=headers)
        assert response.status_code == 200
        header = response.json()["choices"][0]["message"]["content"]
        assert (await traced.ask("unheard of", headers=headers)).status_code == 404
        await traced.stop()
        assert traced.collector.spans == made == []
    # What comes next does not sample it either.
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", header)
    context, span = seen
    assert not context.trace_flags.sampled
    assert not span.is_recording()
    assert f"{context.trace_id:032x}-{context.span_id:016x}" in header


async def test_a_share_of_the_requests_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", serving(answer))
        for last in range(32):
            # The sampler decides by the trace's id.
            trace_id = f"{TRACE[:16]}{last % 2 * 'f' or '0'}{TRACE[17:]}"
            await traced.ask(headers={"traceparent": f"00-{trace_id}-{SPAN_OF_CLIENT}-01"})
        await traced.stop()
        roots = traced.collector.named("POST /v1/chat/completions")
        assert len(roots) == len(traced.collector.named("handler")) == 16


# Handlers' own spans


async def nested(request: ChatRequest) -> AsyncIterator[str]:
    with tracer.start_as_current_span("inner"):
        trace.get_current_span().set_attribute("depth", 2)
        yield "a"
    trace.get_current_span().set_attribute("depth", 1)


async def nested_value(request: ChatRequest) -> str:
    trace.get_current_span().set_attribute("depth", 1)
    with tracer.start_as_current_span("inner", attributes={"depth": 2}):
        return "a"


def nested_in_thread(request: ChatRequest) -> Iterator[str]:
    trace.get_current_span().set_attribute("depth", 1)
    with tracer.start_as_current_span("inner", attributes={"depth": 2}):
        yield "a"


def nested_value_in_thread(request: ChatRequest) -> str:
    trace.get_current_span().set_attribute("depth", 1)
    span = tracer.start_span("inner", attributes={"depth": 2})
    span.end()
    return "a"


@pytest.mark.parametrize(
    "handler",
    [
        nested,
        nested_value,
        nested_in_thread,
        nested_value_in_thread,
        from_asyncio(nested),
        from_asyncio(nested_value),
    ],
    ids=["async generator", "async", "generator", "def", "asyncio generator", "asyncio"],
)
@pytest.mark.parametrize("where", ["master", "worker"])
async def test_the_spans_of_a_handler_nest_in_its_own(
    where: str, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_traced(monkeypatch) as traced:
        if where == "worker":
            await traced.worker("w1", serving(handler))
        else:
            traced.master.register_chat("m", handler)
        assert (await traced.ask()).status_code == 200
        await traced.stop()
        inside = ("handler", ["inner"])
        below = [("link", [inside])] if where == "worker" else [inside]
        traced.check_tree([("POST /v1/chat/completions", [("chat m", [("attempt", below)])])])
        assert traced.collector.one("handler").attributes["depth"] == 1
        inner = traced.collector.one("inner")
        assert (inner.attributes, inner.scope) == ({"depth": 2}, "a handler")
        assert inner.resource["trio_cluster.node"] == ("w1" if where == "worker" else "master")


async def test_the_example_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tracing.md").read_text("utf-8")  # noqa: ASYNC240
    (code,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    async with open_traced(monkeypatch) as traced:
        traced.master.register_chat("m", names["answer"])
        await traced.ask()
        await traced.stop()
        assert traced.collector.one("handler").attributes["prompt.template"] == "v2"
        assert traced.collector.one("retrieve").parent == traced.collector.one("handler").id


# How it ends


async def test_a_handler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(request: ChatRequest) -> str:
        raise RuntimeError("of the handler")

    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", serving(fail))
        assert (await traced.ask()).status_code == 500
        await traced.stop()
        traced.check_tree(WHOLE)
        spans = {span.name: span for span in traced.collector.spans}
    assert {name for name, span in spans.items() if span.status == "error"} == spans.keys() - {"link"}
    assert spans["POST /v1/chat/completions"].attributes["error.type"] == "500"
    for name in ("chat m", "attempt", "handler"):
        assert spans[name].attributes["error.type"] == "handler_failed"
    ((event, attributes),) = spans["handler"].events
    assert (event, attributes["exception.message"]) == ("exception", "of the handler")
    # Its message is for the log; the trace has it where the handler ran, and nowhere else.
    assert "of the handler" not in spans["chat m"].message


async def test_a_stream_that_fails_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(request: ChatRequest) -> AsyncIterator[str]:
        yield "a"
        raise ApiError(429, "no more", code="enough")

    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", serving(fail))
        assert (await traced.ask(stream=True)).status_code == 200
        await traced.stop()
        spans = {span.name: span for span in traced.collector.spans}
    for name in ("POST /v1/chat/completions", "chat m", "attempt", "handler"):
        assert (spans[name].status, spans[name].attributes["error.type"]) == ("error", "enough"), name


@pytest.mark.parametrize(
    ("model", "headers", "status", "code"),
    [("unheard-of", {}, 404, "model_not_found"), ("m", {"content-type": "x/y"}, 415, None)],
)
async def test_a_request_that_is_refused_has_one_span_which_is_no_error(
    model: str, headers: dict[str, str], status: int, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", serving(answer))
        response = await traced.ask(model, headers={**PARENT, **headers})
        await traced.stop()
        traced.check_tree(["POST /v1/chat/completions"])
        (span,) = traced.collector.spans
    assert response.status_code == span.attributes["http.response.status_code"]
    assert 400 <= response.status_code < 500
    assert span.status == "unset"
    assert span.attributes["trio_cluster.outcome"] == "refused"
    assert span.attributes["error.type"]


@pytest.mark.parametrize("who", ["client", "operator", "deadline"])
async def test_who_has_cancelled_it(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    began = trio.Event()

    async def forever(request: ChatRequest) -> AsyncIterator[str]:
        yield "a"
        began.set()
        await trio.sleep_forever()

    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", serving(forever))
        headers = {**PARENT, "x-request-id": "r1"}
        if who == "deadline":
            headers["x-request-timeout"] = "0.2"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: traced.ask(headers=headers, stream=True))
            await began.wait()
            if who == "client":
                nursery.cancel_scope.cancel()
            elif who == "operator":
                async with traced.client() as client:
                    assert (await client.post("/cluster/calls/r1/cancel")).status_code == 200
        await traced.stop()
        traced.check_tree(WHOLE)
        spans = {span.name: span for span in traced.collector.spans}
    server, attempt = spans["POST /v1/chat/completions"], spans["attempt"]
    if who == "deadline":
        assert server.attributes["trio_cluster.outcome"] == "timed_out"
        assert (server.attributes["error.type"], server.status) == ("timeout", "error")
        assert attempt.status == "error"
        return
    assert server.attributes["trio_cluster.outcome"] == "cancelled"
    assert server.attributes["trio_cluster.ended_by"] == who
    assert (attempt.attributes["trio_cluster.outcome"], attempt.attributes["trio_cluster.cancelled.by"]) == (
        "cancelled",
        who,
    )
    assert server.status == attempt.status == ("unset" if who == "client" else "error")
    assert spans["handler"].attributes["trio_cluster.outcome"] == "cancelled"


async def test_a_request_that_is_retried_has_two_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    began = trio.Event()

    async def first_hangs(request: ChatRequest) -> str:
        asked.append(request.worker)
        if len(asked) == 1:
            began.set()
            await trio.sleep_forever()
        return "a"

    async with open_traced(monkeypatch, on_conflict="replicate", resume_window=0.0) as traced:
        for name in ("w1", "w2"):
            await traced.worker(name, serving(first_hangs))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(traced.ask)
            await began.wait()
            traced.master.worker_manager.drop_worker(asked[0], "for a test")
        await traced.stop()
        attempts = sorted(traced.collector.named("attempt"), key=lambda span: span.begin)
        inference = traced.collector.one("chat m")
        assert {span.parent for span in attempts} == {inference.id}
    first, second = attempts
    assert [span.attributes["trio_cluster.node"] for span in attempts] == asked
    assert [span.attributes["trio_cluster.attempt.number"] for span in attempts] == [1, 2]
    assert first.attributes["trio_cluster.outcome"] == "worker_lost"
    assert (first.status, first.attributes["error.type"]) == ("error", "worker_lost")
    assert (second.status, second.attributes["trio_cluster.outcome"]) == ("unset", "completed")
    assert first.end <= second.begin
    assert inference.attributes["trio_cluster.attempts"] == 2
    assert inference.status == "unset"
    # The first handler has a parent, too.
    ids = {span.id for span in traced.collector.spans}
    assert all(span.parent in ids for span in traced.collector.named("handler"))


@pytest.mark.parametrize("otel", [False, True], ids=["master only", "both"])
@pytest.mark.parametrize("queue", ["node", "model"])
async def test_the_wait_for_a_slot_has_a_span(
    queue: str, otel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go = trio.Event(), trio.Event()

    async def slow(request: ChatRequest) -> str:
        began.set()
        await go.wait()
        return "a"

    def add(server: ClusterServer) -> None:
        server.register_chat("m", slow, **({"max_concurrency": 1} if queue == "model" else {}))

    async with open_traced(monkeypatch) as traced:
        worker = await traced.worker("w1", add, otel=otel, max_concurrency=1 if queue == "node" else 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(traced.ask)
            await began.wait()
            nursery.start_soon(traced.ask)
            with patience.fail_after(5):
                while not any(call.queued for call in worker.router.live):  # noqa: ASYNC110
                    await trio.sleep(0.001)
            go.set()
        await traced.stop()
        span = traced.collector.one("queue")
        (handler,) = [each for each in traced.collector.named("handler") if each.parent == span.parent]
    assert span.attributes == {"trio_cluster.queue": queue}
    assert span.begin < span.end <= handler.begin + 1_000_000


async def test_two_servers_of_a_process_have_spans_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, and with one provider of the process."""
    for _ in range(2):
        async with open_traced(monkeypatch) as traced:
            await traced.worker("w1", serving(nested))
            await traced.ask()
            await traced.stop()
            assert len(traced.collector.named("inner")) == 1

"""Handlers as backends: what they are given, what becomes of their output, and how they end."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import attrs
import pytest
import trio
from handler_bench import Bench, echo, failure, released
from memory_cluster import everything, text
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.core.answer import Data, Done, Head, Usage
from trio_cluster.core.limits import WINDOW
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError
from trio_cluster.local.adapters import Provider, ThreadProvider
from trio_cluster.local.handler import HandlerBackend
from trio_cluster.local.pool import HandlerPool
from trio_cluster.openai import ChatRequest, CustomRequest, OutputChunk
from trio_cluster.options import ClusterServerOptions
from trio_cluster.testing import read_stream


async def test_a_handler_answers_with_head_data_and_done(bench: Bench) -> None:
    call = bench.open(echo)
    events = await everything(call)
    assert isinstance(events[0], Head)
    assert events[0].content_type == "text/event-stream"
    assert isinstance(events[-1], Done)
    assert text(events).endswith("data: [DONE]\n\n")
    await released(call)
    assert bench.pool.running == 0


async def test_a_plain_answer_is_one_json_object(bench: Bench) -> None:
    events = await everything(bench.open(echo, stream=False))
    assert json.loads(text(events))["choices"][0]["message"]["content"] == "abc"


async def test_a_body_that_the_master_has_checked_is_not_checked_again(bench: Bench) -> None:
    async def temperature(request: ChatRequest) -> str:
        return str(request.temperature)

    body = b'{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":3}'
    asked = Request(endpoint="chat.completions", kind="chat", model="m", body=body)
    backend = bench.backend(temperature)
    assert (await failure(backend.open(asked))).status == 400
    events = await everything(backend.open(attrs.evolve(asked, checked=True)))
    assert json.loads(text(events))["choices"][0]["message"]["content"] == "3.0"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_of_an_answer_has_the_usage_that_its_handler_reported_and_why_it_ended(
    bench: Bench, stream: bool
) -> None:
    async def counts(request: ChatRequest) -> AsyncIterator[Any]:
        yield "x"
        yield {"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}}

    for handler, usage in ((echo, None), (counts, Usage(prompt_tokens=3, cached_tokens=2))):
        assert (await everything(bench.open(handler, stream=stream)))[-1] == Done(usage, "stop")


async def test_a_long_plain_answer_gives_signs_of_life(bench: Bench, autojump_clock: MockClock) -> None:
    async def long(request: ChatRequest) -> AsyncIterator[str]:
        for _ in range(100):
            await trio.sleep(0.1)
            yield "x"

    call = bench.open(long, stream=False, idle_timeout=3)
    events = await everything(call)
    signs = [event for event in events if isinstance(event, Data) and not event.data]
    assert 8 <= len(signs) <= 11
    assert isinstance(events[-1], Done)


# What a client that leaves does


async def test_a_handler_that_awaits_is_cancelled_and_cleans_up(bench: Bench) -> None:
    seen: list[type[BaseException]] = []

    async def waits(request: ChatRequest) -> AsyncIterator[str]:
        yield "x"
        try:
            await trio.sleep_forever()
        except BaseException as error:
            seen.append(type(error))
            raise

    call = bench.open(waits)
    await wait_all_tasks_blocked()
    call.cancel("client left")
    await released(call)
    assert seen == [trio.Cancelled]
    assert bench.pool.running == 0


async def test_a_generator_that_is_parked_in_yield_is_closed(bench: Bench) -> None:
    seen: list[type[BaseException]] = []

    async def torrent(request: ChatRequest) -> AsyncIterator[str]:
        try:
            while True:
                yield "x" * WINDOW
        except BaseException as error:
            seen.append(type(error))
            raise

    call = bench.open(torrent)
    await wait_all_tasks_blocked()
    assert call.body.waiting_bytes >= WINDOW
    call.cancel("client left")
    await released(call)
    assert seen == [GeneratorExit]


async def test_a_handler_in_a_thread_stops_at_its_next_push(bench: Bench) -> None:
    stopped: list[str] = []

    def pushes(request: ChatRequest, provider: ThreadProvider) -> None:
        try:
            while True:
                provider.push("x")
        finally:
            stopped.append("x")

    call = bench.open(pushes)
    assert isinstance(await call.receive(), Head)
    call.cancel("client left")
    await released(call)
    assert stopped == ["x"]
    assert bench.pool.running == 0


# Errors


async def test_an_api_error_reaches_the_client_as_it_was_raised(bench: Bench) -> None:
    async def refuses(request: ChatRequest) -> str:
        raise ApiError(429, "slow down", code="quota", type="rate_limit_error", retry_after=7)

    error = await failure(bench.open(refuses))
    assert (error.status, error.message, error.code, error.retry_after) == (429, "slow down", "quota", 7)


async def test_an_api_error_from_a_nursery_of_the_handler_reaches_the_client(bench: Bench) -> None:
    async def refuses(request: ChatRequest) -> str:
        async with trio.open_nursery():
            raise ApiError(429, "slow down")

    assert (await failure(bench.open(refuses))).status == 429


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), SystemExit("secret"), KeyError("secret")])
async def test_any_other_error_shows_no_internals_and_is_logged_where_it_happened(
    bench: Bench, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    async def breaks(request: ChatRequest) -> AsyncIterator[str]:
        yield "x"
        raise error

    with caplog.at_level(logging.ERROR, "trio_cluster"):
        answer = await failure(bench.open(breaks))
    assert answer.status == 500
    assert "secret" not in answer.message
    assert "in breaks" in caplog.text


@pytest.mark.parametrize("value", [object(), 3, None, b"audio"], ids=["object", "number", "none", "bytes"])
async def test_a_value_that_no_chat_can_answer_with_is_a_failure_of_the_handler(
    bench: Bench, caplog: pytest.LogCaptureFixture, value: object
) -> None:
    async def odd(request: ChatRequest) -> object:
        return value

    assert (await failure(bench.open(odd))).status == 500


async def test_an_error_chunk_ends_the_answer(bench: Bench) -> None:
    async def tells(request: ChatRequest) -> AsyncIterator[object]:
        yield "x"
        yield OutputChunk.error("full", "no room", status=503)

    error = await failure(bench.open(tells))
    assert (error.status, error.code, error.message) == (503, "full", "no room")


async def test_pushing_after_the_end_is_an_error_of_the_handler_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[type[BaseException]] = []

    async def overdoes(request: ChatRequest, provider: Provider) -> None:
        await provider.push("x")
        provider.end()
        try:
            await provider.push("y")
        except trio.ClosedResourceError as error:
            seen.append(type(error))

    events = await everything(bench.open(overdoes))
    assert isinstance(events[-1], Done)
    assert seen == [trio.ClosedResourceError]


async def test_a_request_that_cannot_be_read_never_reaches_the_handler(bench: Bench) -> None:
    backend = bench.backend(echo)
    call = backend.open(Request(endpoint="chat.completions", kind="chat", model="m", body=b"{"))
    assert (await failure(call)).status == 400


async def test_a_cancel_scope_that_leaks_out_of_a_generator_harms_only_its_own_call(
    bench: Bench, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def leaks(request: ChatRequest) -> AsyncIterator[str]:
        with trio.move_on_after(1):
            while True:
                yield "x" * WINDOW

    call = bench.open(leaks)
    await released(call)
    assert (await failure(call)).status == 500
    good = await everything(bench.open(echo))
    assert isinstance(good[-1], Done)
    assert bench.pool.running == 0


async def test_a_nursery_around_a_yield_harms_only_its_own_call(
    bench: Bench, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def crashes() -> None:
        await trio.sleep(1)
        raise ValueError("in the background")

    async def risky(request: ChatRequest) -> AsyncIterator[str]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crashes)
            while True:
                yield "x" * WINDOW

    call = bench.open(risky)
    await released(call)
    assert (await failure(call)).status == 500
    assert isinstance((await everything(bench.open(echo)))[-1], Done)


async def test_a_deep_recursion_in_a_handler_is_just_a_failure(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def deep(request: ChatRequest) -> str:
        def dig(n: int) -> int:
            return dig(n + 1)

        return str(dig(0))

    assert (await failure(bench.open(deep))).status == 500
    assert sys.getrecursionlimit() > 100


async def test_a_sync_generator_streams_from_its_thread(bench: Bench) -> None:
    def words(request: ChatRequest) -> Iterator[str]:
        yield from request.last_text.split()

    events = await everything(bench.open(words, stream=False))
    assert json.loads(text(events))["choices"][0]["message"]["content"] == "abc"


async def test_others_are_served_while_many_vectors_are_encoded(bench: Bench) -> None:
    count, turns = 500, 0
    body = {"model": "m", "input": ["word"] * count}
    asked = Request("embeddings", "embedding", "m", json.dumps(body).encode())
    encoding = trio.Event()

    async def vectors(request: Any) -> list[list[float]]:
        encoding.set()
        return [[0.123456789] * 1000] * count

    async def others() -> None:
        nonlocal turns
        await encoding.wait()
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        call = HandlerBackend(ModelInfo("m", "embedding"), vectors, bench.pool).open(asked)
        events = await everything(call)
        nursery.cancel_scope.cancel()
    data = [event.data for event in events if isinstance(event, Data)]
    assert len(json.loads(b"".join(data))["data"]) == count
    # Half a million numbers, eight thousand at a time; and the handler waits while a window is full.
    assert turns > 60
    assert max(map(len, data)) <= 66_000


# What a model answers beside its kind


async def test_each_endpoint_of_a_model_is_answered_by_its_own_handler(bench: Bench) -> None:
    async def chat(request: ChatRequest) -> str:
        return "chat"

    async def own(request: CustomRequest) -> str:
        return "own"

    backend = HandlerBackend(ModelInfo("m", "chat"), chat, bench.pool)
    backend.add_endpoint("/v1/x", own)
    assert backend.info.extra_endpoints == ("/v1/x",)
    assert backend.info.answers("custom", "/v1/x")
    assert not backend.info.answers("custom", "/v1/y")
    body = b'{"model": "m", "messages": [{"role": "user", "content": "a"}]}'
    assert "chat" in text(await everything(backend.open(Request("chat.completions", "chat", "m", body))))
    assert text(await everything(backend.open(Request("/v1/x", "custom", "m", body)))) == "own"


def test_an_endpoint_that_a_model_has_cannot_be_added_again() -> None:
    async def handler(request: Any) -> str:
        return ""

    backend = HandlerBackend(ModelInfo("m", "chat"), handler, HandlerPool(ClusterServerOptions()))
    with pytest.raises(ValueError, match="answers chat already"):
        backend.add_endpoint("chat", handler)
    backend.add_endpoint("/v1/x", handler)
    with pytest.raises(ValueError, match="answers /v1/x already"):
        backend.add_endpoint("/v1/x", handler)
    with pytest.raises(TypeError):
        backend.add_endpoint("/v1/y", "no function")  # type: ignore[arg-type]
    assert backend.info.extra_endpoints == ("/v1/x",)


# Several prompts


def completion(prompts: list[str], *, stream: bool = False, **fields: Any) -> Request:
    body = {"model": "m", "prompt": prompts, "stream": stream} | fields
    return Request(endpoint="completions", kind="chat", model="m", body=json.dumps(body).encode())


async def generates(request: ChatRequest) -> AsyncIterator[str]:
    for letter in request.prompt or "":
        yield letter.upper()


async def returns(request: ChatRequest) -> str:
    assert request.prompts is None
    return request.last_text.upper()


async def pushes(request: ChatRequest, provider: Provider) -> None:
    await provider.push(request.last_text.upper())
    provider.end()
    with pytest.raises(trio.ClosedResourceError):
        await provider.push("more")


def in_a_thread(request: ChatRequest, provider: ThreadProvider) -> None:
    provider.push(request.last_text.upper())
    provider.end()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("handler", [generates, returns, pushes, in_a_thread])
async def test_each_of_several_prompts_is_answered_in_one_slot(
    bench: Bench, handler: Any, stream: bool
) -> None:
    call = bench.backend(handler).open(completion(["ab", "cd", "ef"], stream=stream))
    events = text(await everything(call))
    await released(call)
    if stream:
        assert read_stream(events.encode()).texts == {0: "AB", 1: "CD", 2: "EF"}
    else:
        assert [each["text"] for each in json.loads(events)["choices"]] == ["AB", "CD", "EF"]


async def test_a_call_with_several_prompts_is_cancelled_and_fails_as_one(bench: Bench) -> None:
    seen = []

    async def waits(request: ChatRequest) -> str:
        seen.append(request.prompt)
        if request.prompt == "b":
            await trio.sleep_forever()
        return "x"

    call = bench.backend(waits).open(completion(["a", "b", "c"]))
    await trio.testing.wait_all_tasks_blocked()
    call.cancel("client left")
    await released(call)
    assert seen == ["a", "b"]

    async def fails(request: ChatRequest) -> str:
        if request.prompt == "b":
            raise ApiError(429, "not that one")
        return "x"

    assert (await failure(bench.backend(fails).open(completion(["a", "b", "c"])))).status == 429

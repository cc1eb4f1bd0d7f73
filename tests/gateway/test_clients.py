"""What the official client makes of the answers: each failure is the exception that its users catch."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import openai
import pytest
import trio
from http_node import CHAT, EVENTS, HttpNode, open_http_node

from trio_cluster.errors import ApiError, HandlerFailed, Overloaded, TooSlow, WorkerLost
from trio_cluster.openai import DONE

ANSWER = (
    b'{"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, '
    b'"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}]}'
)


@pytest.fixture(autouse=True)
def known_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    # The client starts a subprocess to find out; that is not what is tested here.
    monkeypatch.setattr("platform.platform", lambda *_, **__: "test")


async def create(node: HttpNode, key: str = "k", **changes: Any) -> Any:
    async with node.openai(key) as client:
        return await client.chat.completions.create(**(CHAT | changes))


async def test_a_plain_answer_is_understood() -> None:
    async with open_http_node(lambda served: served.head().data(ANSWER).done()) as node:
        completion = await create(node)
        assert completion.choices[0].message.content == "hello"
        assert completion._request_id.startswith("req_")
        async with node.openai() as client:
            assert [model.id async for model in client.models.list()] == ["m"]
            assert (await client.models.retrieve("m")).id == "m"


@pytest.mark.parametrize(
    ("error", "exception"),
    [
        (ApiError(400, "no"), openai.BadRequestError),
        (ApiError(429, "slower"), openai.RateLimitError),
        (HandlerFailed(), openai.InternalServerError),
        (WorkerLost("w", "gone"), openai.InternalServerError),
        (Overloaded("full"), openai.InternalServerError),
        (TooSlow("late"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_is_the_clients_exception_of_that_status(
    error: ApiError, exception: type[openai.APIStatusError], stream: bool
) -> None:
    async with open_http_node(lambda served: served.fail(error)) as node:
        with pytest.raises(exception) as caught:
            await create(node, stream=stream)
        assert caught.value.status_code == error.status
        assert error.message in str(caught.value)
        assert caught.value.request_id


async def test_refusals_are_the_clients_exceptions_too() -> None:
    async with open_http_node(api_key="secret", max_body_size=1000) as node:
        with pytest.raises(openai.AuthenticationError):
            await create(node)
        with pytest.raises(openai.NotFoundError):
            await create(node, "secret", model="nobody")
        with pytest.raises(openai.BadRequestError) as caught:
            await create(node, "secret", messages=[])
        assert caught.value.param == "messages"
        with pytest.raises(openai.APIStatusError) as large:
            await create(node, "secret", user="x" * 1000)
        assert large.value.status_code == 413


def read_stream(node: HttpNode, limit: int | None = None) -> list[str | None]:
    """Read a stream with the client that blocks; the other leaves its generators to the collector."""
    with (
        httpx.Client(timeout=5, trust_env=False, verify=False) as http,
        openai.OpenAI(api_key="k", base_url=f"{node.url}/v1", max_retries=0, http_client=http) as client,
        client.chat.completions.create(**CHAT, stream=True) as stream,
    ):
        return [piece.choices[0].delta.content for piece in itertools.islice(stream, limit)]


async def test_a_stream_that_is_complete_ends_without_an_exception() -> None:
    async with open_http_node(lambda served: served.head(EVENTS).event("one")) as node:

        async def finish() -> None:
            served = await node.backend.next()
            while not served.taken:
                await trio.lowlevel.checkpoint()
            served.event("two").data(DONE).done()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish)
            assert await trio.to_thread.run_sync(read_stream, node) == ["one", "two"]


async def test_a_stream_that_fails_raises_what_the_handler_failed_with() -> None:
    async with open_http_node(lambda served: served.head(EVENTS).event("one")) as node:

        async def fail() -> None:
            served = await node.backend.next()
            while not served.taken:
                await trio.lowlevel.checkpoint()
            served.event("two").fail(HandlerFailed())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            with pytest.raises(openai.APIError, match="failed to answer"):
                await trio.to_thread.run_sync(read_stream, node)


async def test_closing_the_clients_stream_cancels_the_call() -> None:
    async with open_http_node(lambda served: served.head(EVENTS).event("one")) as node:
        assert await trio.to_thread.run_sync(read_stream, node, 1) == ["one"]
        assert await (await node.backend.next()).wait_cancelled() == "client left"


async def test_the_read_timeout_of_a_client_shortens_the_idle_timeout() -> None:
    async with open_http_node(lambda served: served.head().data(ANSWER).done()) as node:
        async with node.openai() as client:
            await client.with_options(timeout=7.0).chat.completions.create(**CHAT)
        assert (await node.backend.next()).request.idle_timeout == 7.0

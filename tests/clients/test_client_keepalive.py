"""Streams that are silent before their first output and within, for every client: comments are ignored, failures told.

Clients other than the official ones are tested where they are installed; ``nox -s clients`` installs them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final, Literal

import openai
import pytest
import trio
from client_case import USER
from client_drivers import Client, Driver, file
from client_media import CLIP
from scripted import PNG
from served import Placement, Served, open_served, until
from test_client_stream_failures import ask_sdk

from trio_cluster import ApiError, ASRRequest, ChatRequest, ImageEditRequest, OutputChunk, RawCall
from trio_cluster.openai.sse import named_event

KEEPALIVE: Final = 0.05
#: Long enough for several comments.
SILENCE: Final = 0.3

WORDS: Final = ("so ", "slow")
TEXT: Final = "".join(WORDS)
BROKEN: Final = ApiError(429, "as you wish", code="my_code")

Ending = Literal["finishes", "fails"]
ENDINGS: Final = pytest.mark.parametrize("ending", ["finishes", "fails"])


def message_events() -> list[bytes]:
    message = (
        b'{"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"m",'
        b'"content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":1}}}'
    )
    block = b'{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}'
    deltas = [
        b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%s"}}' % word.encode()
        for word in WORDS
    ]
    end = (
        b'{"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        b'"usage":{"output_tokens":2}}'
    )
    return [
        named_event("message_start", message)
        + named_event("content_block_start", block)
        + named_event("content_block_delta", deltas[0]),
        named_event("content_block_delta", deltas[1])
        + named_event("content_block_stop", b'{"type":"content_block_stop","index":0}')
        + named_event("message_delta", end)
        + named_event("message_stop", b'{"type":"message_stop"}'),
    ]


@pytest.fixture
async def served(placement: Placement) -> AsyncIterator[Served]:
    """A server whose models are slow; those whose name ends with ``fails`` fail instead of their first output."""
    async with open_served(placement, keepalive=KEEPALIVE) as running:

        async def slow(model: str, outputs: tuple[Any, ...]) -> AsyncIterator[Any]:
            for output in outputs:
                await trio.sleep(SILENCE)
                if model.endswith("fails"):
                    raise BROKEN
                yield output

        for ending in ("finishes", "fails"):

            @running.back.chat(f"chat {ending}")
            async def chat(request: ChatRequest) -> AsyncIterator[str]:
                async for word in slow(request.model, WORDS):
                    yield word

            @running.back.asr(f"asr {ending}")
            async def asr(request: ASRRequest) -> AsyncIterator[str]:
                async for word in slow(request.model, WORDS):
                    yield word

            @running.back.image_edit(f"image {ending}")
            async def image(request: ImageEditRequest) -> AsyncIterator[Any]:
                async for picture in slow(request.model, (OutputChunk.partial_image(PNG), PNG)):
                    yield picture

            async def messages(call: RawCall) -> None:
                async for piece in slow(call.request.model, tuple(message_events())):
                    if piece.startswith(b"event: message_start"):
                        call.begin(200, "text/event-stream")
                    await call.send(piece)

            running.back.register_raw(f"raw {ending}", messages)
        await until(lambda: running.front.has_model("raw fails"))
        yield running


@pytest.fixture
def client(served: Served, driver: Driver) -> Client:
    return driver.client_of(served.url)


STREAMS: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "chat": ("chat.completions.create", "chat", {"messages": [USER]}),
    "completions": ("completions.create", "chat", {"prompt": "x"}),
    "responses": ("responses.create", "chat", {"input": "x"}),
    "transcriptions": ("audio.transcriptions.create", "asr", {"file": CLIP}),
    "images": (
        "images.edit",
        "image",
        {"prompt": "x", "image": file("a.png", PNG, "image/png"), "partial_images": 1},
    ),
}


def text_of(route: str, events: list[Any]) -> str:
    if route == "chat":
        return "".join(each["choices"][0]["delta"].get("content") or "" for each in events)
    if route == "completions":
        return "".join(each["choices"][0]["text"] for each in events)
    return "".join(each["delta"] for each in events if each["type"].endswith("text.delta"))


@pytest.mark.parametrize("route", STREAMS)
async def test_a_slow_stream_arrives_without_its_comments(client: Client, route: str) -> None:
    method, model, body = STREAMS[route]
    answer = await client.ask(method, stream=True, model=f"{model} finishes", **body)
    assert answer.failure is None
    if route == "images":
        assert [each["type"] for each in answer.events] == [
            "image_edit.partial_image",
            "image_edit.completed",
        ]
    else:
        assert text_of(route, answer.events) == TEXT


@pytest.mark.parametrize("route", STREAMS)
async def test_a_failure_after_comments_raises_with_the_reason(client: Client, route: str) -> None:
    method, model, body = STREAMS[route]
    answer = await client.ask(method, stream=True, model=f"{model} fails", **body)
    assert answer.events == []
    assert answer.failure is not None
    assert (answer.failure.name, answer.failure.status, answer.failure.code) == ("APIError", None, "my_code")


@ENDINGS
@pytest.mark.parametrize("method", ["chat.completions.stream", "responses.stream"])
async def test_a_helper_that_collects_a_stream(client: Client, method: str, ending: Ending) -> None:
    body = {"messages": [USER]} if method.startswith("chat") else {"input": "x"}
    answer = await client.ask(method, model=f"chat {ending}", **body)
    if ending == "finishes":
        assert answer.failure is None
    else:
        assert answer.failure is not None
        assert (answer.failure.name, answer.failure.code) == ("APIError", "my_code")


async def test_a_plain_request_keeps_its_status(client: Client) -> None:
    answer = await client.ask("chat.completions.create", model="chat fails", messages=[USER])
    assert answer.failure is not None
    assert (answer.failure.name, answer.failure.status) == ("RateLimitError", 429)


@ENDINGS
async def test_the_blocking_client(served: Served, ending: Ending) -> None:
    said: list[str] = []

    def take(client: openai.OpenAI) -> None:
        for chunk in client.chat.completions.create(
            model=f"chat {ending}", messages=[{"role": "user", "content": "x"}], stream=True
        ):
            said.append(chunk.choices[0].delta.content or "")

    if ending == "finishes":
        await served.with_sync_client(take)
        assert "".join(said) == TEXT
    else:
        with pytest.raises(openai.APIError) as caught:
            await served.with_sync_client(take)
        assert caught.value.code == "my_code"


async def test_the_ai_sdk_reads_a_slow_stream(served: Served) -> None:
    for way, outcome in (await ask_sdk(served, "chat finishes")).items():
        assert outcome["text"] == TEXT, way
        assert (outcome["errors"], outcome["thrown"], outcome["reason"]) == ([], None, "stop"), way


async def test_the_ai_sdk_has_the_reason_of_a_failure_after_comments(served: Served) -> None:
    for way, outcome in (await ask_sdk(served, "chat fails")).items():
        assert outcome["text"] == "", way
        messages = [error["message"] for error in outcome["errors"]]
        assert any("as you wish" in message for message in messages), (way, outcome)
        assert outcome["reason"] != "stop", way


@ENDINGS
@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
async def test_langchain(served: Served, responses: bool, ending: Ending) -> None:
    langchain = pytest.importorskip("langchain_openai")

    def take() -> str:
        model = langchain.ChatOpenAI(
            model=f"chat {ending}",
            base_url=f"{served.url}/v1",
            api_key="a-key",
            max_retries=0,
            use_responses_api=responses,
        )
        return "".join(
            chunk.text if isinstance(chunk.text, str) else chunk.text() for chunk in model.stream("x")
        )

    if ending == "finishes":
        assert await trio.to_thread.run_sync(take) == TEXT
    else:
        with pytest.raises(openai.APIError) as caught:
            await trio.to_thread.run_sync(take)
        assert caught.value.code == "my_code"


@ENDINGS
async def test_the_client_of_the_messages_api_ignores_pings(served: Served, ending: Ending) -> None:
    anthropic = pytest.importorskip("anthropic")

    def take() -> str:
        with (
            anthropic.Anthropic(base_url=served.url, api_key="a-key", max_retries=0) as client,
            client.messages.stream(
                model=f"raw {ending}", max_tokens=10, messages=[{"role": "user", "content": "x"}]
            ) as stream,
        ):
            return "".join(stream.text_stream)

    if ending == "finishes":
        assert await trio.to_thread.run_sync(take) == TEXT
    else:
        with pytest.raises(anthropic.APIStatusError, match="as you wish"):
            await trio.to_thread.run_sync(take)

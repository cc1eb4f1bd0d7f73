"""No work outlives the request that asked for it: who leaves stops his own handler, and nobody else's."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import openai
import pytest
import trio
from scripted import ENDLESS, SILENT
from served import PLACEMENTS, Served, chat, open_served

# Its streams leave their async generators to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx|httpcore):ResourceWarning")


@pytest.fixture(params=PLACEMENTS)
async def narrow(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    """A server with a single slot, for which a request waits a second and no longer."""
    async with open_served(request.param, max_concurrency=1, queue_timeout=1) as served:
        yield served


async def check_slot_is_free(served: Served) -> None:
    response = await served.post(json=chat("mirror"))
    assert response.status_code == 200, response.text


@asynccontextmanager
async def asking(served: Served, body: dict[str, object]) -> AsyncIterator[trio.CancelScope]:
    """Have a client that waits for an answer in the background; cancelling the scope makes it leave."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(served.post, json=body))
        yield nursery.cancel_scope


@asynccontextmanager
async def sent(served: Served, body: dict[str, Any]) -> AsyncIterator[trio.SocketStream]:
    """Have sent a request over a bare connection, of whose answer nothing is read."""
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    async with await trio.open_tcp_stream("127.0.0.1", served.front.port or 0) as stream:
        await stream.send_all(head.encode() + data)
        yield stream


@pytest.mark.parametrize("model", ENDLESS)
async def test_a_client_that_leaves_its_stream_stops_the_handler(narrow: Served, model: str) -> None:
    async with narrow.http() as client:
        body = chat(model, stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            pieces: Any = response.aiter_raw()
            assert b"tick" in await anext(pieces) + await anext(pieces)
            await pieces.aclose()
    assert await narrow.trace.ended(within=1) == "cancelled"
    await check_slot_is_free(narrow)


@pytest.mark.parametrize("model", ENDLESS)
async def test_a_client_that_no_longer_waits_for_a_plain_answer_stops_the_handler(
    narrow: Served, model: str
) -> None:
    async with asking(narrow, chat(model)) as client:
        await narrow.trace.started()
        client.cancel()
    assert await narrow.trace.ended(within=1) == "cancelled"
    await check_slot_is_free(narrow)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("model", SILENT)
async def test_a_client_that_leaves_before_the_first_output_stops_the_handler(
    narrow: Served, model: str, stream: bool
) -> None:
    async with asking(narrow, chat(model, stream=stream)) as client:
        await narrow.trace.started()
        client.cancel()
    assert await narrow.trace.ended(within=1) == "cancelled"
    await check_slot_is_free(narrow)


async def test_a_client_that_leaves_the_queue_is_never_served(narrow: Served) -> None:
    narrow.back.options.server.queue_timeout = 30
    async with asking(narrow, chat("held")):
        await narrow.trace.started()
        async with asking(narrow, chat("echo")) as client:
            await narrow.in_flight(2)
            client.cancel()
        status = await narrow.in_flight(1)
        assert status["calls"]["cancelled"] == 1
        narrow.trace.released.set()
    assert [request.model for request in narrow.trace.requests] == ["held"]


async def test_leaving_the_stream_of_the_official_client_is_enough(narrow: Served) -> None:
    async with (
        narrow.client() as client,
        await client.chat.completions.create(
            model="endless/async-generator", messages=[{"role": "user", "content": "hi"}], stream=True
        ) as stream,
    ):
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
    assert await narrow.trace.ended(within=1) == "cancelled"
    await check_slot_is_free(narrow)


async def test_leaving_the_stream_of_the_synchronous_client_is_enough(narrow: Served) -> None:
    def ask(client: openai.OpenAI) -> None:
        with client.chat.completions.create(
            model="endless/thread-generator", messages=[{"role": "user", "content": "hi"}], stream=True
        ) as stream:
            next(iter(stream))

    await narrow.with_sync_client(ask)
    assert await narrow.trace.ended(within=1) == "cancelled"
    await check_slot_is_free(narrow)


async def test_a_client_that_is_reset_is_noticed_like_one_that_leaves(narrow: Served) -> None:
    async with sent(narrow, chat("silent/async-generator", stream=True)) as stream:
        await narrow.trace.started()
        # Closing with a linger time of zero is a reset.
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert await narrow.trace.ended(within=1) == "cancelled"
    await check_slot_is_free(narrow)


async def test_a_client_that_does_not_read_holds_back_its_own_handler_and_nobody_else(served: Served) -> None:
    body = chat("flood", stream=True)
    async with served.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        pieces: Any = response.aiter_raw()
        await anext(pieces)
        for _ in range(30):
            answer = await served.post(json=chat("echo", "still here"))
            assert answer.json()["choices"][0]["message"]["content"] == "still here"
        held_back_at = served.trace.pieces
        assert held_back_at < 300
        async for _ in pieces:
            if served.trace.pieces > held_back_at:
                break
        await pieces.aclose()
    await served.in_flight(0)


async def test_a_client_that_stopped_reading_is_seen_to_leave_though_a_write_to_it_is_stuck(
    narrow: Served,
) -> None:
    async with sent(narrow, chat("flood", stream=True)) as stream:
        await narrow.trace.started()
        stuck_at = -1
        while stuck_at != narrow.trace.pieces:
            stuck_at = narrow.trace.pieces
            await narrow.status()
            await narrow.status()
        await stream.send_eof()
        assert await narrow.trace.ended(within=1) == "cancelled"
        await check_slot_is_free(narrow)


async def test_one_client_that_leaves_disturbs_no_other(served: Served) -> None:
    async def read_whole(texts: list[str]) -> None:
        answer = await served.stream(chat("echo", "a b c d e f g", stream=True))
        texts.append(answer.report.text)
        assert answer.report.ending == "finished"

    texts: list[str] = []
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            async with asking(served, chat("endless/async-push", stream=True)) as client:
                await served.trace.started()
                nursery.start_soon(read_whole, texts)
                client.cancel()
    assert texts == ["a b c d e f g"] * 5

"""Handlers with real libraries of asyncio: each relays to a server with an OpenAI API, over real sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import trio
from handler_bench import Bench, failure, released
from memory_cluster import everything

from trio_cluster import ApiError, AsyncioLoop, ClusterServer, from_asyncio
from trio_cluster.core.answer import Data, Done
from trio_cluster.core.call import Call
from trio_cluster.testing import read_stream

PATIENCE = 20


class Upstream:
    """A server, with a model that counts its words and one that never ends."""

    def __init__(self) -> None:
        self.server = ClusterServer()
        self.server.options.server.host = "127.0.0.1"
        self.began = trio.Event()
        self.ended = trio.Event()
        self.server.register_chat("words", self._words)
        self.server.register_chat("endless", self._endless)
        self.server.register_chat("failing", self._failing)

    async def _words(self, request: Any) -> AsyncIterator[str]:
        for number in range(200):
            yield f"{number} "

    async def _endless(self, request: Any) -> AsyncIterator[str]:
        try:
            yield "a beginning"
            self.began.set()
            await trio.sleep_forever()
        finally:
            self.ended.set()

    async def _failing(self, request: Any) -> AsyncIterator[str]:
        raise ApiError(503, "not now", code="busy")
        yield ""


class Library:
    """A client of the upstream, which belongs to the loop that it was opened on."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def open(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    def relay(self, model: str) -> Any:
        raise NotImplementedError


class Aiohttp(Library):
    async def open(self) -> None:
        self._aiohttp: Any = pytest.importorskip("aiohttp")
        self._session = self._aiohttp.ClientSession(self.url)

    async def close(self) -> None:
        await self._session.close()

    def relay(self, model: str) -> Any:
        async def handler(request: Any) -> AsyncIterator[str]:
            body = {"model": model, "messages": request.messages, "stream": True}
            async with self._session.post("/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    error = (await response.json())["error"]
                    raise ApiError(response.status, error["message"], code=error["code"])
                async for line in response.content:
                    data = line.removeprefix(b"data: ").strip()
                    if data and data != b"[DONE]":
                        yield json.loads(data)["choices"][0]["delta"].get("content") or ""

        return handler


class OpenAi(Library):
    async def open(self) -> None:
        self._client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        )

    async def close(self) -> None:
        await self._client.close()

    def relay(self, model: str) -> Any:
        async def handler(request: Any, provider: Any) -> None:
            try:
                stream = await self._client.chat.completions.create(
                    model=model, messages=request.messages, stream=True
                )
            except openai.APIStatusError as error:
                raise ApiError(error.status_code, "not now", code=str(error.code)) from error
            async with stream:
                async for chunk in stream:
                    await provider.push(chunk.choices[0].delta.content or "")

        return handler


@pytest.fixture
async def upstream(nursery: trio.Nursery) -> Upstream:
    made = Upstream()
    await nursery.start(made.server.run_as_standalone, 0)
    return made


@pytest.fixture(params=[Aiohttp, OpenAi])
def kind(request: pytest.FixtureRequest) -> type[Library]:
    if request.param is Aiohttp:
        pytest.importorskip("aiohttp", reason="aiohttp is not installed; the group 'clients' has it")
    library: type[Library] = request.param
    return library


class Relay:
    def __init__(self, bench: Bench, library: Library) -> None:
        self._bench = bench
        self._library = library
        self.loop = AsyncioLoop(library.open, library.close)

    def open(self, model: str) -> Call:
        return self._bench.open(from_asyncio(self._library.relay(model), self.loop))


@pytest.fixture
async def relay(kind: type[Library], bench: Bench, upstream: Upstream) -> AsyncIterator[Relay]:
    assert upstream.server.url is not None
    made = Relay(bench, kind(upstream.server.url))
    run = await made.loop.acquire()
    yield made
    await made.loop.release(run)
    assert made.loop.running is None


async def test_answers_pass_one_after_the_other_and_at_once(relay: Relay) -> None:
    expected = "".join(f"{number} " for number in range(200))

    async def ask() -> None:
        events = await everything(relay.open("words"))
        assert isinstance(events[-1], Done)
        assert (
            read_stream(b"".join(event.data for event in events if isinstance(event, Data))).text == expected
        )

    await ask()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(ask)


async def test_a_cancelled_call_ends_the_work_upstream(
    relay: Relay, upstream: Upstream, bench: Bench
) -> None:
    call = relay.open("endless")
    with trio.fail_after(PATIENCE):
        await upstream.began.wait()
        call.cancel("the client left")
        await upstream.ended.wait()
    await released(call)
    assert bench.pool.running == 0
    # What they share still works.
    assert isinstance((await everything(relay.open("words")))[-1], Done)


async def test_an_error_upstream_is_an_error(relay: Relay) -> None:
    error = await failure(relay.open("failing"))
    assert (error.status, error.code, error.message) == (503, "busy", "not now")

"""Engines that load their model when it is asked for."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import serving_node
import trio
from clusters import until
from serving_node import ask

from trio_cluster import ChatRequest, ClusterServer, ClusterServerOptions
from trio_cluster.engines import (
    LoadingEngine,
    Option,
    ServedModel,
    _engine,
    not_loaded,
    parse_serve,
    serve_engine,
    text,
)
from trio_cluster.errors import ClusterError, OptionsError


class Toy(LoadingEngine):
    """An engine whose models take as long to load as a test says."""

    options: Mapping[str, Option] = {"name": Option(text, "toy", "its name")}  # type: ignore[misc]

    def __init__(self) -> None:
        self.log: list[str] = []
        self.may_load = threading.Event()
        self.may_load.set()
        self.failure: Exception | None = None

    def describe(self, argument: str, options: Mapping[str, Any]) -> ServedModel:
        return ServedModel(options["name"], "chat", not_loaded, count_tokens=not_loaded)

    @contextmanager
    def open(self, argument: str, options: Mapping[str, Any]) -> Iterator[ServedModel]:
        self.log.append(f"load {options['name']}")
        self.may_load.wait()
        if self.failure is not None:
            raise self.failure

        # One of the shapes that a handler may have.
        async def answer(request: ChatRequest) -> AsyncIterator[str]:
            yield f"I am {options['name']}"

        async def count(request: ChatRequest) -> int:
            return 7

        yield ServedModel(options["name"], "chat", answer, count_tokens=count)
        self.log.append(f"free {options['name']}")


class EntryPoint:
    value = "toys:engine"
    name = "toy"

    def __init__(self, toy: Toy) -> None:
        self.load = lambda: toy


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy()
    monkeypatch.setattr(_engine, "entry_points", lambda group: [EntryPoint(toy)])
    return toy


serving = partial(serving_node.serving, memory="100MiB", default_timeout=0.5)


def test_engines_that_can_describe_their_model_take_the_options_of_residents(toy: Toy) -> None:
    assert parse_serve("toy,memory=20GiB,idle=600,start-timeout=30").options == {
        "name": "toy",
        "memory": 20 << 30,
        "idle": 600.0,
        "start_timeout": 30.0,
    }
    with pytest.raises(OptionsError, match="memory: expected an amount of memory such as 20GiB"):
        parse_serve("toy,memory=much")
    with pytest.raises(OptionsError, match="has no option 'idle'"):
        parse_serve("digits,idle=1")


async def test_without_these_options_a_model_is_loaded_at_once(toy: Toy) -> None:
    async with serving("toy") as (_, client):
        assert toy.log == ["load toy"]
        assert await ask(client, "toy") == "I am toy"


async def test_a_model_is_loaded_when_it_is_first_asked_for_and_freed_in_the_end(toy: Toy) -> None:
    async with serving("toy,idle=0") as (server, client):
        assert server.list_models() == ["toy"]
        assert toy.log == []
        assert await ask(client, "toy") == "I am toy"
        assert await ask(client, "toy") == "I am toy"
        assert toy.log == ["load toy"]
        counted = await client.post(
            "/v1/messages/count_tokens",
            json={"model": "toy", "messages": [{"role": "user", "content": "hi"}]},
        )
        assert counted.json() == {"input_tokens": 7}
    assert toy.log == ["load toy", "free toy"]


async def test_an_idle_model_is_freed(toy: Toy) -> None:
    async with serving("toy,idle=0.01") as (_, client):
        await ask(client, "toy")
        await until(lambda: toy.log == ["load toy", "free toy"])
        assert await ask(client, "toy") == "I am toy"


async def test_a_load_takes_longer_than_a_model_may_be_silent(toy: Toy) -> None:
    toy.may_load.clear()
    async with serving("toy,idle=0") as (server, client), trio.open_nursery() as nursery:
        answers: list[Any] = []

        async def request() -> None:
            answers.append(await ask(client, "toy"))

        for _ in range(12):
            nursery.start_soon(request)
        # More than `default_timeout`, and than the gateway adds to it; and more requests than there are slots.
        await trio.sleep(2.8)
        assert server.pool.running == 0
        toy.may_load.set()
        await until(lambda: len(answers) == 12)
        assert answers == ["I am toy"] * 12
        assert toy.log == ["load toy"]


async def test_the_comments_of_a_stream_say_what_it_waits_for(toy: Toy) -> None:
    async with serving("toy,idle=0") as (server, client):
        server.options.server.keepalive = 0.1
        await ask(client, "toy")
        await server.on_demand.unload(server.on_demand.by_model["toy"])
        server.on_demand.by_model["toy"].resident.start_seconds = 20.0
        toy.may_load.clear()
        body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = []
            async for line in response.aiter_lines():
                lines.append(line)
                if line.startswith(":"):
                    toy.may_load.set()
        assert lines[0] in (": starting toy, about 20 s", ": starting toy, about 19 s")
        assert lines[-2] == "data: [DONE]"
        message = body | {"max_tokens": 5}
        await server.on_demand.unload(server.on_demand.by_model["toy"])
        toy.may_load.clear()
        async with client.stream("POST", "/v1/messages", json=message) as response:
            first = []
            async for line in response.aiter_lines():
                first.append(line)
                toy.may_load.set()
        assert first[0].startswith(": starting toy")
        assert first[2] == "event: ping"


async def test_a_model_that_cannot_be_loaded_is_a_503_that_says_why(toy: Toy) -> None:
    toy.failure = ClusterError("the file is torn")
    async with serving("toy,idle=0") as (_, client):
        for _ in range(2):
            error = await ask(client, "toy")
            assert error["code"] == "model_start_failed"
            assert error["message"] == "toy could not be started: the file is torn"
        assert toy.log == ["load toy"]


async def test_models_that_do_not_fit_make_room_for_each_other(toy: Toy) -> None:
    async with serving("toy,name=a,memory=60MiB", "toy,name=b,memory=60MiB") as (_, client):
        for name in ("a", "b", "a"):
            assert await ask(client, name) == f"I am {name}"
    assert toy.log == ["load a", "free a", "load b", "free b", "load a", "free a"]


async def test_a_model_larger_than_the_memory_is_an_error_at_the_start(toy: Toy) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(ClusterError, match="toy needs")):
        async with trio.open_nursery() as nursery:
            server = ClusterServer(ClusterServerOptions(memory="1MiB"))
            await nursery.start(serve_engine, parse_serve("toy,memory=1GiB"), server)
    assert server.list_models() == []
    assert not server.on_demand.by_model

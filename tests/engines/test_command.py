"""The engine ``command``: what is refused before anything runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from trio_cluster import ClusterServer
from trio_cluster.engines import command, parse_serve, read_serve, serve_engine
from trio_cluster.errors import ModelStartFailed, OptionsError

TABLE: dict[str, Any] = {
    "engine": "command",
    "command": ["/bin/sh", "-c", "sleep {port}"],
    "models": ["tiny"],
    "memory": "10MiB",
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"command": []}, "command: expected a program and its arguments"),
        ({"command": "true"}, r"the command must have \{port\} in it"),
        ({"command": ["no-such-program", "{port}"]}, "there is no program 'no-such-program'"),
        ({"command": ["true", 5]}, "command: expected a program and its arguments"),
        ({"command": True}, r"the command must have \{port\}"),
        ({"argument": "true {port}"}, "give the program once"),
        ({"models": []}, "models: expected names of models, each once"),
        ({"models": ["a", "a"]}, "models: expected names of models, each once"),
        ({"models": ["a", 5]}, "models: a model's name must be text"),
        ({"models": [" "]}, "models: a model's name must have"),
        ({"memory": "20 apples"}, "memory: expected an amount of memory such as 20GiB"),
        ({"memory": ["1GiB"]}, "memory: expected one value"),
        ({"idle": -1}, "idle: expected a number from 0"),
        ({"start_timeout": 0}, "start_timeout: expected a number from 0.1"),
        ({"ready": "health"}, "ready: expected a path such as /health"),
        ({"environment": ["A"]}, "environment: expected NAME=VALUE"),
        ({"max_concurrency": 0}, "max_concurrency: expected a whole number"),
        ({"sise": 3}, "has no option 'sise'; it has: command, models, memory, idle"),
        ({"engine": 5}, "give the engine"),
        ({"engine": "comand"}, "there is no engine 'comand'"),
    ],
)
def test_a_wrong_table_is_refused_with_the_place_and_what_would_be_right(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionsError, match=message) as caught:
        read_serve(TABLE | changed, "a.toml: serve 1")
    assert str(caught.value).startswith("a.toml: serve 1: ")
    assert "\n" not in str(caught.value)


def test_a_table_and_the_command_line_say_the_same() -> None:
    read = read_serve(
        {
            "engine": "command",
            "argument": "sh -c 'sleep {port}'",
            "models": ["a", "b"],
            "memory": "20GiB",
            "idle": 600,
            "ready": "/v1/models",
        },
        "x",
    )
    spec = "command:sh -c 'sleep {port}',models=a;b,memory=20GiB,idle=600,ready=/v1/models"
    assert parse_serve(spec) == read
    assert read.options["idle"] == 600.0
    assert read.options["models"] == ("a", "b")


async def test_a_program_that_ends_in_the_moment_of_its_answer_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    class Child:
        def __init__(self) -> None:
            self.pid, self.how = 1, ""
            self.ended, self.output_ended = trio.Event(), trio.Event()
            self.on_end: Callable[[str], None] = lambda how: None

        def last_lines(self) -> str:
            return ""

    class Client:
        def __init__(self, *args: Any, **options: Any) -> None:
            pass

        async def fetch(self, *args: Any) -> tuple[int, bytes]:
            await trio.lowlevel.checkpoint()
            child.how = "it has ended with code 3"
            child.ended.set()
            child.output_ended.set()
            child.on_end(child.how)
            return 200, b""

        def close(self) -> None:
            pass

    @asynccontextmanager
    async def open_child(*args: Any, **options: Any) -> AsyncIterator[Child]:
        yield child

    child = Child()
    monkeypatch.setattr(command, "open_child", open_child)
    monkeypatch.setattr(command, "HttpClient", Client)
    server = ClusterServer()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_engine, read_serve(TABLE, "x"), server)
        tenancy = server.on_demand.by_model["tiny"]
        with pytest.raises(ModelStartFailed, match="it has ended with code 3"):
            await server.on_demand.load(tenancy)
        nursery.cancel_scope.cancel()

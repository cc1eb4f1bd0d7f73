"""The engine ``command``: what is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from trio_cluster.engines import parse_serve, read_serve
from trio_cluster.errors import OptionsError

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

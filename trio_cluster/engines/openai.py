"""``openai``: the models of any server that speaks the OpenAI API, from vLLM to llama.cpp's own.

Nothing is loaded here. The models are those that the server lists, for as long as it lists them. A call is forwarded to
the server as it is, on any route, and so is the server's response. Several such engines can run side by side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import trio

from trio_cluster.core.model import ModelInfo

from ._base_url import BaseURL
from ._engine import Engine, ModelServer, Option, fraction, text, whole_number
from ._http_client import HttpClient
from ._upstream_models import Naming, UpstreamModels

__all__ = ["engine"]

_EXAMPLE: Final = "openai:http://127.0.0.1:8000/v1"
#: Ask the server for the usage of a stream where the client does not, or only read what is in the answers.
_USAGE: Final = ("ask", "observe")


def _patterns(value: str) -> tuple[str, ...]:
    patterns = tuple(filter(None, (each.strip() for each in value.split(","))))
    if not patterns:
        raise ValueError("expected patterns such as llama*,qwen*, got nothing")
    return patterns


def _models(value: str) -> tuple[str, ...]:
    models = tuple(dict.fromkeys(filter(None, (each.strip() for each in value.split(";")))))
    if not models:
        raise ValueError("expected names such as a;b, got nothing")
    return models


def _names(value: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for pair in value.split(","):
        # Split at the last colon, because names on servers have colons, such as llama3:8b.
        old, _, new = pair.strip().rpartition(":")
        if not old or not new:
            raise ValueError(f"expected OLD:NEW, got '{pair}'")
        _check_name(new)
        if old in names or new in names.values():
            raise ValueError(f"'{pair}' contradicts an earlier pair; give each name once")
        names[old] = new
    return names


def _prefix(value: str) -> str:
    _check_name(value + "x")
    return text(value)


def _check_name(name: str) -> None:
    ModelInfo(name=name, kind="any")


def _usage(value: str) -> str:
    if value not in _USAGE:
        raise ValueError(f"expected {' or '.join(_USAGE)}, got '{value}'")
    return value


def _secret(value: str) -> str:
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("a key has only visible ASCII characters and no spaces")
    return text(value)


class _OpenAI(Engine):
    summary = "any kind: the models of a server that speaks the OpenAI API"
    argument = "the URL of its API, such as http://127.0.0.1:8000/v1"
    options: ClassVar[Mapping[str, Option]] = {
        "key": Option(_secret, None, "the API key that the server requires"),
        "key_env": Option(text, None, "the environment variable with that key"),
        "models": Option(_models, (), "names of its models, a;b, if it has no list of them"),
        "prefix": Option(_prefix, "", "a prefix for the names of its models"),
        "only": Option(_patterns, (), "patterns for the names of the models to serve"),
        "rename": Option(_names, {}, "OLD:NEW,... new names of some models, without the prefix"),
        "max_concurrency": Option(whole_number(1, 100_000), None, "concurrent requests to one model"),
        "cache_tokens": Option(
            whole_number(1, 1 << 50), None, "tokens that its prompt cache holds, for routing"
        ),
        "usage": Option(_usage, "ask", "observe: never ask the server for the usage of a stream"),
        "poll": Option(fraction(0.1, 3600), 5.0, "seconds between two polls of its list of models"),
    }

    def check(self, argument: str, options: Mapping[str, Any]) -> None:
        """See :meth:`Engine.check`."""
        if not argument:
            raise ValueError(f"give the URL of the server's API: {_EXAMPLE}")
        BaseURL.parse(argument)
        _key(options)

    async def serve(
        self,
        argument: str,
        options: Mapping[str, Any],
        server: ModelServer,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """See :meth:`Engine.serve`.

        A server that cannot be reached is polled until it can; ``task_status.started()`` does not wait for it.
        """
        client = HttpClient(BaseURL.parse(argument))
        naming = Naming(options["prefix"], options["only"], options["rename"])
        models = UpstreamModels(
            client,
            _key(options),
            server,
            naming,
            poll_interval=options["poll"],
            max_concurrency=options["max_concurrency"],
            named=options["models"],
            asks_for_usage=options["usage"] == "ask",
            cache_tokens=options["cache_tokens"],
        )
        try:
            await models.run(task_status=task_status)
        finally:
            client.close()


def _key(options: Mapping[str, Any]) -> str | None:
    key: str | None = options["key"]
    name: str | None = options["key_env"]
    if name is None:
        return key
    if key is not None:
        raise ValueError("give key or key_env, not both")
    if name not in os.environ:
        raise ValueError(f"key_env: there is no environment variable '{name}'")
    return _secret(os.environ[name].strip())


engine: Final = _OpenAI()

"""The official client with a key that reaches its limits: it waits as it is told, and succeeds."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import openai
import patience
import pytest
import trio

from trio_cluster import ClusterServer, ClusterServerOptions, OutputChunk, ServerOptions
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.limits.memory import MemoryLimiter

#: Instead of a minute: the clients wait in real time.
WINDOW = 1.2


class OneKey:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    async def authenticate(self, context: Any) -> Principal:
        return Principal("k", limits=self.limits)


class Served:
    """A server with one key, and when its handler began."""

    def __init__(self, url: str) -> None:
        self.starts: list[float] = []
        self._url = url

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(api_key="k", base_url=f"{self._url}/v1", **options)

    async def ask(self, times: int, client: openai.OpenAI, **fields: Any) -> list[Any]:
        def run() -> list[Any]:
            message: Any = {"role": "user", "content": "hi"}
            return [
                client.chat.completions.create(model="m", messages=[message], **fields) for _ in range(times)
            ]

        return await trio.to_thread.run_sync(run)


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_cluster.node.MemoryLimiter", partial(MemoryLimiter, WINDOW))


async def start(nursery: trio.Nursery, limits: Limits) -> Served:
    server = ClusterServer(ClusterServerOptions(ServerOptions(host="127.0.0.1", port=0)))
    server.authenticator = OneKey(limits)
    started: list[float] = []

    async def model(request: Any) -> Any:
        started.append(time.monotonic())
        yield "hello"
        yield OutputChunk.usage(60, 40)

    server.register_chat("m", model)
    await nursery.start(server.run_as_standalone)
    served = Served(server.url or "")
    served.starts = started
    return served


def most(times: list[float], window: float) -> int:
    return max(sum(begins <= each < begins + window for each in times) for begins in times)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_client_waits_for_requests_as_it_is_told(
    nursery: trio.Nursery, window: None, stream: bool
) -> None:
    served = await start(nursery, Limits(requests_per_minute=3))
    with served.client() as client:
        await served.ask(10, client, stream=stream)
    assert len(served.starts) == 10
    assert most(served.starts, WINDOW - 0.05) <= 3
    # It did not wait for longer than it had to: three times a window, and a little.
    assert served.starts[-1] - served.starts[0] < 3 * WINDOW + 0.8
    nursery.cancel_scope.cancel()


async def test_the_client_waits_for_tokens_as_it_is_told(nursery: trio.Nursery, window: None) -> None:
    served = await start(nursery, Limits(tokens_per_minute=350))
    with served.client() as client:
        await served.ask(7, client, max_tokens=40)
    # Each uses a hundred.
    assert most(served.starts, WINDOW - 0.05) <= 3
    assert served.starts[-1] - served.starts[0] < 3 * WINDOW + 0.8
    nursery.cancel_scope.cancel()


async def test_the_client_sees_what_is_left_and_why_it_is_refused(
    nursery: trio.Nursery, window: None
) -> None:
    served = await start(nursery, Limits(requests_per_minute=1, tokens_per_minute=10_000))

    def look(client: openai.OpenAI) -> tuple[Any, openai.RateLimitError]:
        message: Any = {"role": "user", "content": "hi"}
        create = client.chat.completions.with_raw_response.create
        first = create(model="m", messages=[message])
        with pytest.raises(openai.RateLimitError) as raised:
            create(model="m", messages=[message])
        return first.headers, raised.value

    with served.client(max_retries=0) as client:
        headers, error = await trio.to_thread.run_sync(look, client)
    assert headers["x-ratelimit-limit-requests"] == "1"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert int(headers["x-ratelimit-remaining-tokens"]) < 10_000
    assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
    assert 0 < int(error.response.headers["retry-after-ms"]) <= 1000 * WINDOW
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("limits", "fields", "code"),
    [
        (Limits(budget_tokens=5), {"max_tokens": 10}, "insufficient_quota"),
        (Limits(tokens_per_minute=5), {"max_tokens": 10}, "rate_limit_exceeded"),
    ],
)
async def test_the_client_does_not_repeat_what_can_never_be_admitted(
    nursery: trio.Nursery, window: None, limits: Limits, fields: dict[str, Any], code: str
) -> None:
    served = await start(nursery, limits)
    watch = patience.Stopwatch()
    with served.client(max_retries=5) as client, pytest.raises(openai.RateLimitError) as raised:
        await served.ask(1, client, **fields)
    assert raised.value.code == code
    # The first of five repetitions would wait for half a second.
    assert watch.counted < 0.4
    assert served.starts == []
    nursery.cancel_scope.cancel()

"""A pool that is being served, handlers on it, and what becomes of their calls."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import trio
from memory_cluster import everything

from trio_cluster.core.answer import Failed
from trio_cluster.core.call import Call
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError
from trio_cluster.local.handler import HandlerBackend
from trio_cluster.local.pool import HandlerPool
from trio_cluster.openai import ChatRequest
from trio_cluster.options import ClusterServerOptions, ServerOptions


def request(
    *, stream: bool = True, idle_timeout: float = math.inf, total_timeout: float = math.inf
) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": "a b c"}], "stream": stream}
    return Request(
        endpoint="chat.completions",
        kind="chat",
        model="m",
        body=json.dumps(body).encode(),
        idle_timeout=idle_timeout,
        total_timeout=total_timeout,
    )


class Bench:
    """A pool that is being served, and handlers on it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.options = ClusterServerOptions(
            server=ServerOptions(max_concurrency=2, queue_timeout=5.0, default_timeout=60.0)
        )
        self.pool = HandlerPool(self.options)
        self.nursery = nursery

    def backend(self, handler: Any) -> HandlerBackend:
        return HandlerBackend(ModelInfo("m", "chat"), handler, self.pool)

    def open(self, handler: Any, **kwargs: Any) -> Call:
        return self.backend(handler).open(request(**kwargs))


async def failure(call: Call) -> ApiError:
    last = (await everything(call))[-1]
    assert isinstance(last, Failed)
    return last.error


async def released(call: Call) -> None:
    done = trio.Event()
    call.on_release(done.set)
    with trio.fail_after(1000):
        await done.wait()


async def echo(request: ChatRequest) -> AsyncIterator[str]:
    for word in request.last_text.split():
        yield word

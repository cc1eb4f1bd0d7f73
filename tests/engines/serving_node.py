"""A node of its own with engines, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import trio

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.engines import parse_serve, serve_engine

__all__ = ["ask", "serving"]


@asynccontextmanager
async def serving(
    *specs: str, memory: str = "1GiB", default_timeout: float = 60.0
) -> AsyncIterator[tuple[ClusterServer, httpx.AsyncClient]]:
    """Be where a node serves these engines, with so much memory for models on demand."""
    options = ServerOptions(host="127.0.0.1", port=0, default_timeout=default_timeout)
    server = ClusterServer(ClusterServerOptions(server=options, memory=memory))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone)
        for spec in specs:
            await nursery.start(serve_engine, parse_serve(spec), server)
        assert server.url is not None
        async with httpx.AsyncClient(
            base_url=server.url, trust_env=False, verify=False, timeout=20
        ) as client:
            yield server, client
        nursery.cancel_scope.cancel()


async def ask(client: httpx.AsyncClient, model: str) -> Any:
    """Return the text of an answer, or the error that came in its place."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        return response.json()["error"]
    return response.json()["choices"][0]["message"]["content"]

"""Clusters that serve each other's models through the engine ``openai``: masters and workers in one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import httpx
import trio

from trio_cluster import ChatRequest, ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.engines import parse_serve, serve_engine

__all__ = ["RULES", "Clusters", "Running", "ask", "echo", "entries", "served_by", "until"]

RULES = ["reject", "replicate"]


async def echo(request: ChatRequest) -> str:
    return "hello"


def server(port: int = 0, **options: Any) -> ClusterServer:
    return ClusterServer(
        ClusterServerOptions(server=ServerOptions(host="127.0.0.1", port=port), drain_timeout=1.0, **options)
    )


@attrs.define(eq=False)
class Running:
    """A node that runs until it is ended."""

    server: ClusterServer
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    over: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, start: Callable[..., Any], spec: str = "", *, task_status: Any) -> None:
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(start)
                    if spec:
                        await nursery.start(serve_engine, parse_serve(spec), self.server)
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self.over.set()

    async def end(self) -> None:
        self.scope.cancel()
        await self.over.wait()

    @property
    def url(self) -> str:
        assert self.server.url is not None
        return self.server.url


class Clusters:
    """Masters and workers in one process."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    async def master(self, port: int = 0, **options: Any) -> Running:
        node = Running(server(port, **options))
        await self._nursery.start(node.run, node.server.run_as_master)
        return node

    async def worker(self, master: Running, spec: str = "", **models: Any) -> Running:
        node = Running(server())
        for name, handler in models.items():
            node.server.register_chat(name, handler)
        start = partial(node.server.run_as_worker, "127.0.0.1", master.server.internal_port)
        await self._nursery.start(node.run, start, spec)
        return node

    async def relay(self, master: Running, target: Running, poll: float = 0.1) -> Running:
        """Start a worker of one cluster that serves what another one lists."""
        return await self.worker(master, f"openai:{target.url}/v1,poll={poll}")


@asynccontextmanager
async def client_of(node: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=node.url, timeout=5, trust_env=False, verify=False) as client:
        yield client


async def ask(node: Running, model: str = "m", **headers: str) -> tuple[int, str | None]:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    async with client_of(node) as client:
        response = await client.post("/v1/chat/completions", json=body, headers=headers)
    return response.status_code, None if response.is_success else response.json()["error"]["code"]


async def entries(node: Running) -> dict[str, dict[str, Any]]:
    async with client_of(node) as client:
        return {entry["id"]: entry for entry in (await client.get("/v1/models")).json()["data"]}


def served_by(node: Running, model: str = "m") -> int:
    return len(node.server.router.catalog.served_by(model))


async def until(condition: Callable[[], bool], within: float = 5, step: float = 0.02) -> None:
    with trio.fail_after(within):
        while not condition():  # noqa: ASYNC110  (there is no event for it)
            await trio.sleep(step)

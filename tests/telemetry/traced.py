"""A master and its workers in one process, on real sockets, that export to a collector."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio
from otlp_collector import Collector, ReceivedSpan, open_collector

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.telemetry import names

__all__ = ["PARENT", "SPAN_OF_CLIENT", "TRACE", "Traced", "open_traced"]

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN_OF_CLIENT = "b7ad6b7169203331"
#: The header with which a client says that its request belongs to a trace, which is sampled.
PARENT = {"traceparent": f"00-{TRACE}-{SPAN_OF_CLIENT}-01"}


class Traced:
    """A master, and workers.

    Attributes:
        collector: what they export to.
        master: the server; its models may be added.
    """

    def __init__(self, collector: Collector, nursery: trio.Nursery, options: dict[str, Any]) -> None:
        self.collector = collector
        self._options = options
        self._nursery = nursery
        self.master = self._server("master")
        self.workers: list[ClusterServer] = []

    def _server(self, name: str, **server: Any) -> ClusterServer:
        options = {"max_concurrency": 4, **server}
        return ClusterServer(
            ClusterServerOptions(
                server=ServerOptions(host="127.0.0.1", port=0, worker_id=name, **options),
                internal_port=0,
                **self._options,
            )
        )

    async def start_master(self) -> None:
        await self._nursery.start(self.master.run_as_master, 0)

    async def worker(
        self, name: str, add: Callable[[ClusterServer], object], *, otel: bool = True, **options: Any
    ) -> ClusterServer:
        """Start a worker.

        Args:
            name: of the worker.
            add: adds its models.
            otel: it exports spans.
            options: of the server.
        """
        server = self._server(name, **options)
        if not otel:
            server.options.otel = "off"
        add(server)
        await self._nursery.start(server.run_as_worker, "127.0.0.1", self.master.internal_port)
        self.workers.append(server)
        return server

    def client(self, **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.master.port}",
            trust_env=False,
            verify=False,
            headers=headers,
            timeout=10,
        )

    async def ask(self, model: str = "m", headers: dict[str, str] = PARENT, **fields: Any) -> httpx.Response:
        """Send a chat request, and read the answer."""
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}
        async with self.client(**headers) as client:
            return await client.post("/v1/chat/completions", json=body)

    async def stop(self) -> None:
        """Stop all; what they have exported has arrived then."""
        for server in (*self.workers, self.master):
            server.stop()
        while any(server.mode is not None for server in (*self.workers, self.master)):  # noqa: ASYNC110
            await trio.sleep(0.01)

    def check_tree(self, expected: Any) -> None:
        """Check the names of the spans, each with those below it."""
        assert self.tree() == expected

    def tree(self, span: ReceivedSpan | None = None) -> Any:
        """Return the names of the spans below one, or of those without a parent that has arrived, as nested lists."""
        spans = self.collector.spans
        ids = {each.id for each in spans}
        assert len(ids) == len(spans)
        below = [
            each for each in spans if (each.parent not in ids if span is None else each.parent == span.id)
        ]
        found = []
        for each in sorted(below, key=lambda each: each.begin):
            inner = self.tree(each)
            found.append((each.name, inner) if inner else each.name)
        return found


@asynccontextmanager
async def open_traced(monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Traced]:
    """Start a master that exports to a collector, and stop everything at the end."""
    with open_collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        async with trio.open_nursery() as nursery:
            traced = Traced(collector, nursery, {"drain_timeout": 2.0, **options})
            await traced.start_master()
            yield traced
            await traced.stop()
            nursery.cancel_scope.cancel()
        check_names(collector)


def check_names(collector: Collector) -> None:
    """Check that nothing has other names than the table says."""
    for span in collector.spans:
        if span.scope == names.SCOPE:
            general = names.SERVER_SPAN if span.name.startswith("POST /v1/") else names.INFERENCE_SPAN
            table = names.SPANS.get(span.name) or names.SPANS[general]
            # What the handlers of the tests add.
            assert set(span.attributes) - {"depth", "prompt.template"} <= set(table), span
            assert {name for name, _ in span.events} <= {names.FIRST_OUTPUT, names.NOTE, "exception"}
    assert {metric.name for metric in collector.metrics} <= set(names.METRICS)

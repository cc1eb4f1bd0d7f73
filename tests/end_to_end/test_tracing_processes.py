"""Traces of real processes: a master and a worker, started as a user starts them, that export to a real receiver."""

from __future__ import annotations

import signal

import httpx
import pytest
from nodes import Nodes
from served import chat, until

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra 'otel' is not installed")

from otlp_collector import open_collector

pytestmark = pytest.mark.processes

APP = """
from opentelemetry import trace
from trio_cluster import ClusterServer

server = ClusterServer()
tracer = trace.get_tracer("app")


@server.chat("m")
def answer(request):
    with tracer.start_as_current_span("thinking"):
        yield "a"
"""
TRACE = "0af7651916cd43dd8448eb211c80319c"


async def test_a_trace_over_the_processes_of_a_cluster(nodes: Nodes) -> None:
    (nodes.directory / "traced_app.py").write_text(APP)
    with open_collector() as collector:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "OTEL_SERVICE_NAME": "llm",
        }
        master = await nodes.start("master", 0, variables=variables)
        arguments = ("127.0.0.1", master.port, "--name", "w1", "--app", "traced_app:server", "--otel", "on")
        worker = await nodes.start("worker", *arguments, variables=variables)
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        async with httpx.AsyncClient(base_url=master.url, trust_env=False, verify=False) as client:
            response = await client.post("/v1/chat/completions", json=chat("m", stream=True), headers=headers)
        assert response.text.endswith("data: [DONE]\n\n")
        for node in (worker, master):
            node.send(signal.SIGTERM)
            assert await node.exit_code() == 0
        await until(lambda: len(collector.spans) >= 6)
    above = {span.id: span for span in collector.spans}
    names, span = [], collector.one("thinking")
    while span is not None:
        names.append(span.name)
        span = above.get(span.parent)  # type: ignore[assignment]
    assert names == ["thinking", "handler", "link", "attempt", "chat m", "POST /v1/chat/completions"]
    assert {span.trace_id for span in collector.spans} == {TRACE}
    for each in collector.spans:
        assert each.resource["service.name"] == "llm"
        assert each.resource["deployment.environment.name"] == "test"
    assert {each.resource["trio_cluster.mode"] for each in collector.spans} == {"master", "worker"}

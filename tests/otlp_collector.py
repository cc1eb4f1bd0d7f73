"""A real OTLP receiver: an HTTP server on loopback, in threads, that decodes what it is sent."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs
import patience
import trio
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

__all__ = ["Collector", "ReceivedSpan", "open_collector"]

_KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}
_STATUS = {0: "unset", 1: "ok", 2: "error"}


def value_of(value: Any) -> Any:
    """Return what an ``AnyValue`` holds."""
    which = value.WhichOneof("value")
    if which == "array_value":
        return [value_of(each) for each in value.array_value.values]
    return getattr(value, which)


def attributes_of(pairs: Any) -> dict[str, Any]:
    return {pair.key: value_of(pair.value) for pair in pairs}


@attrs.frozen
class ReceivedSpan:
    name: str
    kind: str
    trace_id: str
    id: str
    parent: str
    begin: int
    end: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    status: str
    message: str
    resource: dict[str, Any]
    scope: str
    schema: str


@attrs.frozen
class ReceivedMetric:
    name: str
    unit: str
    kind: str
    attributes: dict[str, Any]
    count: int
    sum: float
    bounds: tuple[float, ...]


class Collector:
    """What has arrived."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.metrics: list[ReceivedMetric] = []
        self.url = ""

    def named(self, name: str) -> list[ReceivedSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReceivedSpan:
        (span,) = self.named(name)
        return span

    def take_traces(self, body: bytes) -> bytes:
        request = ExportTraceServiceRequest.FromString(body)
        for of_resource in request.resource_spans:
            resource = attributes_of(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                for span in of_scope.spans:
                    self.spans.append(
                        ReceivedSpan(
                            span.name,
                            _KINDS[span.kind],
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            attributes_of(span.attributes),
                            [(event.name, attributes_of(event.attributes)) for event in span.events],
                            _STATUS[span.status.code],
                            span.status.message,
                            resource,
                            of_scope.scope.name,
                            of_scope.schema_url,
                        )
                    )
        return bytes(ExportTraceServiceResponse().SerializeToString())

    def take_metrics(self, body: bytes) -> bytes:
        request = ExportMetricsServiceRequest.FromString(body)
        for of_resource in request.resource_metrics:
            for of_scope in of_resource.scope_metrics:
                for metric in of_scope.metrics:
                    kind = metric.WhichOneof("data")
                    for point in getattr(metric, kind).data_points:
                        attributes = attributes_of(point.attributes)
                        if kind == "histogram":
                            numbers = point.count, point.sum, tuple(point.explicit_bounds)
                        else:
                            numbers = 1, point.as_int or point.as_double, ()
                        self.metrics.append(
                            ReceivedMetric(metric.name, metric.unit, kind, attributes, *numbers)
                        )
        return bytes(ExportMetricsServiceResponse().SerializeToString())

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of what has arrived."""
        with patience.fail_after(5):
            while not holds():  # noqa: ASYNC110
                await trio.sleep(0.01)


@contextmanager
def open_collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            take = {"/v1/traces": collector.take_traces, "/v1/metrics": collector.take_metrics}[self.path]
            answer = take(body)
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

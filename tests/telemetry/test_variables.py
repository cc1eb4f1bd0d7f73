"""Whether anything is exported, as the option and the variables say it; and what is said if it is not possible."""

from __future__ import annotations

import logging
import sys

import pytest
import trio

from trio_cluster import ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.errors import ClusterError
from trio_cluster.options import Otel
from trio_cluster.telemetry.variables import Signals, read_signals

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
URL = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("otel", "environ", "expected"),
    [
        ("auto", {}, Signals()),
        ("auto", {"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"}, Signals()),
        ("auto", {ENDPOINT: URL}, Signals("otlp", "otlp")),
        ("auto", {ENDPOINT: ""}, Signals()),
        ("auto", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": URL}, Signals("otlp", "none")),
        ("auto", {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": URL}, Signals("none", "otlp")),
        ("auto", {"OTEL_TRACES_EXPORTER": "console"}, Signals("console", "none")),
        ("auto", {"OTEL_METRICS_EXPORTER": "OTLP"}, Signals("none", "otlp")),
        ("auto", {ENDPOINT: URL, "OTEL_METRICS_EXPORTER": "none"}, Signals("otlp", "none")),
        ("auto", {ENDPOINT: URL, "OTEL_SDK_DISABLED": "True"}, Signals()),
        ("auto", {ENDPOINT: URL, "OTEL_SDK_DISABLED": "false"}, Signals("otlp", "otlp")),
        ("auto", {ENDPOINT: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, Signals("otlp", "otlp")),
        ("on", {}, Signals("otlp", "otlp")),
        ("on", {"OTEL_METRICS_EXPORTER": "none"}, Signals("otlp", "none")),
        ("on", {"OTEL_SDK_DISABLED": "true"}, Signals()),
        ("off", {ENDPOINT: URL}, Signals()),
    ],
)
def test_what_is_exported(otel: Otel, environ: dict[str, str], expected: Signals) -> None:
    assert read_signals(environ, otel) == expected
    assert bool(expected) == (expected != Signals())


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"OTEL_TRACES_EXPORTER": "zipkin"},
            "OTEL_TRACES_EXPORTER: expected otlp, console or none, got 'zipkin'",
        ),
        (
            {ENDPOINT: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf is supported, got 'grpc'",
        ),
        (
            {ENDPOINT: URL, "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL: only http/protobuf is supported, got 'grpc'",
        ),
    ],
)
def test_what_is_not_supported(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        read_signals(environ, "auto")


def a_server(otel: Otel) -> ClusterServer:
    return ClusterServer(ClusterServerOptions(server=ServerOptions(host="127.0.0.1", port=0), otel=otel))


@pytest.fixture
def _not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("opentelemetry", "trio_cluster.telemetry."))
    ]:
        if name not in ("trio_cluster.telemetry.variables", "trio_cluster.telemetry.node_telemetry"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)


@pytest.mark.usefixtures("_not_installed")
@pytest.mark.parametrize("how", ["missing", "not supported"])
async def test_a_node_serves_without_what_cannot_be_exported(
    how: str, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ENDPOINT, URL)
    expected = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
    if how == "not supported":
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "jaeger")
        expected = "OTEL_TRACES_EXPORTER: expected otlp"
    server = a_server("auto")
    await nursery.start(server.run_as_standalone)
    server.stop()
    (record,) = [each for each in caplog.records if each.name == "trio_cluster.telemetry"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("serving without OpenTelemetry")
    assert expected in record.getMessage()
    with pytest.raises(ClusterError, match="OTEL_"):
        await a_server("on").run_as_standalone()


@pytest.mark.parametrize("otel", ["auto", "off"])
async def test_nothing_is_loaded_where_nothing_is_exported(
    otel: Otel, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    def unwanted(*args: object) -> None:
        raise AssertionError("the SDK is loaded")

    monkeypatch.setattr("trio_cluster.telemetry.node_telemetry._load", unwanted)
    if otel == "off":
        monkeypatch.setenv(ENDPOINT, URL)
    server = a_server(otel)
    await nursery.start(server.run_as_standalone)
    assert server.router.tracer is None
    assert server.stories is not None
    assert server.stories.tracer is None
    server.stop()
    assert not [each for each in caplog.records if each.name == "trio_cluster.telemetry"]

"""Collectors that are away, or never answer: requests go on, a node stops in time, and the log stays readable."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import patience
import pytest
import trio

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra 'otel' is not installed")

from traced import Traced

from trio_cluster import ChatRequest
from trio_cluster.telemetry import exporting

#: Seconds that each of the nodes here waits for its collector, when it ends.
FLUSH_TIME = 0.3


@contextmanager
def closed_port() -> Iterator[int]:
    """A port of which every connection is refused."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextmanager
def silent_server() -> Iterator[int]:
    """A port that accepts connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        yield sock.getsockname()[1]


async def answer(request: ChatRequest) -> str:
    return "a"


@pytest.mark.parametrize("collector", [closed_port, silent_server])
async def test_a_collector_that_is_dead(
    collector: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setattr("trio_cluster.telemetry.node_telemetry.FLUSH_TIME", FLUSH_TIME)
    with collector() as port:  # type: ignore[operator]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        async with trio.open_nursery() as nursery:
            traced = Traced(None, nursery, {})  # type: ignore[arg-type]
            await traced.start_master()
            await traced.worker("w1", lambda server: server.register_chat("m", answer))
            for _ in range(20):
                assert (await traced.ask()).status_code == 200
            # The two nodes stop one after the other at worst. Without a bound it would be 10 s for each export.
            with patience.fail_after(2 * FLUSH_TIME + 1):
                await traced.stop()
            nursery.cancel_scope.cancel()
    ours = [each for each in caplog.records if each.name == "trio_cluster.telemetry"]
    complaints = [each for each in ours if each.getMessage().startswith("OpenTelemetry:")]
    assert len(complaints) <= 1
    assert all(each.levelno <= logging.WARNING and not each.exc_info for each in ours)
    # The lines of the SDK go nowhere else. (pytest has handlers of its own at loggers that pass nothing on.)
    assert not any(
        logging.getLogger(name).propagate for name in ("opentelemetry.exporter", "opentelemetry.sdk")
    )


def test_many_lines_of_the_sdk_are_one_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 1000.0
    lines = exporting.ExportLines(lambda: now)
    for _ in range(3):
        for number in range(100):
            record = logging.LogRecord(
                "opentelemetry.x", logging.ERROR, "x.py", 1, "failed: %d", (number,), None
            )
            lines.handle(record)
            now += 0.01
        now += exporting.LINES_APART
    ours = [record for record in caplog.records if "failed:" in record.getMessage()]
    assert [record.getMessage() for record in ours] == ["OpenTelemetry: failed: 0"] * 3
    assert [record.fields for record in ours] == [{}, {"suppressed": 99}, {"suppressed": 99}]  # type: ignore[attr-defined]

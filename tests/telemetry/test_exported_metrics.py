"""Metrics by the conventions for generative AI, as a collector gets them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra 'otel' is not installed")

from traced import open_traced

from trio_cluster import ChatRequest, OutputChunk
from trio_cluster.telemetry import names


async def answer(request: ChatRequest) -> AsyncIterator[Any]:
    yield "a"
    yield "b"
    yield OutputChunk.usage(7, 5)


async def fail(request: ChatRequest) -> str:
    raise RuntimeError


@pytest.mark.parametrize("sampler", ["always_on", "always_off"])
async def test_every_request_is_counted(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    async with open_traced(monkeypatch) as traced:

        def add(server: Any) -> None:
            server.register_chat("m", answer)
            server.register_chat("f", fail)

        await traced.worker("w1", add)
        for model, stream in (("m", True), ("m", False), ("f", False), ("unheard-of", False)):
            await traced.ask(model, stream=stream)
        await traced.stop()
        metrics = traced.collector.metrics
        assert bool(traced.collector.spans) is (sampler == "always_on")
    common = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "trio_cluster"}
    of_m = {**common, "gen_ai.request.model": "m"}
    counted = {(each.name, tuple(sorted(each.attributes.items()))): each for each in metrics}

    def one(name: str, attributes: dict[str, str]) -> Any:
        return counted[name, tuple(sorted(attributes.items()))]

    assert one(names.INPUT_TOKENS_COUNTER, of_m).sum == 14
    assert one(names.OUTPUT_TOKENS_COUNTER, of_m).sum == 10
    assert one(names.REQUEST_DURATION, of_m).count == 2
    assert one(names.TIME_TO_FIRST_TOKEN, of_m).count == 1
    assert one(names.TIME_PER_OUTPUT_TOKEN, of_m).count == 1
    failed = one(names.REQUEST_DURATION, {**common, "gen_ai.request.model": "f", "error.type": "500"})
    assert failed.count == 1
    # The name of a model that is not served is no label.
    assert one(names.REQUEST_DURATION, {**common, "error.type": "404"}).count == 1
    for each in metrics:
        unit, _, bounds = names.METRICS[each.name]
        assert (each.unit, each.bounds) == (unit, bounds)
        assert set(each.attributes) <= set(names.METRIC_ATTRIBUTES)


async def test_metrics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", lambda server: server.register_chat("m", answer))
        assert traced.master.router.tracer is None
        await traced.ask()
        await traced.stop()
        assert traced.collector.spans == []
        assert names.REQUEST_DURATION in {each.name for each in traced.collector.metrics}


async def test_traces_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", lambda server: server.register_chat("m", answer))
        await traced.ask()
        await traced.stop()
        assert traced.collector.spans
        assert traced.collector.metrics == []

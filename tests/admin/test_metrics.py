"""The numbers of a node with hundreds of workers: their text is not written while others wait."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from trio_cluster import ClusterServerOptions
from trio_cluster.admin import metrics
from trio_cluster.gateway.node_context import GaugeSample, NodeContext
from trio_cluster.routing.router import Router


@pytest.mark.parametrize(("workers", "elsewhere"), [(3, False), (600, True)])
async def test_many_numbers_are_written_in_a_thread_and_a_few_are_not(
    workers: int, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    original = metrics.generate_latest

    def generate_latest(numbers: Any) -> bytes:
        threads.append(threading.get_ident())
        return original(numbers)

    monkeypatch.setattr(metrics, "generate_latest", generate_latest)

    def gauges() -> list[GaugeSample]:
        return [
            GaugeSample("lag", "How late.", number, {"worker": f"w{number}"}) for number in range(workers)
        ]

    reply = await metrics.metrics_reply(NodeContext(Router(), ClusterServerOptions(), gauges=gauges))
    assert isinstance(reply.body, bytes)
    lines = reply.body.decode().splitlines()
    assert [line for line in lines if line.startswith("trio_cluster_lag{")] == [
        f'trio_cluster_lag{{worker="w{number}"}} {number}.0' for number in range(workers)
    ]
    assert [thread != threading.get_ident() for thread in threads] == [elsewhere]

"""Tests of a model, and of a cluster whose machines fail.

    pip install pytest pytest-trio
    pytest test_my_model.py

The first two run the model itself, in real time; the other two run a simulated cluster in virtual time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import trio

from trio_cluster import ChatRequest
from trio_cluster.testing import DoesNotStop, FakeModel, SimulatedCluster, check_handler, worker


def my_model(request: ChatRequest) -> Iterator[str]:
    """Yield words slowly, as a model that computes in a thread and can be stopped between two tokens."""
    for word in request.last_text.split():
        time.sleep(0.01)
        yield word + " "


def stubborn_model(request: ChatRequest) -> str:
    """Return the message slowly, as a model that computes in a thread and cannot be stopped."""
    time.sleep(0.5)
    return request.last_text


@pytest.mark.trio
async def test_my_model_keeps_its_promises() -> None:
    report = await check_handler(my_model, bound=1.0)
    assert report.replayable


@pytest.mark.trio
async def test_a_model_that_cannot_be_stopped_is_detected() -> None:
    with pytest.raises(DoesNotStop):
        await check_handler(stubborn_model, bound=0.1)


async def test_a_replica_takes_over_before_the_first_token(cluster: SimulatedCluster) -> None:
    cluster.master.server.options.on_conflict = "replicate"
    models = {name: FakeModel(first_after=5) for name in ("one", "two")}
    for name, model in models.items():
        server = worker(name)
        server.register_chat("m", model)
        await cluster.start_worker(server)

    async def kill_the_worker_that_is_asked() -> None:
        await trio.sleep(1)
        (asked,) = [name for name, model in models.items() if model.running]
        cluster.workers[asked].kill()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_the_worker_that_is_asked)
        answer = await cluster.client().chat("m")
    assert answer.report().text == "t0 t1 t2 "
    assert trio.current_time() == 6


async def test_a_frozen_worker_is_dropped_and_accepted_again(cluster: SimulatedCluster) -> None:
    server = worker("one")
    server.register_chat("m", FakeModel())
    await cluster.start_worker(server)
    cluster.workers["one"].freeze()
    await trio.sleep(60)
    assert (await cluster.client().chat("m")).status == 503
    cluster.workers["one"].thaw()
    await trio.sleep(60)
    assert (await cluster.client().chat("m")).report().ending == "finished"

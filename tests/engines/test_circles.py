"""Clusters that serve each other's models through the engine ``openai``, on real sockets: nothing goes in a circle."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import patience
import pytest
import trio
from clusters import RULES, Clusters, Running, ask, echo, entries, served_by, until

from trio_cluster import ChatRequest
from trio_cluster.engines import parse_serve, serve_engine
from trio_cluster.engines._base_url import BaseURL
from trio_cluster.engines._http_client import HttpClient
from trio_cluster.engines._upstream_calls import UpstreamCalls


@pytest.mark.parametrize("rule", RULES)
async def test_a_model_is_served_by_both_clusters_and_by_neither_when_its_worker_is_gone(
    rule: str, clusters: Clusters
) -> None:
    near, far = await clusters.master(on_conflict=rule), await clusters.master(on_conflict=rule)
    real = await clusters.worker(near, m=echo)
    back, _ = await clusters.relay(near, far), await clusters.relay(far, near)
    await until(lambda: served_by(far) == 1)
    await trio.sleep(0.5)
    ids = [node.server.router.catalog.cluster_id for node in (near, far)]
    assert (await entries(near))["m"]["trio_cluster_via"] == ids[:1]
    assert (await entries(far))["m"]["trio_cluster_via"] == ids
    assert "came through this cluster" in back.server.worker_client.rejected_models["m"]  # type: ignore[union-attr]
    assert [await ask(node) for node in (near, far)] == [(200, None)] * 2
    await real.end()
    assert await ask(near) == (503, "model_unavailable")
    await until(lambda: served_by(far) == 0)
    assert [await ask(node) for node in (near, far)] == [(503, "model_unavailable")] * 2
    assert not near.server.router.live
    assert not far.server.router.live


@pytest.mark.parametrize("rule", RULES)
async def test_a_master_that_was_restarted_does_not_serve_its_own_model_from_itself(
    rule: str, clusters: Clusters
) -> None:
    near, far = await clusters.master(on_conflict=rule), await clusters.master(on_conflict=rule)
    real = await clusters.worker(near, m=echo)
    await clusters.relay(near, far)
    await clusters.relay(far, near)
    await until(lambda: served_by(far) == 1)
    port = near.server.port
    assert port is not None
    # Its own model is not back for a while: what the other cluster still lists comes first.
    await real.end()
    await near.end()
    near = await clusters.master(port, on_conflict=rule)
    began = trio.current_time()
    while trio.current_time() < began + 7:
        status, code = await ask(near)
        assert (status, code) in [
            (404, "model_not_found"),
            (503, "model_unavailable"),
            (502, "upstream_lost"),
            (508, "loop_detected"),
        ]
        await trio.sleep(0.1)
    assert served_by(near) == served_by(far) == 0
    await clusters.worker(near, m=echo)
    await until(lambda: served_by(far) == 1)
    assert [await ask(node) for node in (near, far)] == [(200, None)] * 2
    assert served_by(near) == 1


@pytest.mark.parametrize("local", [False, True])
async def test_an_engine_that_points_at_its_own_cluster_takes_nothing(
    local: bool, clusters: Clusters
) -> None:
    master = await clusters.master(on_conflict="replicate")
    real = await clusters.worker(master, m=echo)
    if local:
        spec = parse_serve(f"openai:{master.url}/v1,poll=0.1")
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_engine, spec, master.server)
            await trio.sleep(0.5)
            assert served_by(master) == 1
            await real.end()
            assert await ask(master) == (503, "model_unavailable")
            nursery.cancel_scope.cancel()
    else:
        await clusters.relay(master, master)
        await trio.sleep(0.5)
        assert served_by(master) == 1
        await real.end()
        assert await ask(master) == (503, "model_unavailable")


async def test_three_clusters_in_a_circle_serve_what_one_of_them_has(clusters: Clusters) -> None:
    masters = [await clusters.master(on_conflict="replicate") for _ in range(3)]
    real = await clusters.worker(masters[0], m=echo)
    for number, master in enumerate(masters):
        await clusters.relay(master, masters[number - 1])
    await until(lambda: all(served_by(master) for master in masters))
    assert [await ask(master) for master in masters] == [(200, None)] * 3
    assert [served_by(master) for master in masters] == [1, 1, 1]
    await real.end()
    await until(lambda: not any(served_by(master) for master in masters))


async def test_a_request_is_not_sent_back_to_where_it_came_from_while_both_clusters_have_the_model(
    clusters: Clusters,
) -> None:
    masters = [await clusters.master(on_conflict="replicate") for _ in range(2)]
    for number, master in enumerate(masters):
        await clusters.worker(master, m=echo)
        await clusters.relay(master, masters[number - 1])
    await until(lambda: all(served_by(master) == 2 for master in masters))
    for _ in range(6):
        assert [await ask(master) for master in masters] == [(200, None)] * 2
    for master in masters:
        assert master.server.router.stats.counters()["retried"] == 0


def relay_without_provenance(node: Running, target: Running) -> None:
    """Serve another cluster's model as a version would that does not know the field in the list."""
    client = HttpClient(BaseURL.parse(f"{target.url}/v1"))
    calls = UpstreamCalls(client, None, lambda _: None)
    node.server.register_raw("m", partial(calls.forward, "m"))


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_request_that_comes_back_is_refused_although_nothing_is_known_of_the_models(
    count: int, clusters: Clusters
) -> None:
    masters = [await clusters.master() for _ in range(count)]
    for number, master in enumerate(masters):
        relay_without_provenance(master, masters[number - 1])
    with patience.fail_after(2):
        assert await ask(masters[0]) == (508, "loop_detected")
    await until(lambda: not any(master.server.router.live for master in masters))
    assert [master.server.router.stats.counters()["admitted"] for master in masters] == [1] * count


async def test_a_circle_of_clusters_that_do_not_know_themselves_ends(clusters: Clusters) -> None:
    master = await clusters.master()
    real = await clusters.worker(master, m=echo)
    del real
    via = ", ".join(f"cluster-{number}" for number in range(15))
    assert await ask(master, **{"x-trio-cluster-via": via}) == (200, None)
    assert await ask(master, **{"x-trio-cluster-via": via + ", another"}) == (508, "loop_detected")
    assert await ask(master, **{"x-trio-cluster-via": "?, ,;,"}) == (200, None)


async def test_what_is_left_of_a_request_s_time_goes_along_to_the_other_cluster(clusters: Clusters) -> None:
    near, far = await clusters.master(), await clusters.master()
    seen: list[float] = []

    async def handler(request: ChatRequest) -> str:
        seen.append(float(request.headers["x-request-timeout"]))
        await trio.sleep(30)
        return "late"

    await clusters.worker(far, m=handler)
    await clusters.worker(near, f"openai:{far.url}/v1,poll=0.1,max_concurrency=1")
    await until(lambda: served_by(near) == 1)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(ask, near, **{"x-request-timeout": "1"}))
        await until(lambda: bool(seen))
        # Waits for the first one to time out, before it is sent on.
        assert await ask(near, **{"x-request-timeout": "1.5"}) == (504, "timeout")
    assert trio.current_time() - began < 3
    assert 0.2 < seen[1] < 1
    await until(lambda: not far.server.router.live, within=2)


async def test_the_list_shows_ids_and_an_engine_takes_only_what_is_one(clusters: Clusters) -> None:
    master = await clusters.master()
    master.server.register_raw("m", echo_raw, via=["a", "b"])
    assert (await entries(master))["m"]["trio_cluster_via"][:2] == ["a", "b"]
    with pytest.raises(ValueError, match="came through this cluster"):
        master.server.register_raw("n", echo_raw, via=[master.server.router.catalog.cluster_id])


async def echo_raw(call: Any) -> None:
    call.begin(200, "application/json")
    await call.send(json.dumps({}).encode())

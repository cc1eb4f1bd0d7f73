"""Models on demand behind a master, in virtual time: what it knows of them, and what clients see meanwhile."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio

from trio_cluster import ChatRequest, ClusterServer
from trio_cluster.core.limits import WINDOW
from trio_cluster.engines import ServedModel, not_loaded, serve_on_demand
from trio_cluster.errors import ClusterError
from trio_cluster.on_demand.residents import Run
from trio_cluster.testing import SimulatedCluster, open_cluster, settle, worker


@attrs.define
class Model:
    """A model that takes time to load."""

    name: str = "m"
    seconds: float = 100.0
    fails: str = ""
    says: str = "hello"
    loads: int = 0
    run: Run | None = None

    @asynccontextmanager
    async def open(self, run: Run) -> AsyncIterator[ServedModel]:
        self.loads += 1
        self.run = run
        await trio.sleep(self.seconds)
        if self.fails:
            raise ClusterError(self.fails)

        async def answer(request: ChatRequest) -> AsyncIterator[str]:
            yield self.says
            await trio.sleep(request.raw.get("pause", 0.0))

        yield ServedModel(self.name, "chat", answer)

    async def serve(
        self, server: ClusterServer, *, task_status: trio.TaskStatus[None], **options: Any
    ) -> None:
        described = ServedModel(self.name, "chat", not_loaded)
        await serve_on_demand(server, described, self.open, task_status=task_status, **options)


async def start(
    cluster: SimulatedCluster, nursery: trio.Nursery, name: str, *models: Model, **options: Any
) -> ClusterServer:
    server = worker(name, memory="100", **options)
    for model in models:
        await nursery.start(
            lambda task_status, model=model: model.serve(server, memory=60, task_status=task_status)
        )
    await cluster.start_worker(server)
    return server


async def state(cluster: SimulatedCluster, model: str = "m") -> Any:
    return (await cluster.client().get(f"/v1/models/{model}")).json()["state"]


async def test_a_start_that_takes_longer_than_a_model_may_be_silent(autojump_clock: object) -> None:
    model = Model()
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        await start(cluster, nursery, "w", model)
        assert await state(cluster) == "cold"
        began = trio.current_time()
        for stream in (False, True):
            nursery.start_soon(lambda stream=stream: cluster.client().chat("m", stream=stream))
        await trio.sleep(1)
        assert await state(cluster) == "starting"
        status = (await cluster.client().get("/cluster/status")).json()
        assert status["workers"][0]["model_states"] == {"m": "starting"}
        response = await cluster.client().chat("m", stream=False)
        assert response.status == 200
        assert trio.current_time() - began == 100
        assert await state(cluster) == "ready"
        assert model.loads == 1
        nursery.cancel_scope.cancel()


async def test_streams_get_comments_that_say_what_is_done_and_how_long_it_takes(
    autojump_clock: object,
) -> None:
    model = Model(seconds=40.0)
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        server = await start(cluster, nursery, "w", model)
        first = await cluster.client().chat("m")
        assert b": starting m\n\n" in first.body
        await server.on_demand.unload(server.on_demand.by_model["m"])
        second = await cluster.client().chat("m")
        assert second.body.split(b"data:")[0].split(b"\n\n")[:3] == [
            b": starting m, about 30 s",
            b": starting m, about 20 s",
            b": starting m, about 10 s",
        ]
        assert second.report().ending == "finished"
        nursery.cancel_scope.cancel()


async def test_the_idle_timeout_counts_from_the_end_of_the_start(autojump_clock: object) -> None:
    model = Model()
    async with open_cluster(default_timeout=30.0) as cluster, trio.open_nursery() as nursery:
        await start(cluster, nursery, "w", model, default_timeout=30.0)
        began = trio.current_time()
        response = await cluster.client().chat("m", pause=40.0)
        assert response.report().ending == "failed"
        assert response.report().error is not None
        assert response.report().error["code"] == "timeout"
        assert 130 <= trio.current_time() - began < 133
        nursery.cancel_scope.cancel()


async def test_the_total_timeout_counts_the_start(autojump_clock: object) -> None:
    model = Model()
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        await start(cluster, nursery, "w", model)
        began = trio.current_time()
        headers = {"x-request-timeout": "20"}
        response = await cluster.client(**headers).chat("m", stream=False)
        assert response.status == 504
        assert trio.current_time() - began == pytest.approx(20, abs=1)
        # Nobody waits any more.
        await trio.sleep(1)
        assert await state(cluster) == "cold"
        nursery.cancel_scope.cancel()


async def test_a_start_that_fails_is_tried_on_another_worker(autojump_clock: object) -> None:
    broken, sound = Model(seconds=70.0, fails="out of memory"), Model(seconds=20.0)
    async with open_cluster(on_conflict="replicate") as cluster, trio.open_nursery() as nursery:
        await start(cluster, nursery, "w1", broken)
        assert (await cluster.client().chat("m", stream=False)).status == 503
        broken.loads = 0
        await trio.sleep(20)
        await start(cluster, nursery, "w2", sound)
        # The first one is expected to be there sooner.
        cluster.workers["w1"].server.on_demand.by_model["m"].resident.start_seconds = 1.0
        cluster.workers["w1"].server.on_demand.update()
        await trio.sleep(6)
        response = await cluster.client().chat("m", stream=False)
        assert response.status == 200
        assert (broken.loads, sound.loads) == (1, 1)
        nursery.cancel_scope.cancel()


async def test_a_model_that_cannot_be_started_is_shown_as_failed_until_it_can(autojump_clock: object) -> None:
    model = Model(seconds=15.0, fails="out of memory")
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        await start(cluster, nursery, "w", model)

        async def shown() -> tuple[Any, ...]:
            (known,) = (await cluster.client().get("/cluster/status")).json()["workers"]
            async with cluster.client("page").open("GET", "/cluster/events", b"") as response:
                _, data = (await response.receive()).split(b"\ndata: ")
                (item,) = json.loads(data)["models"]
            (replica,) = item["replicas"]
            return (
                known["model_states"],
                known["failed_models"],
                item["state"],
                replica["state"],
                bool(item["why"]),
            )

        assert await shown() == ({"m": "cold"}, [], "cold", "cold", False)
        await cluster.client().chat("m")
        # For clients it is as cold as it was: the next request starts it again.
        assert await state(cluster) == "cold"
        assert await shown() == ({"m": "cold"}, ["m"], "failed", "failed", True)
        model.fails = ""
        await trio.sleep(60)
        await cluster.client().chat("m")
        assert await shown() == ({"m": "ready"}, [], "ready", "ready", False)
        nursery.cancel_scope.cancel()


async def test_a_failed_start_is_an_error_event_in_a_stream_that_has_begun(autojump_clock: object) -> None:
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        await start(cluster, nursery, "w", Model(seconds=15.0, fails="out of memory"))
        response = await cluster.client().chat("m")
        assert response.report().error is not None
        assert response.report().error["code"] == "model_start_failed"
        assert response.report().error["message"] == "m could not be started: out of memory"
        nursery.cancel_scope.cancel()


async def test_a_call_whose_start_fails_is_over_although_its_body_has_not_arrived(
    autojump_clock: object,
) -> None:
    # Larger than what a worker is sent before it reads.
    large = "x" * (4 * WINDOW)
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        await start(cluster, nursery, "w", Model(seconds=15.0, fails="out of memory"))
        response = await cluster.client().chat("m", large, stream=False)
        assert response.error["code"] == "model_start_failed"
        await settle(cluster, within=5.0)
        nursery.cancel_scope.cancel()


async def test_a_model_that_is_lost_while_a_call_waits_for_a_slot(autojump_clock: object) -> None:
    model = Model(seconds=1.0)
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        await start(cluster, nursery, "w", model, max_concurrency=1)
        nursery.start_soon(lambda: cluster.client().chat("m", pause=5.0))
        await trio.sleep(2)

        async def lose() -> None:
            await trio.sleep(1)
            assert model.run is not None
            model.run.lost("it has died")

        nursery.start_soon(lose)
        response = await cluster.client().chat("m", stream=False)
        assert (response.status, response.error["code"]) == (502, "upstream_lost")
        nursery.cancel_scope.cancel()


async def test_a_model_is_loaded_and_unloaded_by_an_operator(autojump_clock: object) -> None:
    model, aliases = Model(), {"large": ["m", "other"]}
    async with open_cluster(operator_key="k", aliases=aliases) as cluster, trio.open_nursery() as nursery:
        server = await start(cluster, nursery, "w", model)
        client = cluster.client(authorization="Bearer k")
        began = trio.current_time()
        loaded = await client.post("/cluster/models/m/load", {})
        assert loaded.json() == {"model": "m", "state": "ready", "nodes": ["w"]}
        assert trio.current_time() - began == 100
        nursery.start_soon(lambda: cluster.client().chat("m", pause=30.0))
        await trio.sleep(1)
        unloaded = await client.post("/cluster/models/m/unload", {})
        assert unloaded.json() == {"model": "m", "state": "cold", "nodes": ["w"]}
        assert trio.current_time() - began == pytest.approx(130, abs=1)
        assert (await client.post("/cluster/models/m/unload", {})).json()["nodes"] == []
        assert model.loads == 1
        for path, body, status, code in (
            ("/cluster/models/other/load", {}, 404, "model_not_found"),
            ("/cluster/models/m/load", {"worker": "w2"}, 404, "worker_not_found"),
        ):
            response = await client.post(path, body)
            assert (response.status, response.error["code"]) == (status, code)
        assert (await cluster.client().post("/cluster/models/m/load", {})).status == 401
        for verb in ("load", "unload"):
            response = await client.post(f"/cluster/models/large/{verb}", {})
            assert (response.status, response.error["code"]) == (409, "not_on_demand")
            assert (
                response.error["message"] == "'large' is an alias; name a model that it stands for: m, other"
            )
        server.register_chat("always", lambda request: "x")
        await trio.sleep(1)
        response = await client.post("/cluster/models/always/load", {})
        assert (response.status, response.error["code"]) == (409, "not_on_demand")
        nursery.cancel_scope.cancel()


async def test_a_load_fails_with_the_start(autojump_clock: object) -> None:
    async with open_cluster(operator_key="k") as cluster, trio.open_nursery() as nursery:
        await start(cluster, nursery, "w", Model(fails="out of memory"))
        response = await cluster.client(authorization="Bearer k").post("/cluster/models/m/load", {})
        assert response.status == 503
        assert response.error["message"] == "m could not be started: out of memory"
        nursery.cancel_scope.cancel()


async def test_a_master_runs_its_own_models_on_demand(autojump_clock: object) -> None:
    model = Model()
    async with open_cluster(operator_key="k", memory="100") as cluster, trio.open_nursery() as nursery:
        server = cluster.master.server
        await nursery.start(lambda task_status: model.serve(server, task_status=task_status))
        assert await state(cluster) == "cold"
        client = cluster.client(authorization="Bearer k")
        assert (await client.post("/cluster/models/m/load", {})).json()["nodes"] == ["local"]
        assert await state(cluster) == "ready"
        status = (await client.get("/cluster/status")).json()["on_demand"]
        assert (status["memory"], status["models"]["m"]["state"]) == (100, "ready")
        assert status["models"]["m"]["start_seconds"] == 100.0
        nursery.cancel_scope.cancel()


async def test_a_model_that_is_gone_has_no_state_any_more(autojump_clock: object) -> None:
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        async with trio.open_nursery() as engines:
            await start(cluster, engines, "w", Model())
            assert cluster.workers["w"].server.list_models() == ["m"]
            engines.cancel_scope.cancel()
        await trio.sleep(6)
        status = (await cluster.client().get("/cluster/status")).json()
        assert status["workers"][0]["model_states"] == {}
        assert "on_demand" not in status
        nursery.cancel_scope.cancel()

"""The id of a request: in every answer, and in every line that any node logs because of it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ASRRequest, ChatRequest, ClusterServer, RawCall
from trio_cluster.cli import logs
from trio_cluster.core.log_context import current_request
from trio_cluster.gateway import body as request_body
from trio_cluster.gateway.node_context import NodeContext
from trio_cluster.gateway.pipeline import Gateway
from trio_cluster.testing import Response, SimulatedCluster, open_cluster, settle, worker

pytestmark = pytest.mark.usefixtures("restored_logging")

OPTIONS: dict[str, Any] = {"default_timeout": 5.0, "drain_timeout": 5.0, "worker_timeout": 10.0}


class Log:
    """What all nodes have logged."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        logs.configure("info", "json", self._stream)

    def lines(self, *loggers: str) -> list[dict[str, Any]]:
        """Return the lines so far, or those of some loggers, and forget them all."""
        lines = [json.loads(line) for line in self._stream.getvalue().splitlines()]
        self._stream.truncate(0)
        self._stream.seek(0)
        return [line for line in lines if not loggers or line["logger"] in loggers]


@pytest.fixture
async def cluster() -> AsyncIterator[SimulatedCluster]:
    async with open_cluster(**OPTIONS) as opened:
        yield opened
        await settle(opened)


@pytest.fixture(params=["master", "worker"])
async def node(request: pytest.FixtureRequest, cluster: SimulatedCluster) -> ClusterServer:
    server = cluster.master.server if request.param == "master" else worker("w1", **OPTIONS)
    add_models(server)
    if request.param == "worker":
        await cluster.start_worker(server)
    return server


def add_models(server: ClusterServer) -> None:
    app = logging.getLogger("an.application")

    @server.chat("talks")
    async def talks(request: ChatRequest) -> str:
        app.warning("from the handler")
        await trio.to_thread.run_sync(app.warning, "from a thread of it")
        return "x"

    @server.chat("plain")
    def plain(request: ChatRequest) -> str:
        app.warning("from a plain handler")
        return "x"

    @server.chat("fails")
    async def fails(request: ChatRequest) -> str:
        raise RuntimeError("as expected")

    @server.chat("sleeps")
    async def sleeps(request: ChatRequest) -> str:
        await trio.sleep_forever()
        return ""

    @server.chat("clings")
    async def clings(request: ChatRequest) -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(20)
        return ""

    @server.asr("hears")
    async def hears(request: ASRRequest) -> str:
        return "x"

    async def raw(call: RawCall) -> None:
        raise RuntimeError("as expected")

    async def wrong_head(call: RawCall) -> None:
        call.begin(200, "text/plain", (("x", "y" * 100_000),))

    server.register_raw("raw", raw)
    server.register_raw("wrong head", wrong_head)


async def ask(cluster: SimulatedCluster, model: str, request_id: str = "the-one") -> Response:
    answer = await cluster.client(**{"x-request-id": request_id}).chat(model, stream=False)
    assert answer.headers["x-request-id"] == request_id
    return answer


@pytest.mark.parametrize("model", ["talks", "plain"])
async def test_what_a_handler_logs_has_the_id(
    model: str, cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    log = Log()
    assert (await ask(cluster, model)).status == 200
    lines = log.lines("an.application")
    assert len(lines) == {"talks": 2, "plain": 1}[model]
    assert {line["request_id"] for line in lines} == {"the-one"}


async def test_the_next_request_has_its_own(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    log = Log()
    for number in range(3):
        await ask(cluster, "plain", f"request {number}")
    assert [line["request_id"] for line in log.lines("an.application")] == [f"request {n}" for n in range(3)]
    logging.getLogger("trio_cluster.test").info("nobody's")
    assert "request_id" not in log.lines()[0]


async def test_a_connection_has_no_request_id_between_two_requests(cluster: SimulatedCluster) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_request.get())
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        pass

    node_context = NodeContext(cluster.master.server.router, cluster.options)
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/health"}
    await Gateway(app, node_context)({**scope, "headers": [(b"x-request-id", b"the-one")]}, receive, send)
    assert seen == ["the-one"]
    assert current_request.get() == ""


@pytest.mark.parametrize("model", ["fails", "raw"])
async def test_a_failure_is_logged_with_the_id(
    model: str, cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    log = Log()
    assert (await ask(cluster, model)).status == 500
    (line,) = log.lines()
    assert (line["logger"], line["request_id"], line["model"]) == ("trio_cluster.handlers", "the-one", model)
    assert "as expected" in line["traceback"]


async def test_a_model_that_is_too_slow_is_logged_where_it_runs(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    log = Log()
    assert (await ask(cluster, "sleeps")).status == 504
    (line,) = log.lines()
    assert (line["logger"], line["request_id"]) == ("trio_cluster.handlers", "the-one")
    assert "no answer in time" in line["message"]


async def test_a_model_that_does_not_stop_is_logged_where_it_times_out_and_where_it_runs(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    log = Log()
    assert (await ask(cluster, "clings")).status == 504
    (line,) = log.lines()
    assert (line["logger"], line["request_id"]) == ("trio_cluster.http", "the-one")
    assert line["message"] == "timed out: silent for 5 s"
    assert line["node"] == ("local" if node is cluster.master.server else "w1")
    await trio.sleep(30)


async def test_an_operators_order_is_logged_with_the_id_of_what_it_is_about(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    log = Log()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, cluster, "sleeps")
        await trio.sleep(1)
        client = cluster.client("operator", **{"x-request-id": "the-order"})
        assert (await client.post("/cluster/calls/the-one/cancel", {})).status == 200
    (line,) = log.lines()
    assert (line["request_id"], line["calls"]) == ("the-one", 1)


async def test_a_head_that_http_cannot_carry_is_logged_with_the_id(
    cluster: SimulatedCluster, autojump_clock: MockClock
) -> None:
    server = worker("w1", **OPTIONS)
    add_models(server)
    await cluster.start_worker(server)
    log = Log()
    answer = await ask(cluster, "wrong head")
    (line,) = log.lines()
    assert answer.status == 500
    assert (line["logger"], line["request_id"]) == ("trio_cluster.client", "the-one")


async def test_a_worker_that_is_lost_is_logged_with_the_ids_of_what_it_had(
    cluster: SimulatedCluster, autojump_clock: MockClock
) -> None:
    server = worker("w1", **OPTIONS)
    add_models(server)
    await cluster.start_worker(server)
    log = Log()
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(ask, cluster, "sleeps", f"request {number}")
        await trio.sleep(1)
        cluster.workers["w1"].kill()
    (line,) = log.lines("trio_cluster.workers")
    assert (line["calls_lost"], line["calls_retried"]) == (3, 0)
    assert sorted(line["request_ids"]) == [f"request {n}" for n in range(3)]


async def test_what_a_node_cuts_off_when_it_stops_is_logged_with_its_ids(
    cluster: SimulatedCluster, node: ClusterServer, autojump_clock: MockClock
) -> None:
    cluster.master.server.set_timeout(100)
    node.set_timeout(100)
    log = Log()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, cluster, "sleeps")
        await trio.sleep(1)
        node.stop()
    (line,) = [line for line in log.lines() if "did not finish" in line["message"]]
    assert (line["calls"], line["request_ids"]) == (1, ["the-one"])
    await trio.sleep(10)
    for each in cluster.nodes:
        each.stop()


async def test_a_disk_that_is_full_is_logged_with_the_id(
    cluster: SimulatedCluster, node: ClusterServer, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    def full(**options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(request_body.tempfile, "TemporaryFile", full)
    part = '--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    body = (
        part % ("file", '; filename="a.wav"', "x" * 3_000_000) + part % ("model", "", "hears") + "--B--\r\n"
    )
    log = Log()
    headers = {"content-type": "multipart/form-data; boundary=B", "x-request-id": "the-one"}
    answer = await cluster.client().post("/v1/audio/transcriptions", body.encode(), headers=headers)
    assert (answer.status, answer.headers["x-request-id"]) == (503, "the-one")
    (line,) = log.lines()
    assert (line["logger"], line["level"], line["request_id"]) == ("trio_cluster.http", "error", "the-one")
    assert "No space left" in line["message"]

"""The law of lifetimes for a model that runs on demand, in virtual time: what becomes of its request, and of itself."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
from scenario import ENDPOINTS, MODEL, REQUEST_ID, Caller, Endpoint
from start_law import START_LAW, StartCell

from trio_cluster import ClusterServer, RawCall
from trio_cluster.errors import ClusterError, UpstreamLost
from trio_cluster.on_demand.residents import OnDemand, Run
from trio_cluster.testing import SimulatedCluster, open_cluster, settle, worker

#: How long a start takes, an answer, the answer of the model that has the memory, and a stop.
START, ANSWER, OTHERS_ANSWER, STOP = 10.0, 20.0, 25.0, 1.0
#: When the cause comes, in each phase, counted from the request.
WHEN: Final = {"memory": 2.0, "starting": 5.0, "answering": START + 5.0}
START_TIMEOUT: Final = 15.0
#: Shorter than the wait for memory, and different for each phase.
TOTAL_TIMEOUT: Final = {"memory": 3.0, "starting": 6.0, "answering": START + 4.0}
OPTIONS: Final[dict[str, Any]] = {
    "default_timeout": 8.0,
    "keepalive": 0.0,
    "resume_window": 0.0,
    "operator_key": "k",
    # More than any start with its answer: what waits is finished.
    "drain_timeout": 100.0,
}
BOUNDS: Final = {"0": 0.0, "A": START_TIMEOUT, "K": STOP, "A+K": START_TIMEOUT + STOP}
EXACT: Final = 0.01

STATUSES: Final = {
    "504": (504, "timeout"),
    "503 cancelled": (503, "cancelled"),
    "503 start": (503, "model_start_failed"),
    "503 capacity": (503, "over_capacity"),
    "502": (502, "worker_lost"),
    "502 upstream": (502, "upstream_lost"),
}


class Resident:
    """A model that runs on demand, whose start and answer take time.

    Attributes:
        log: what has become of it.
        start_takes, answer_takes: seconds.
        broken: set to let its start fail, or let it die.
    """

    def __init__(self, name: str, *, answer_takes: float = ANSWER) -> None:
        self.name = name
        self.log: list[str] = []
        self.start_takes = START
        self.answer_takes = answer_takes
        self.broken = trio.Event()
        self.run: Run | None = None

    @asynccontextmanager
    async def open(self, run: Run) -> AsyncIterator[None]:
        self.run = run
        self.log.append("start")
        try:
            with trio.move_on_after(self.start_takes):
                await self.broken.wait()
                raise ClusterError("it is broken")
            self.log.append("ready")
            yield
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(STOP)
            self.log.append("stop")

    async def answer(self, call: RawCall) -> None:
        streamed = b'"stream": true' in await call.receive()
        call.begin(200, "text/event-stream" if streamed else "application/json")
        for text in ("some ", "words"):
            if streamed:
                await call.send(b"data: %s\n\n" % json.dumps(_chunk({"content": text})).encode())
            for _ in range(2):
                with trio.move_on_after(self.answer_takes / 4):
                    await self.broken.wait()
                    raise UpstreamLost(self.name, "it has died")
                # A sign of life.
                await call.send(b"" if streamed else b" ")
        if streamed:
            await call.send(b"data: %s\n\ndata: [DONE]\n\n" % json.dumps(_chunk({}, "stop")).encode())
        else:
            message = {"role": "assistant", "content": "some words"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            await call.send(json.dumps({"object": "chat.completion", "choices": [choice]}).encode())
        self.log.append("answered")

    async def serve(
        self, server: ClusterServer, start_timeout: float, *, task_status: trio.TaskStatus[None]
    ) -> None:
        tenancy = server.on_demand.add(
            self.name, [self.name], self.open, memory=60, start_timeout=start_timeout
        )
        server.register_raw(self.name, self.answer)
        await server.on_demand.run(tenancy, task_status=task_status)


def _chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}


class StartTest:
    """The test of one cell."""

    def __init__(
        self, cluster: SimulatedCluster, nursery: trio.Nursery, cause: str, phase: str, endpoint: Endpoint
    ) -> None:
        self.cluster, self.nursery = cluster, nursery
        self.cause, self.phase, self.endpoint = cause, phase, endpoint
        cell = START_LAW[cause][phase]
        assert isinstance(cell, StartCell)
        self.cell = cell
        self.model = Resident(MODEL)
        self.other = Resident("other", answer_takes=OTHERS_ANSWER)
        self.since = 0.0

    @property
    def on_demand(self) -> OnDemand:
        return self.cluster.workers["w"].server.on_demand

    async def run(self) -> None:
        server = worker(
            "w", memory="100", **{key: OPTIONS[key] for key in ("default_timeout", "drain_timeout")}
        )
        # The engines outlive the server, as on the command line.
        engines = await self.nursery.start(self._serve, server)
        await self.cluster.start_worker(server)
        if self.phase == "memory":
            self.nursery.start_soon(lambda: self.cluster.client("first").chat("other"))
            await trio.sleep(START + 1.0)
            assert self.other.log == ["start", "ready"]
        headers = (
            {"x-request-timeout": str(TOTAL_TIMEOUT[self.phase])} if self.cause == "total_timeout" else {}
        )
        caller = Caller(self.cluster, self.endpoint, padding=0, whole=True, reads=True, **headers)
        if self.cause == "start_late" and self.phase == "starting":
            self.model.start_takes = 1000.0
        over = trio.Event()

        async def call() -> None:
            await caller.run()
            over.set()

        self.nursery.start_soon(call)
        began = trio.current_time()
        await trio.sleep(WHEN[self.phase])
        self.since = trio.current_time()
        await getattr(self, f"_{self.cause}")(caller)
        if self.cause in ("total_timeout", "start_late"):
            self.since = began
        with trio.fail_after(200):
            await over.wait()
        self.check_client(caller)
        await trio.sleep(OTHERS_ANSWER + START + ANSWER + 5 * STOP)
        self.check_model()
        self.check_nothing_is_left()
        engines.cancel()

    async def _serve(self, server: ClusterServer, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.other.serve, server, 300.0)
                await nursery.start(
                    self.model.serve, server, START_TIMEOUT if self.cause == "start_late" else 300.0
                )
                task_status.started(scope)
                await trio.sleep_forever()

    # The causes

    async def _client_leaves(self, caller: Caller) -> None:
        caller.leave()

    async def _client_resets(self, caller: Caller) -> None:
        caller.leave(reset=True)

    async def _total_timeout(self, caller: Caller) -> None:
        pass

    async def _operator(self, caller: Caller) -> None:
        client = self.cluster.client("operator", authorization="Bearer k")
        assert (await client.post(f"/cluster/calls/{REQUEST_ID}/cancel", {})).json()["cancelled"] == 1

    async def _worker_killed(self, caller: Caller) -> None:
        self.cluster.workers["w"].kill()

    async def _worker_drains(self, caller: Caller) -> None:
        self.cluster.workers["w"].stop()

    async def _start_fails(self, caller: Caller) -> None:
        self.model.broken.set()

    async def _start_late(self, caller: Caller) -> None:
        pass

    async def _dies(self, caller: Caller) -> None:
        self.model.broken.set()
        if self.phase == "answering":
            assert self.model.run is not None
            self.model.run.lost("it has died")

    async def _needed(self, caller: Caller) -> None:
        self.nursery.start_soon(lambda: self.cluster.client("third").chat("other"))
        await trio.sleep(0.1)

    async def _unload(self, caller: Caller) -> None:
        client = self.cluster.client("operator", authorization="Bearer k")
        self.nursery.start_soon(lambda: client.post(f"/cluster/models/{MODEL}/unload", {}))
        await trio.sleep(0.1)

    # What follows

    def check_client(self, caller: Caller) -> None:
        assert caller.ended_at is not None
        response, cell = caller.response, self.cell
        if cell.client == "left":
            return
        assert response is not None
        if cell.client == "complete":
            self.endpoint.check(response, ["some ", "words"])
        else:
            status, code = STATUSES[cell.client]
            if response.status == 200:
                assert self.phase == "answering"
                error = response.report().error
                assert error is not None
                assert error["code"] == code
            else:
                assert (response.status, response.error["code"]) == (status, code)
        bound = (BOUNDS | {"B": TOTAL_TIMEOUT[self.phase]}).get(cell.bound)
        if bound is not None:
            assert caller.ended_at - self.since == pytest.approx(bound, abs=EXACT)

    def check_model(self) -> None:
        log = [each for each in self.model.log if each != "answered"]
        expected = {
            "cold": [],
            "given_up": ["start", "stop"],
            "failed": ["start", "stop"] if self.phase == "starting" else ["start", "ready", "stop"],
            "runs": ["start", "ready"],
            "ready": ["start", "ready"],
            "after": ["start", "ready", "stop"],
            "stopped": ["start", "ready"],
        }[self.cell.model]
        if self.cause == "needed" and self.phase == "starting":
            # It makes room for the other one after its answer.
            expected = [*expected, "stop"]
        assert log == expected
        if self.cell.model == "after":
            assert self.model.log.index("answered") < self.model.log.index("stop")

    def check_nothing_is_left(self) -> None:
        schedule = self.on_demand.schedule
        for resident in schedule.residents:
            assert resident.answering == 0
            assert schedule.waiting_for(resident) == 0
        assert schedule.reserved <= schedule.budget


CELLS: Final = [
    (cause, phase)
    for cause, row in START_LAW.items()
    for phase, entry in row.items()
    if isinstance(entry, StartCell)
]


@pytest.mark.parametrize("endpoint", ["chat-stream", "chat"])
@pytest.mark.parametrize(("cause", "phase"), CELLS, ids=lambda text: text)
async def test_every_cell_holds(cause: str, phase: str, endpoint: str, autojump_clock: object) -> None:
    async with open_cluster(**OPTIONS) as cluster:
        async with trio.open_nursery() as nursery:
            await StartTest(cluster, nursery, cause, phase, ENDPOINTS[endpoint]).run()
            nursery.cancel_scope.cancel()
        await settle(cluster)

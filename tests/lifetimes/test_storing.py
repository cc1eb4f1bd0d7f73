"""The law of lifetimes at the moment at which a response is stored, in virtual time, with a real database."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import pytest
import trio
import trio.testing
from scenario import LATENCY, MODEL, REQUEST_ID, Caller, Endpoint, Scenario, open_scenario
from storing_law import STORING_LAW, StoringCell

from trio_cluster.accounts.accounts import Accounts
from trio_cluster.accounts.errors import StoreError
from trio_cluster.accounts.store import Store
from trio_cluster.stored.database import PAUSE, PUT_TIMEOUT
from trio_cluster.testing import Response, settle

T = TypeVar("T")

OPTIONS: Final[dict[str, Any]] = {
    "default_timeout": 20.0,
    "worker_timeout": 15.0,
    "heartbeat_interval": 5.0,
    "max_concurrency": 1,
    "keepalive": 0.0,
    "resume_window": 0.0,
}
TOTAL_TIMEOUT: Final = 1.0
#: Shorter than PUT_TIMEOUT, so that it can pass while a response is being written.
DRAIN_TIMEOUT: Final = 1.2
HEADERS: Final = {"total_timeout": {"x-request-timeout": str(TOTAL_TIMEOUT)}}
BOUNDS: Final = {"0": 0.0, "B": TOTAL_TIMEOUT, "D": DRAIN_TIMEOUT, "P": PUT_TIMEOUT}
EXACT: Final = 1e-6

#: The column of each moment that a held write is at.
GATED: Final = ("writing", "written")


def check_text(response: Response, given: list[Any]) -> None:
    if response.headers["content-type"].startswith("application/json"):
        output = response.json()["output"]
        assert output[0]["content"][0]["text"] == "".join(given)
    else:
        assert response.report().text == "".join(given)


RESPONSES: Final = {
    name: Endpoint("responses", "chat", delivery, {"input": "hi", **fields}, ("some ", "words"), check_text)  # type: ignore[arg-type]
    for name, delivery, fields in (("streamed", "events", {"stream": True}), ("plain", "whole", {}))
}


class Gate:
    """Holds the thread that writes a response, at one moment, until it may go on; or has it fail there.

    Attributes:
        moment: where it is held; empty: nowhere.
        reached: it is held.
        go: it may go on.
        fails: then it fails, as if the connection of the database were lost.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.moment = ""
        self.reached = trio.Event()
        self.go = trio.Event()
        self.fails = False

    async def wait(self, moment: str) -> None:
        if moment == self.moment:
            self.reached.set()
            await self.go.wait()
            if self.fails:
                raise StoreError("database x: the connection was lost")

    async def run(self, store: Store, function: Callable[[Store], T]) -> T:
        """Call a function as a thread does, which goes on when the task that waits for it is cancelled."""
        over = trio.Event()
        results: list[T] = []
        errors: list[StoreError] = []

        async def work() -> None:
            try:
                await self.wait("writing")
                result = function(store)
                await self.wait("written")
                results.append(result)
            except StoreError as error:
                errors.append(error)
            over.set()

        self._nursery.start_soon(work)
        await over.wait()
        if errors:
            raise errors[0]
        return results[0]


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> list[Gate]:
    """The list into which the test puts the gate that every write of a stored response passes."""
    used: list[Gate] = []
    real = Accounts.with_store

    async def with_store(accounts: Accounts, function: Callable[[Store], T]) -> T:
        if not used or not used[0].moment:
            return await real(accounts, function)
        store: Store = await real(accounts, lambda store: store)
        return await used[0].run(store, function)

    monkeypatch.setattr(Accounts, "with_store", with_store)
    return used


@attrs.frozen
class Rows:
    """What is in the database.

    Attributes:
        responses: those that are stored, as clients would get them.
        conversation: the items of the conversation.
        noted: ids of items that can be referred to.
    """

    responses: list[dict[str, Any]]
    conversation: list[dict[str, Any]]
    noted: set[str]


def read_rows(path: Path) -> Rows:
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT id, head, context, output FROM tc_stored").fetchall()
        noted = {item for (item,) in connection.execute("SELECT item FROM tc_stored_items")}
    connection.close()
    responses, conversation = [], []
    for row_id, head, context, output in rows:
        if row_id.startswith("conv_"):
            conversation = json.loads(context)
        else:
            whole = json.loads(head) | {"output": json.loads(output)}
            responses.append(whole | {"context": json.loads(context)})
    return Rows(responses, conversation, noted)


class StoringTest:
    """The test of one cell."""

    def __init__(
        self, scenario: Scenario, gate: Gate, path: Path, cause: str, moment: str, endpoint: Endpoint
    ) -> None:
        self.scenario, self.gate, self.path = scenario, gate, path
        self.cause, self.moment, self.endpoint = cause, moment, endpoint
        cell = STORING_LAW[cause][moment]
        assert isinstance(cell, StoringCell)
        self.cell = cell
        self.conversation = ""
        self.since = 0.0

    @property
    def streamed(self) -> bool:
        return self.endpoint.delivery == "events"

    async def reach_the_moment(self) -> None:
        client = self.scenario.cluster.client("other")
        self.conversation = (await client.post("/v1/conversations", {})).json()["id"]
        fields = {**self.endpoint.fields, "conversation": self.conversation}
        endpoint = attrs.evolve(self.endpoint, fields=fields)
        headers = HEADERS.get(self.cause, {})
        self.caller = Caller(self.scenario.cluster, endpoint, padding=0, whole=True, reads=True, **headers)
        self.scenario.nursery.start_soon(self.caller.run)
        await trio.sleep(0.2)
        self.scenario.watch()
        if self.moment in GATED:
            # Not before: the conversation is read at the beginning of the request.
            self.gate.moment = self.moment
            self.scenario.script.go.set()
            await self.gate.reached.wait()
            await trio.sleep(0.1)
            assert self.caller.ended_at is None

    async def happen(self) -> None:
        self.since = trio.current_time()
        await getattr(self, f"_{self.cause}")()

    async def _client_leaves(self) -> None:
        self.caller.leave()

    async def _client_resets(self) -> None:
        self.caller.leave(reset=True)

    async def _total_timeout(self) -> None:
        self.since = self.caller.asked_at

    async def _operator(self) -> None:
        operator = self.scenario.cluster.client("operator")
        response = await operator.post(f"/cluster/calls/{REQUEST_ID}/cancel", {})
        assert response.status == 200
        self.since = trio.current_time() - LATENCY

    async def _handler_raises(self) -> None:
        self.scenario.script.fails = True
        self.scenario.script.go.set()

    async def _worker_killed(self) -> None:
        self.scenario.cluster.workers["w"].kill()

    async def _master_drains(self) -> None:
        self.scenario.cluster.master.stop()

    async def _master_drains_too_long(self) -> None:
        self.scenario.cluster.master.stop()

    async def _master_killed(self) -> None:
        self.scenario.cluster.master.kill()

    async def _database_fails(self) -> None:
        self.gate.fails = True
        if self.moment == "answering":
            self.gate.moment = "writing"
            self.scenario.script.go.set()
            await self.gate.reached.wait()
            self.since = trio.current_time()
        self.gate.go.set()

    async def _database_silent(self) -> None:
        if self.moment == "answering":
            self.gate.moment = "writing"
            self.scenario.script.go.set()
            await self.gate.reached.wait()
            self.since = trio.current_time()
        else:
            # It was reached a tenth of a second ago.
            self.since -= 0.1

    async def wait_for_effects(self) -> None:
        bound = BOUNDS.get(self.cell.bound)
        # A response that is being written is given up when PUT_TIMEOUT has passed.
        await trio.sleep(1.5 if bound is None else self.since + bound + 0.5 - trio.current_time())
        if bound is None:
            assert self.caller.ended_at is None
        self.now = trio.current_time()
        # Whatever holds the thread ends sometime: nothing may come of it then.
        self.gate.go.set()
        self.scenario.script.go.set()
        await trio.sleep(1)

    def check(self) -> None:
        self.check_client()
        self.check_bound()
        self.check_stored()

    def check_client(self) -> None:
        cell, response = self.cell, self.caller.response
        assert self.caller.ended_at is not None
        assert self.caller.left == (cell.client == "left")
        if self.caller.left:
            return
        if cell.client == "complete":
            assert response is not None
            assert (response.status, response.complete) == (200, True)
            self.endpoint.check(response, self.scenario.script.given)
        elif cell.client == "lost":
            assert (response is None) != self.streamed
            assert response is None or not response.complete
        elif self.streamed:
            assert response is not None
            report = response.report()
            assert report.ending == "failed"
            assert report.error is not None
        else:
            assert response is not None
            assert response.status == int(cell.client.split()[0])

    def check_bound(self) -> None:
        bound = BOUNDS.get(self.cell.bound)
        if bound is None or self.caller.left:
            return
        assert self.caller.ended_at is not None
        told = self.caller.ended_at - self.since
        assert bound - EXACT <= told <= bound + 4 * LATENCY + EXACT

    def check_stored(self) -> None:
        rows = read_rows(self.path)
        stored = self.cell.stored
        if stored == "failed" and not self.streamed:
            stored = "nothing"
        if stored == "nothing":
            assert rows == Rows([], [], set())
            return
        (response,) = rows.responses
        assert response["status"] == ("completed" if stored == "whole" else "failed")
        assert response["conversation"] == {"id": self.conversation}
        text = "".join(part["text"] for item in response["output"] for part in item["content"])
        # The event that says that a response failed has no output in it.
        assert text == ("".join(self.scenario.script.given) if stored == "whole" else "")
        assert [item["content"][0]["text"] for item in response["context"]] == ["hi"]
        assert rows.conversation == response["context"] + response["output"]
        assert rows.noted == {item["id"] for item in rows.conversation}

    async def check_retrieval(self) -> None:
        """Check that clients find what is stored, and nothing else."""
        if self.scenario.cluster.master.over.is_set():
            return
        await trio.sleep(PAUSE)
        client = self.scenario.cluster.client("other")
        rows, response = read_rows(self.path), self.caller.response
        for each in rows.responses:
            assert (await client.get(f"/v1/responses/{each['id']}")).json()["output"] == each["output"]
        if self.cell.client == "complete" and response is not None:
            data = response.body.decode()
            response_id = data[data.index('"resp_') + 1 :].partition('"')[0]
            found = await client.get(f"/v1/responses/{response_id}")
            assert found.status == (404 if self.cell.stored == "nothing" else 200)
            body = {"model": MODEL, "input": "and?", "previous_response_id": response_id}
            followed = await client.post("/v1/responses", body)
            if self.cell.stored == "nothing":
                assert (followed.status, followed.error["code"]) == (400, "previous_response_not_found")
            elif self.cause != "worker_killed":
                assert followed.status == 200


def cells() -> Any:
    for cause, row in STORING_LAW.items():
        for moment, entry in row.items():
            for name in RESPONSES:
                for place in ("local", "forwarded"):
                    if place == "local" and (name == "plain" or cause == "worker_killed"):
                        continue
                    if isinstance(entry, StoringCell):
                        yield pytest.param(cause, moment, name, place, id=f"{cause}-{moment}-{name}-{place}")


@pytest.mark.parametrize(("cause", "moment", "name", "place"), list(cells()))
async def test_the_law_of_storing_holds(
    cause: str,
    moment: str,
    name: str,
    place: str,
    gates: list[Gate],
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
) -> None:
    path = tmp_path / "a.db"
    drain = DRAIN_TIMEOUT if cause == "master_drains_too_long" else 19.0
    options = OPTIONS | {"database": f"sqlite:///{path}", "drain_timeout": drain}
    async with (
        trio.open_nursery() as nursery,
        open_scenario(RESPONSES[name], "streaming", forwarded=place == "forwarded", **options) as scenario,
    ):
        gate = Gate(nursery)
        gates.append(gate)
        test = StoringTest(scenario, gate, path, cause, moment, RESPONSES[name])
        await test.reach_the_moment()
        await test.happen()
        await test.wait_for_effects()
        test.check()
        gate.moment, gate.fails = "", False
        await test.check_retrieval()
        await settle(scenario.cluster)

"""Stored responses in real processes: a database or a node that is killed while responses are stored under load."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import sqlalchemy as sa
import trio
from nodes import Node, Nodes
from private_postgres import PrivatePostgres

pytestmark = pytest.mark.processes


@attrs.define
class StoringLoad:
    """A client whose every request is stored, and added to a conversation of its own.

    Attributes:
        url: of the node.
        stream: it asks for streams.
        news: woken when any of several clients has an answer.
        conversations: the conversations that it has made.
        told: ids of the responses of which it has had the end.
        failures: answers with another status than 200, or that were cut.
    """

    url: str
    stream: bool
    news: trio.lowlevel.ParkingLot
    conversations: list[str] = attrs.field(factory=list)
    told: list[str] = attrs.field(factory=list)
    failures: list[str] = attrs.field(factory=list)
    stopped: bool = False

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False) as client:
            while not self.stopped:
                try:
                    await self._ask(client)
                    self.news.unpark_all()
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    return

    async def _ask(self, client: httpx.AsyncClient) -> None:
        made = await client.post("/v1/conversations", json={})
        if made.status_code != 200:
            # The database is away, and a conversation that is not stored is none.
            assert made.json()["error"]["code"] in ("not_stored", "database_unavailable")
            body: dict[str, Any] = {}
        else:
            body = {"conversation": made.json()["id"]}
            self.conversations.append(made.json()["id"])
        body |= {"model": "who", "input": "x" * 2000, "stream": self.stream}
        response = await client.post("/v1/responses", json=body)
        if response.status_code == 503 and "conversation" in body:
            assert response.json()["error"]["code"] == "database_unavailable"
            return
        if response.status_code == 404 and "conversation" in body:
            self.failures.append("a conversation is gone")
            return
        if response.status_code != 200:
            self.failures.append(response.text)
        elif self.stream:
            last = json.loads(response.text.strip().rpartition("data: ")[2])
            assert last["type"] == "response.completed"
            self.told.append(last["response"]["id"])
        else:
            self.told.append(response.json()["id"])


def check_nothing_is_half_stored(database: str | Path) -> set[str]:
    """Fail if a part of any response is stored, and not the rest. Return the ids of all that are stored."""
    url = database if isinstance(database, str) else f"sqlite:///{database}"
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT id, head, context, output FROM tc_stored")).all()
        noted = set(connection.scalars(sa.text("SELECT item FROM tc_stored_items")))
    engine.dispose()
    records = {row.id: row for row in rows}
    items: dict[str, set[str]] = {}
    for row in rows:
        head = json.loads(bytes(row.head))
        parts = [*json.loads(bytes(row.context)), *json.loads(bytes(row.output))]
        items[row.id] = {each["id"] for each in parts}
        assert items[row.id] <= noted
        if row.id.startswith("resp_"):
            assert head["status"] == "completed"
            assert len(parts) == 2
            conversation = head.get("conversation")
            if conversation is not None:
                kept = json.loads(bytes(records[conversation["id"]].context))
                assert kept == parts
    used = {response_id for response_id in records if response_id.startswith("resp_")}
    for name, each in items.items():
        # What a conversation has came with a response.
        if name.startswith("conv_") and each:
            assert any(each == items[response_id] for response_id in used)
    assert noted == set().union(*items.values())
    return used


@asynccontextmanager
async def storing(node: Node, clients: int = 4) -> AsyncIterator[list[StoringLoad]]:
    """Have clients ask a node for the length of a block; afterwards, they end their last requests."""
    news = trio.lowlevel.ParkingLot()
    loads = [StoringLoad(node.url, bool(number % 2), news) for number in range(clients)]
    async with trio.open_nursery() as nursery:
        for load in loads:
            nursery.start_soon(load.run)
        yield loads
        for load in loads:
            load.stopped = True


async def wait_told(loads: list[StoringLoad], count: int) -> None:
    """Wait until the clients have had this many more answers, all together."""
    count += sum(len(load.told) for load in loads)
    with trio.fail_after(30):
        while sum(len(load.told) for load in loads) < count:
            await loads[0].news.park()


async def test_a_database_that_is_killed_in_the_middle_of_storing_has_no_half_of_a_response(
    nodes: Nodes, own_postgres: PrivatePostgres
) -> None:
    postgres, database = own_postgres, own_postgres.create_database()
    master = await nodes.master("--database", database, models="who")
    async with storing(master) as loads:
        await wait_told(loads, 20)
        await trio.to_thread.run_sync(postgres.kill)
        await master.log("responses are not stored")
        # Clients are answered all the same.
        await wait_told(loads, 20)
        told_away = [list(load.told) for load in loads]
        await trio.to_thread.run_sync(postgres.start)
        await master.log("responses are stored again", within=20)
        before = [len(load.told) for load in loads]
        await wait_told(loads, 20)
    assert [load.failures for load in loads] == [[]] * len(loads)
    stored = check_nothing_is_half_stored(database)
    # Those of which the client had the end before the database was killed, or after it was back, are there.
    for load, count, away in zip(loads, before, told_away, strict=True):
        assert set(load.told[count + 1 :]) <= stored
        assert away[:3]
        assert set(away[:3]) <= stored
    async with httpx.AsyncClient(base_url=master.url, timeout=10, trust_env=False) as client:
        for load in loads:
            found = await client.get(f"/v1/responses/{load.told[-1]}")
            assert (found.status_code, found.json()["id"]) == (200, load.told[-1])


async def test_a_node_that_is_killed_in_the_middle_of_storing_leaves_no_half_of_a_response(
    nodes: Nodes, tmp_path: Path
) -> None:
    path = tmp_path / "a.db"
    told: set[str] = set()
    for _ in range(2):
        master = await nodes.master("--database", f"sqlite:///{path}", models="who")
        async with storing(master) as loads:
            await wait_told(loads, 20)
            master.send(signal.SIGKILL)
            await master.exit_code()
        told |= {response_id for load in loads for response_id in load.told}
        # All that the clients were told is there, and at most what each was waiting for besides.
        stored = check_nothing_is_half_stored(path)
        assert told <= stored
        assert len(stored) <= len(told) + 2 * len(loads)

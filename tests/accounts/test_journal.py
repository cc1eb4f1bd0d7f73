"""The usage journal: one row for each request, written in batches, whatever happens to the database."""

from __future__ import annotations

import logging
from typing import Any, TypeAlias

import pytest
import trio

from trio_cluster.accounts import journal as module
from trio_cluster.accounts.errors import StoreError
from trio_cluster.accounts.journal import Journal
from trio_cluster.accounts.usage_row import COLUMNS, UsageRow
from trio_cluster.core.answer import Done, Failed, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.principal import Principal
from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError, WorkerLost
from trio_cluster.routing.health import Health
from trio_cluster.routing.router import Router

#: A row by the names of its columns.
Row: TypeAlias = dict[str, Any]


class Database:
    """Keeps what it is given; fails while it is told to."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[Row]]] = []
        self.tried: list[tuple[str, int, int]] = []
        self.broken = False

    async def write(self, writer: str, number: int, rows: list[UsageRow]) -> None:
        await trio.lowlevel.checkpoint()
        self.tried.append((writer, number, len(rows)))
        if self.broken:
            raise StoreError("database x: gone")
        self.batches.append((number, [dict(zip(COLUMNS, row, strict=True)) for row in rows]))

    @property
    def rows(self) -> list[Row]:
        return [row for _, rows in self.batches for row in rows]


class Backend:
    def __init__(self, name: str) -> None:
        self.name = name
        self.load = 0.0
        self.health = Health()
        self.calls: list[Call] = []

    def open(self, request: Request) -> Call:
        self.calls.append(Call(request, served_by=self.name, on_cancel=lambda _: self.calls[-1].release()))
        return self.calls[-1]


class Node:
    """A router with two replicas of one model, and a journal."""

    def __init__(self) -> None:
        self.database = Database()
        self.journal = Journal(self.database.write)
        self.router = Router()
        self.router.observers.add(self.journal)
        self.backends = [Backend("w1"), Backend("w2")]
        for backend in self.backends:
            self.router.catalog.add(ModelInfo("m", "chat"), backend, replicate=True)

    def open(self, request_id: str = "r") -> Call:
        request = Request(
            "chat.completions", "chat", "m", b"{}", request_id=request_id, principal=Principal("ann")
        )
        return self.router.open(request)

    def complete(self, call: Call, usage: Usage | None = None) -> None:
        call.put(Head())
        call.put(Done(usage))
        call.release()

    async def flushed(self) -> list[Row]:
        self.journal.take_decided()
        await self.journal.flush()
        return self.database.rows


def of(row: Row, *names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


TOKENS = "prompt_tokens", "completion_tokens", "cached_tokens"


async def test_a_request_is_a_row_with_what_was_reported() -> None:
    node = Node()
    node.complete(node.open("r1"), Usage(3, 4, 2))
    (row,) = await node.flushed()
    assert of(row, *TOKENS) == (3, 4, 2)
    assert of(row, "key", "model", "alias", "worker", "route") == ("ann", "m", "", "w1", "chat.completions")
    assert of(row, "outcome", "request_id") == ("completed", "r1")
    assert row["first_byte"] is not None
    assert 0 <= row["first_byte"] <= row["duration"] < 5


async def test_what_no_request_can_have_used_is_bounded() -> None:
    # Otherwise some of them would add up to more than a database can count.
    node = Node()
    node.complete(node.open("r1"), Usage(2**53 - 1, 4, 2**70))
    (row,) = await node.flushed()
    assert of(row, *TOKENS) == (2**31 - 1, 4, 2**31 - 1)


async def test_what_nothing_has_reported_is_unknown() -> None:
    node = Node()
    node.complete(node.open())
    call = node.open()
    call.put(Failed(ApiError(400, "no")))
    call.release()
    node.open().cancel("the client left")
    rows = await node.flushed()
    assert [of(row, *TOKENS) for row in rows] == [(None, None, None)] * 3
    assert [row["outcome"] for row in rows] == ["completed", "failed", "cancelled"]
    assert rows[1]["first_byte"] is None


@pytest.mark.parametrize("released_first", [True, False])
async def test_a_retried_request_is_one_row_with_the_worker_that_answered(released_first: bool) -> None:
    node = Node()
    lost = node.open("r1")
    lost.opened_at -= 100
    lost.put(Failed(WorkerLost("w1", "gone"), retryable=True))
    if released_first:
        lost.release()
        await node.flushed()
    again = node.router.reopen(lost)
    assert again is not None
    if not released_first:
        lost.release()
    node.complete(again, Usage(1, 1))
    for _ in range(3):
        (row,) = await node.flushed()
    assert of(row, "worker", "outcome", "request_id") == ("w2", "completed", "r1")
    # The time counts from the first attempt.
    assert row["duration"] > 99


async def test_a_failure_that_is_not_retried_is_a_row_a_little_later() -> None:
    node = Node()
    lost = node.open()
    lost.put(Failed(WorkerLost("w1", "gone"), retryable=True))
    lost.release()
    # The task that would retry it has not run yet.
    assert await node.flushed() == []
    (row,) = await node.flushed()
    assert row["outcome"] == "worker_lost"


async def test_a_failure_after_the_answer_has_begun_is_a_row_at_once_and_nothing_is_kept_of_calls() -> None:
    node = Node()
    call = node.open()
    call.put(Head())
    call.put(Failed(WorkerLost("w1", "gone"), retryable=True))
    call.release()
    assert [row["outcome"] for row in await node.flushed()] == ["worker_lost"]
    for name in ("_undecided", "_replaced", "_opened"):
        assert not getattr(node.journal, name)


async def test_when_the_node_ends_nothing_is_undecided() -> None:
    node = Node()
    lost = node.open()
    lost.put(Failed(WorkerLost("w1", "gone"), retryable=True))
    lost.release()
    node.journal.take_undecided()
    await node.journal.flush()
    assert len(node.database.rows) == 1


async def test_batches_are_of_limited_size_and_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 10)
    node = Node()
    for _ in range(25):
        node.complete(node.open())
    await node.flushed()
    await node.flushed()
    assert [(number, len(rows)) for number, rows in node.database.batches] == [(1, 10), (2, 10), (3, 5)]


async def test_a_batch_that_failed_is_tried_again_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    node = Node()
    node.database.broken = True
    node.complete(node.open("r1"))
    for number in range(5):
        with pytest.raises(StoreError):
            await node.flushed()
        node.complete(node.open(f"later-{number}"))
    assert {attempt[1:] for attempt in node.database.tried} == {(1, 1)}
    assert node.journal.waiting == 6
    node.database.broken = False
    rows = await node.flushed()
    assert [row["request_id"] for row in rows] == ["r1", *(f"later-{number}" for number in range(5))]
    assert [number for number, _ in node.database.batches] == [1, 2]
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("ERROR", "the usage of requests cannot be written, and is kept in memory: database x: gone"),
        ("WARNING", "the usage of requests is written again"),
    ]
    # It is said again when it happens again.
    node.database.broken = True
    node.complete(node.open())
    with pytest.raises(StoreError):
        await node.flushed()
    assert len(caplog.records) == 3


async def test_beyond_the_bound_the_oldest_rows_are_dropped_and_counted_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 20)
    node = Node()
    node.database.broken = True
    for number in range(50):
        node.complete(node.open(f"r{number}"))
    with pytest.raises(StoreError):
        await node.flushed()
    for number in range(50, 60):
        node.complete(node.open(f"r{number}"))
        assert node.journal.waiting <= 40  # with the batch that is tried again
    with pytest.raises(StoreError):
        await node.flushed()
    node.database.broken = False
    rows = await node.flushed()
    assert rows[-1]["request_id"] == "r59"
    assert len(rows) + node.journal.dropped == 60
    assert 20 <= len(rows) <= 40
    lost = [record for record in caplog.records if "is lost from now on" in record.message]
    assert len(lost) == 1
    assert lost[0].levelno == logging.ERROR
    assert caplog.records[-1].__dict__["fields"] == {"lost": node.journal.dropped}


async def test_a_cancelled_write_is_repeated() -> None:
    node = Node()
    node.complete(node.open("r1"))
    with trio.CancelScope() as scope:
        scope.cancel()
        await node.flushed()
    assert node.database.batches == []
    assert [row["request_id"] for row in await node.flushed()] == ["r1"]


async def test_two_attempts_at_once_are_one_row_of_the_one_that_has_answered() -> None:
    node = Node()
    first = node.open()
    for _ in range(20):
        node.router.hedging.late_after("m")
    second = node.router.open_hedge(first, 10.0)
    assert second is not None
    first.superseded = True
    node.complete(second, Usage(3, 0))
    first.cancel("the other attempt has answered first")
    await node.journal.flush()
    assert [(row["worker"], row["outcome"]) for row in node.database.rows] == [("w2", "completed")]

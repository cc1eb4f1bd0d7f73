"""Stored responses in the database: the same on SQLite and on PostgreSQL, for several masters."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import hypothesis.strategies as st
import patience
import pytest
import sqlalchemy as sa
import trio
from hypothesis import given

from trio_cluster.accounts.accounts import Accounts, open_accounts
from trio_cluster.accounts.audit import AuditLog
from trio_cluster.accounts.errors import StoreError
from trio_cluster.accounts.keys import KeyRecord
from trio_cluster.accounts.store import Store
from trio_cluster.accounts.stored_row import choose_victims
from trio_cluster.core.observer import Observers
from trio_cluster.core.principal import ANONYMOUS
from trio_cluster.options import ClusterServerOptions
from trio_cluster.stored import database as module
from trio_cluster.stored.database import DatabaseResponses
from trio_cluster.stored.record import Item, Record, owner_of


class Node:
    """The accounts of a master, and its stored responses."""

    def __init__(self, accounts: Accounts, options: ClusterServerOptions) -> None:
        self.accounts = accounts
        self.responses = DatabaseResponses(accounts, options)


@asynccontextmanager
async def open_node(database: str | Path, **options: Any) -> AsyncIterator[Node]:
    named = {f"stored_responses{name}": value for name, value in options.items()}
    async with open_accounts(database, AuditLog(), Observers(), lambda: 90) as accounts:
        yield Node(accounts, ClusterServerOptions(**named))


def item(name: str, text: str = "") -> Item:
    return Item(name, b'{"id":"%s","text":"%s"}' % (name.encode(), text.encode()))


def record(name: str, *context: Item, output: tuple[Item, ...] = ()) -> Record:
    return Record(name, b'{"id":"%s","output":null}' % name.encode(), context, output)


def texts(items: tuple[Item, ...]) -> list[bytes]:
    return [each.json for each in items]


async def test_what_one_master_stores_the_others_find(database: str | Path) -> None:
    made = record("r", item("i", "\\u0000 ü"), item("j"), output=(item("k"),))
    async with open_node(database) as one, open_node(database) as other:
        assert await one.responses.put("a\n1.5", made)
        found = await other.responses.get("a\n1.5", "r")
        assert found is not None
        assert (found.id, found.head) == (made.id, made.head)
        assert [each.id for each in found.context] == ["i", "j"]
        assert (texts(found.context), texts(found.output)) == (texts(made.context), texts(made.output))
        items = await other.responses.find_items("a\n1.5", ["i", "k", "none"])
        assert {name: each.json for name, each in items.items()} == {
            "i": item("i", "\\u0000 ü").json,
            "k": item("k").json,
        }
        # No other key does.
        for owner in ("a\n2.5", "a", ""):
            assert await other.responses.get(owner, "r") is None
            assert await other.responses.find_items(owner, ["i"]) == {}
            assert not await other.responses.delete(owner, "r")
            assert not await other.responses.extend(owner, "r", [item("x")])
        assert await other.responses.extend("a\n1.5", "r", [item("l")])
        found = await one.responses.get("a\n1.5", "r")
        assert found is not None
        assert [each.id for each in found.context] == ["i", "j", "l"]
        assert await other.responses.delete("a\n1.5", "r")
        assert not await one.responses.delete("a\n1.5", "r")
        assert await one.responses.get("a\n1.5", "r") is None
        assert await one.responses.find_items("a\n1.5", ["i"]) == {}


async def test_a_record_is_replaced_by_one_of_the_same_id(database: str | Path) -> None:
    async with open_node(database) as node:
        await node.responses.put("a", record("r", item("i")))
        await node.responses.put("a", record("r", item("j")))
        found = await node.responses.get("a", "r")
        assert found is not None
        assert [each.id for each in found.context] == ["j"]
        await node.responses.extend("a", "r", [])
        await node.responses.put("a", record("empty"))
        await node.responses.extend("a", "empty", [item("x"), item("y")])
        found = await node.responses.get("a", "empty")
        assert found is not None
        assert [each.id for each in found.context] == ["x", "y"]


async def test_records_expire_and_are_deleted(database: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_node(database, _lifetime=100) as node:
        await node.responses.put("a", record("old", item("i")))
        await node.responses.put("a", record("used", item("j")))
        now = time.time()
        monkeypatch.setattr(module.time, "time", lambda: now + 60)
        await node.responses.extend("a", "used", [item("k")])
        monkeypatch.setattr(module.time, "time", lambda: now + 110)
        assert await node.responses.get("a", "old") is None
        assert await node.responses.find_items("a", ["i"]) == {}
        assert not await node.responses.extend("a", "old", [item("x")])
        assert not await node.responses.delete("a", "old")
        assert await node.responses.get("a", "used") is not None
        monkeypatch.setattr(module.time, "time", lambda: now + 200)
        with trio.move_on_after(0.5):
            await node.responses.run()
        assert await node.accounts.with_store(lambda store: store.get_stored("a", "used", 0)) is None


async def test_the_bounds_are_kept_for_all_masters_together(database: str | Path) -> None:
    async with (
        open_node(database, **{"": 20, "_size": 100_000}) as one,
        open_node(database, **{"": 20, "_size": 100_000}) as other,
    ):
        await one.responses.put("a", record("kept", item("kept")))
        for i in range(40):
            node = random.choice([one, other])
            assert await node.responses.put("b", record(f"r{i}", item(f"i{i}")))
        found = [i for i in range(40) if await one.responses.get("b", f"r{i}") is not None]
        # The oldest ones of the owner who has most have made room.
        assert found == list(range(21, 40))
        assert await one.responses.get("a", "kept") is not None
        assert await one.responses.find_items("b", ["i0"]) == {}
        for i in range(8):
            assert await one.responses.put("b", record(f"large{i}", item(f"l{i}", "x" * 20_000)))
        found = [i for i in range(8) if await one.responses.get("b", f"large{i}") is not None]
        assert found == [4, 5, 6, 7]
        assert not await one.responses.put("b", record("huge", item("huge", "x" * 100_000)))
        assert await one.responses.get("a", "kept") is not None


async def test_a_key_that_is_revoked_takes_what_it_has_stored_with_it(database: str | Path) -> None:
    async with open_node(database) as node:
        for name in ("a_b", "axb"):
            await node.accounts.create_key(KeyRecord(name=name, created_at=5.0), ANONYMOUS, "")
            owner = owner_of(node.accounts.record(name).principal())
            await node.responses.put(owner, record("r", item("i")))
        await node.accounts.revoke_key("a_b", ANONYMOUS, "")
        assert await node.responses.get("a_b\n5.0", "r") is None
        assert await node.responses.find_items("a_b\n5.0", ["i"]) == {}
        assert await node.responses.get("axb\n5.0", "r") is not None


async def test_a_database_that_is_away_costs_an_answer_little_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = 0

    def fail(*_: Any) -> bool:
        nonlocal tried
        tried += 1
        raise StoreError("database x: away")

    monkeypatch.setattr(module, "PAUSE", 0.05)
    caplog.set_level(logging.WARNING, "trio_cluster.accounts")
    async with open_node(tmp_path / "a.db") as node:
        with monkeypatch.context() as patched:
            patched.setattr(Store, "put_stored", fail)
            for _ in range(5):
                assert not await node.responses.put("a", record("r"))
            assert tried == 1
            await trio.sleep(0.06)
            assert not await node.responses.put("a", record("r"))
            assert tried == 2
        await trio.sleep(0.06)
        assert await node.responses.put("a", record("r"))
    assert [each.getMessage() for each in caplog.records] == [
        "responses are not stored: database x: away",
        "responses are stored again",
    ]


async def test_a_database_that_does_not_answer_delays_an_answer_for_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PUT_TIMEOUT", 0.1)
    monkeypatch.setattr(module, "GET_TIMEOUT", 0.1)
    monkeypatch.setattr(Store, "put_stored", lambda *_: time.sleep(0.5))
    monkeypatch.setattr(Store, "get_stored", lambda *_: time.sleep(0.5))
    async with open_node(tmp_path / "a.db") as node:
        watch = patience.Stopwatch()
        assert not await node.responses.put("a", record("r"))
        with pytest.raises(StoreError):
            await node.responses.get("a", "r")
        assert watch.counted < 0.45


async def stored_in(node: Node) -> tuple[set[str], list[str], set[str]]:
    """Return which responses there are, what the conversation has, and which items can be referred to."""
    names = ["r", "s"]
    records = {name: await node.responses.get("a", name) for name in names}
    conversation = await node.responses.get("a", "conv_1")
    assert conversation is not None
    return (
        {name for name, each in records.items() if each is not None},
        [each.id for each in conversation.context],
        set(await node.responses.find_items("a", ["old", "in", "out"])),
    )


async def test_an_answer_is_stored_whole_or_not_at_all_whatever_statement_fails(
    database: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    answer = record("r", item("in"), output=(item("out"),))
    # A look at the bounds is a part of it each time.
    async with open_node(database, _size=100_000) as node:
        monkeypatch.setattr(DatabaseResponses, "_due", lambda *_: (100, 100_000, 0.0))
        await node.responses.put("a", record("conv_1", item("old")))
        before = await stored_in(node)
        assert before == (set(), ["old"], {"old"})
        failed = 0
        while True:
            left = failed

            def fail(*_: Any) -> None:
                nonlocal left
                left -= 1
                if left == -1:
                    raise sa.exc.OperationalError("statement", {}, Exception("the connection was lost"))

            sa.event.listen(sa.Engine, "before_cursor_execute", fail)
            sa.event.listen(sa.Engine, "commit", fail)
            try:
                await node.responses.put_answer("a", answer, "conv_1", [item("in"), item("out")])
            finally:
                sa.event.remove(sa.Engine, "before_cursor_execute", fail)
                sa.event.remove(sa.Engine, "commit", fail)
            if left >= 0:
                break
            assert await stored_in(node) == before
            failed += 1
        assert failed > 6
        assert await stored_in(node) == ({"r"}, ["old", "in", "out"], {"old", "in", "out"})


async def test_a_database_that_is_full_stores_an_answer_not_at_all(tmp_path: Path) -> None:
    def limit(connection: Any, _: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 8}")

    async with open_node(tmp_path / "a.db") as node:
        await node.responses.put("a", record("conv_1", item("old")))
        before = await stored_in(node)
    sa.event.listen(sa.Engine, "connect", limit)
    try:
        async with open_node(tmp_path / "a.db") as node:
            answer = record("r", item("in", "x" * 100_000))
            await node.responses.put_answer("a", answer, "conv_1", [item("in")])
            assert await stored_in(node) == before
    finally:
        sa.event.remove(sa.Engine, "connect", limit)


async def test_what_is_cancelled_while_it_is_written_is_not_there_later(
    database: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go = threading.Event(), threading.Event()
    put = Store.put_stored

    def slow(*arguments: Any) -> bool:
        began.set()
        go.wait(10)
        return put(*arguments)

    async with open_node(database) as node:
        await node.responses.put("a", record("conv_1", item("old")))
        before = await stored_in(node)
        monkeypatch.setattr(Store, "put_stored", slow)
        answer = record("r", item("in"), output=(item("out"),))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.responses.put_answer, "a", answer, "conv_1", answer.context)
            await trio.to_thread.run_sync(began.wait)
            nursery.cancel_scope.cancel()
        go.set()
        # Closing waits for the thread.
    async with open_node(database) as node:
        assert await stored_in(node) == before


async def test_a_conversation_that_was_deleted_meanwhile_stays_deleted(database: str | Path) -> None:
    async with open_node(database) as node:
        await node.responses.put_answer("a", record("r", item("in")), "conv_1", [item("in")])
        assert await node.responses.get("a", "conv_1") is None
        assert await node.responses.get("a", "r") is not None
        assert not await node.responses.change("a", "conv_1", lambda found: found)
        assert await node.responses.get("a", "conv_1") is None


async def test_masters_that_change_one_conversation_at_once_lose_nothing_of_it(database: str | Path) -> None:
    async with open_node(database) as one, open_node(database) as other:
        await one.responses.put("a", record("conv_1", item("old"), item("unwanted")))

        def without(found: Record) -> Record:
            # Another master adds to it here, and must wait for this.
            time.sleep(0.05)
            return attrs.evolve(found, context=tuple(each for each in found.context if each.id != "unwanted"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.responses.change, "a", "conv_1", without)
            for number in range(10):
                node = (one, other)[number % 2]
                answer = record(f"r{number}", item(f"i{number}"))
                nursery.start_soon(node.responses.put_answer, "a", answer, "conv_1", answer.context)
        changed = await one.responses.get("a", "conv_1")
        assert changed is not None
        assert {each.id for each in changed.context} == {"old", *(f"i{number}" for number in range(10))}


async def test_a_response_that_is_deleted_and_stored_at_once_is_there_whole_or_gone(
    database: str | Path,
) -> None:
    async with open_node(database) as one, open_node(database) as other:
        for number in range(20):
            name = f"r{number}"
            answer = record(name, item(f"i{name}"), output=(item(f"o{name}"),))
            deleted: list[bool] = []

            async def delete(name: str = name, deleted: list[bool] = deleted) -> None:
                deleted.append(await other.responses.delete("a", name))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.responses.put_answer, "a", answer, None, ())
                nursery.start_soon(delete)
            there = await one.responses.get("a", name)
            items = await one.responses.find_items("a", [f"i{name}", f"o{name}"])
            assert (there is None) == deleted[0]
            assert len(items) == (0 if there is None else 2)


ROWS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 1000)), min_size=1, max_size=40
).map(lambda rows: [(owner, f"r{number}", size) for number, (owner, size) in enumerate(rows)])


@given(ROWS, st.integers(1, 20), st.integers(0, 10_000))
def test_no_more_rows_make_room_than_must(
    rows: list[tuple[str, str, int]], most: int, most_size: int
) -> None:
    newest = rows[-1][:2]
    victims = choose_victims(rows, most, most_size, newest)
    left = [row for row in rows if row[:2] not in victims]
    assert newest in [row[:2] for row in left]
    assert len(left) == len(rows) - len(victims)
    if len(left) > 1:
        assert len(left) <= most
        assert sum(size for _, _, size in left) <= most_size
    for owner in "abc":
        # The oldest ones of an owner go first.
        gone = [row[:2] in victims for row in rows if row[0] == owner and row[:2] != newest]
        assert gone == sorted(gone, reverse=True)
    if victims:
        before = [row for row in rows if row[:2] not in victims[:-1]]
        assert len(before) > most or sum(size for _, _, size in before) > most_size

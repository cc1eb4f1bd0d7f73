"""Stored responses in the database: the same on SQLite and on PostgreSQL, for several masters."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
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
        began = trio.current_time()
        assert not await node.responses.put("a", record("r"))
        with pytest.raises(StoreError):
            await node.responses.get("a", "r")
        assert trio.current_time() - began < 0.45


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

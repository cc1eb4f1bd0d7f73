"""The accounts of a node: several nodes on one database, and what is written when."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import patience
import pytest
import trio

from trio_cluster.accounts import accounts as module
from trio_cluster.accounts.accounts import Accounts, open_accounts
from trio_cluster.accounts.audit import AuditLog
from trio_cluster.accounts.errors import StoreError
from trio_cluster.accounts.keys import KeyRecord
from trio_cluster.accounts.usage_row import UsageQuery
from trio_cluster.core.answer import Done, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.observer import Observers
from trio_cluster.core.principal import ANONYMOUS, Principal
from trio_cluster.core.request import Request


class Node:
    """The accounts of a node, and what they observe."""

    def __init__(self, accounts: Accounts, observers: Observers, audit: AuditLog) -> None:
        self.accounts = accounts
        self.observers = observers
        self.audit = audit

    def answer(self, request_id: str = "r") -> None:
        call = Call(
            Request("chat.completions", "chat", "m", b"", request_id=request_id, principal=Principal("a"))
        )
        call.put(Head())
        call.put(Done(Usage(1, 2)))
        call.release()
        for listener in self.observers.ended:
            listener(call, "completed")


@asynccontextmanager
async def open_node(database: str | Path) -> AsyncIterator[Node]:
    observers, audit = Observers(), AuditLog()
    async with (
        open_accounts(database, audit, observers, lambda: 90) as accounts,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(accounts.run)
        yield Node(accounts, observers, audit)
        nursery.cancel_scope.cancel()


async def test_what_one_node_changes_the_others_apply_within_two_seconds(database: str | Path) -> None:
    async with open_node(database) as one, open_node(database) as other:
        key = await one.accounts.create_key(KeyRecord(name="a"), ANONYMOUS, "")
        assert one.accounts.table.find(key.encode()) is not None
        with patience.fail_after(2):
            while other.accounts.table.find(key.encode()) is None:  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert other.accounts.table.required
        await other.accounts.revoke_key("a", ANONYMOUS, "")
        assert other.accounts.table.find(key.encode()) is None
        with patience.fail_after(2):
            while one.accounts.table.find(key.encode()) is not None:  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert one.accounts.table.required


async def test_keys_are_there_after_a_restart(database: str | Path) -> None:
    async with open_node(database) as node:
        key = await node.accounts.create_key(KeyRecord(name="a", models=("m",)), ANONYMOUS, "")
    async with open_node(database) as node:
        entry = node.accounts.table.find(key.encode())
        assert entry is not None
        assert entry.principal == Principal("a", models=("m",))


async def test_all_is_written_when_the_node_ends_also_if_it_is_cancelled(database: str | Path) -> None:
    for cancelled in (False, True):
        with trio.CancelScope() as scope:
            async with open_node(database) as node:
                node.answer()
                node.audit.record(ANONYMOUS, "192.0.2.1:1", "worker.drain", "w")
                if cancelled:
                    scope.cancel()
    async with open_node(database) as node:
        assert (await node.accounts.usage(UsageQuery()))[0]["requests"] == 2
        assert len(await node.accounts.audit_entries(10)) == 2


async def test_an_answer_about_usage_has_what_was_not_written_yet(database: str | Path) -> None:
    async with open_node(database) as node, open_node(database) as other:
        for _ in range(3):
            node.answer()
            other.answer()
        (total,) = await node.accounts.usage(UsageQuery())
        assert total["requests"] >= 3
        with patience.fail_after(2):
            while (await node.accounts.usage(UsageQuery()))[0]["requests"] < 6:  # noqa: ASYNC110
                await trio.sleep(0.05)


async def test_rows_are_written_by_themselves_within_a_second(database: str | Path) -> None:
    async with open_node(database) as node:
        node.answer()
        with patience.fail_after(1):
            while node.accounts.journal.waiting:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_nothing_is_observed_or_queued_afterwards(tmp_path: Path) -> None:
    async with open_node(tmp_path / "accounts.db") as node:
        pass
    assert node.observers.ended == ()
    node.audit.record(ANONYMOUS, "", "worker.drain", "w")
    assert node.audit.waiting is None


async def test_what_cannot_be_opened_leaves_nothing_behind(tmp_path: Path) -> None:
    observers, audit = Observers(), AuditLog()
    with pytest.raises(StoreError):
        async with open_accounts(tmp_path, audit, observers, lambda: 90):
            pass
    assert observers.ended == ()
    assert audit.waiting is None


async def test_a_report_that_takes_long_delays_neither_the_journal_nor_the_look_for_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    async with open_node(tmp_path / "accounts.db") as one, open_node(tmp_path / "accounts.db") as other:

        async def ask() -> None:
            with trio.move_on_after(5):
                await other.accounts.usage(UsageQuery())

        def slow(*_: object) -> list[object]:
            time.sleep(3)
            return []

        monkeypatch.setattr("trio_cluster.accounts.store.Store.sum_usage", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.05)
            other.answer()
            key = await one.accounts.create_key(KeyRecord(name="a"), ANONYMOUS, "")
            with patience.fail_after(2):
                while other.accounts.table.find(key.encode()) is None:  # noqa: ASYNC110
                    await trio.sleep(0.02)
                while other.accounts.journal.waiting:  # noqa: ASYNC110
                    await trio.sleep(0.02)


def test_sqlalchemy_is_loaded_with_a_database_and_not_before() -> None:
    code = "import sys, trio_cluster.cli, trio_cluster.server; assert not {'sqlalchemy', 'psycopg'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_look_and_a_batch_leave_time_for_the_promised_seconds() -> None:
    from trio_cluster.accounts import journal

    assert module.LOOK <= 1.0
    assert journal.PAUSE < 1.0

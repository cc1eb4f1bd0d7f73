"""The database: the same on SQLite and on PostgreSQL."""

from __future__ import annotations

import random
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trio_cluster.accounts.audit import AuditEntry
from trio_cluster.accounts.errors import StoreError
from trio_cluster.accounts.keys import KeyDigest, KeyRecord, digest_of
from trio_cluster.accounts.migrations import MIGRATIONS
from trio_cluster.accounts.store import Store
from trio_cluster.accounts.usage_row import COLUMNS, COUNTS, UsageQuery, UsageRow
from trio_cluster.errors import ApiError

DAY = 86_400.0
#: The beginning of a day.
MIDNIGHT = 20_000 * DAY


@pytest.fixture
def store(database: str | Path) -> Iterator[Store]:
    opened = Store(database)
    yield opened
    opened.close()


def entry(action: str = "key.create", target: str = "a") -> AuditEntry:
    return AuditEntry(action=action, target=target, principal="me", address="192.0.2.1:5")


def row(moment: float, **columns: Any) -> UsageRow:
    values: dict[str, Any] = {
        "time": moment,
        "key": "a",
        "model": "m",
        "alias": "",
        "worker": "w",
        "route": "chat.completions",
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "cached_tokens": 1,
        "outcome": "completed",
        "first_byte": 0.5,
        "duration": 1.5,
        "request_id": "req_1",
    }
    return tuple((values | columns)[name] for name in COLUMNS)  # type: ignore[return-value]


def names(store: Store) -> list[str]:
    return [record.name for record, _ in store.load_keys().keys]


# Opening


def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "accounts.db")
    store.add_key(KeyRecord(name="a"), digest_of(b"k"), entry())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes.keys() >= {"accounts.db", "accounts.db-wal"}
    assert set(modes.values()) == {0o600}
    store.close()


def test_two_masters_that_start_at_once_make_the_tables_once(database: str | Path) -> None:
    start, opened, failed = threading.Barrier(4), [], []

    def open_it() -> None:
        start.wait()
        try:
            opened.append(Store(database))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for number, store in enumerate(opened):
        store.add_key(KeyRecord(name=f"k{number}"), digest_of(b"%d" % number), entry())
    assert names(opened[0]) == ["k0", "k1", "k2", "k3"]
    for store in opened:
        store.close()


def test_what_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "accounts.db").write_bytes(b"something else" * 100)
    with pytest.raises(StoreError, match=r"accounts\.db: file is not a database") as caught:
        Store(tmp_path / "accounts.db")
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="Is a directory"):
        Store(tmp_path)


def test_a_server_that_is_not_there_is_one_line_without_the_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError) as caught:
        Store(f"postgresql://me:sesame@/nothing?host={tmp_path}")
    assert "sesame" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://me:sesame@host:port/x", "postgresql://me:sesame@h:1:2/x"])
def test_a_url_that_is_none_is_not_repeated(url: str) -> None:
    with pytest.raises(StoreError, match="expected a URL") as caught:
        Store(url)
    assert "sesame" not in str(caught.value)


def test_the_package_that_postgresql_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"needs the package psycopg: pip install 'psycopg\[binary\]'"):
        Store("postgresql://me@host/name")


def test_a_database_of_a_later_version_is_refused(store: Store, database: str | Path) -> None:
    with store._write() as connection:
        store._set(connection, "schema_version", 99)
    known = len(MIGRATIONS)
    with pytest.raises(
        StoreError, match=f"version 99, and this program knows {known}; install a later version"
    ):
        Store(database)


# Keys


def test_a_key_comes_back_as_it_was_stored(store: Store) -> None:
    record = KeyRecord(
        name="a",
        models=("qwen*", "ü,\"'"),
        role="operator",
        requests_per_minute=2**53 - 1,
        tokens_per_minute=2,
        max_concurrency=3,
        budget_tokens=4,
        budget_per="week",
        priority="low",
        weight=0.1,
        expires_at=1.25e9 + 0.125,
        disabled=True,
        created_at=1.5,
    )
    before = store.count_key_changes()
    assert not store.load_keys().required
    snapshot = store.add_key(record, digest_of(b"key"), entry())
    assert snapshot.required
    assert snapshot.keys == [(record, [KeyDigest(digest_of(b"key"))])]
    assert store.load_keys() == snapshot
    assert store.count_key_changes() == snapshot.changes != before


def test_a_name_is_taken_once(store: Store) -> None:
    store.add_key(KeyRecord(name="a", weight=2), digest_of(b"1"), entry())
    changes = store.count_key_changes()
    with pytest.raises(ApiError) as refused:
        store.add_key(KeyRecord(name="a"), digest_of(b"2"), entry())
    assert (refused.value.status, refused.value.code) == (409, "name_taken")
    assert store.count_key_changes() == changes
    assert store.load_keys().keys[0][0].weight == 2
    assert len(store.load_audit(10)) == 1


def test_changes_keep_what_they_do_not_name(store: Store) -> None:
    store.add_key(KeyRecord(name="a", weight=2, models=("x",)), digest_of(b"1"), entry())
    snapshot = store.change_key("a", {"disabled": True, "models": ("y", "z")}, entry("key.change"))
    assert snapshot is not None
    assert snapshot.keys[0][0] == KeyRecord(name="a", weight=2, models=("y", "z"), disabled=True)
    assert store.change_key("b", {"disabled": True}, entry("key.change")) is None
    assert [each.action for each in store.load_audit(10)] == ["key.change", "key.create"]


def test_a_key_that_was_removed_is_gone_with_its_digests_and_a_key_is_still_required(store: Store) -> None:
    store.add_key(KeyRecord(name="a"), digest_of(b"1"), entry())
    snapshot = store.remove_key("a", entry("key.revoke"))
    assert snapshot is not None
    assert (snapshot.keys, snapshot.required) == ([], True)
    assert store.remove_key("a", entry("key.revoke")) is None
    again = store.add_key(KeyRecord(name="a"), digest_of(b"2"), entry())
    assert [digest.digest for _, digests in again.keys for digest in digests] == [digest_of(b"2")]


def test_rotating_lets_the_old_digest_expire_and_never_makes_it_live_longer(store: Store) -> None:
    now = time.time()
    store.add_key(KeyRecord(name="a"), digest_of(b"1"), entry())
    store.rotate_key("a", digest_of(b"2"), now + 50, entry("key.rotate"))
    snapshot = store.rotate_key("a", digest_of(b"3"), now + 100, entry("key.rotate"))
    assert snapshot is not None
    found = {digest.digest: digest.expires_at for _, digests in snapshot.keys for digest in digests}
    assert found == {digest_of(b"1"): now + 50, digest_of(b"2"): now + 100, digest_of(b"3"): None}
    snapshot = store.rotate_key("a", digest_of(b"4"), now - 1, entry("key.rotate"))
    snapshot = store.rotate_key("a", digest_of(b"5"), now - 1, entry("key.rotate"))
    assert snapshot is not None
    # Those that have expired are deleted.
    assert {digest.digest for _, digests in snapshot.keys for digest in digests} == {
        digest_of(b"4"),
        digest_of(b"5"),
    }
    assert store.rotate_key("b", digest_of(b"6"), now, entry("key.rotate")) is None


# Usage


def test_a_batch_that_is_written_again_counts_once(store: Store, database: str | Path) -> None:
    rows = [
        row(MIDNIGHT + 1),
        row(MIDNIGHT + 2, outcome="failed", prompt_tokens=None, completion_tokens=None),
    ]
    store.add_usage("w1", 1, rows)
    store.add_usage("w1", 1, rows)
    store.add_usage("w2", 1, rows[:1])
    store.add_usage("w1", 2, rows[:1])
    (total,) = store.sum_usage(UsageQuery())
    assert (total["requests"], total["failed"], total["usage_unknown"]) == (4, 1, 1)
    (total,) = store.sum_usage(UsageQuery(since=MIDNIGHT + 0.5))
    assert (total["requests"], total["completed"]) == (4, 3)


def test_the_same_batch_from_two_threads_at_once_counts_once(store: Store) -> None:
    rows = [row(MIDNIGHT + number) for number in range(500)]
    for batch in range(1, 6):
        threads = [threading.Thread(target=store.add_usage, args=("w", batch, rows)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (total,) = store.sum_usage(UsageQuery())
    assert total["requests"] == 2500


def expected(rows: list[UsageRow], query: UsageQuery) -> list[dict[str, Any]]:
    """Return the sums as they are by definition."""
    sums: dict[tuple[Any, ...], list[int]] = {}
    for each in rows:
        columns: dict[str, Any] = dict(zip(COLUMNS, each, strict=True))
        moment, outcome = columns["time"], columns["outcome"]
        if query.since is not None and moment < query.since:
            continue
        if query.until is not None and moment >= query.until:
            continue
        if query.key is not None and columns["key"] != query.key:
            continue
        columns["day"] = time.strftime("%Y-%m-%d", time.gmtime(moment))
        counts = {
            "requests": 1,
            "completed": outcome == "completed",
            "failed": outcome not in ("completed", "cancelled"),
            "cancelled": outcome == "cancelled",
            "prompt_tokens": columns["prompt_tokens"] or 0,
            "completion_tokens": columns["completion_tokens"] or 0,
            "cached_tokens": columns["cached_tokens"] or 0,
            "usage_unknown": columns["prompt_tokens"] is columns["completion_tokens"] is None,
        }
        total = sums.setdefault(tuple(columns[name] for name in query.group_by), [0] * len(COUNTS))
        for index, name in enumerate(COUNTS):
            total[index] += counts[name]
    return [
        dict(zip(query.group_by, group, strict=True)) | dict(zip(COUNTS, total, strict=True))
        for group, total in sorted(sums.items())
    ]


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_the_rows_for_any_interval(store: Store, seed: int) -> None:
    draw = random.Random(seed)
    rows = [
        row(
            MIDNIGHT + draw.uniform(0, 4) * DAY,
            key=draw.choice(["", "a", "b"]),
            model=draw.choice(["m", "n"]),
            worker=draw.choice(["local", "w"]),
            outcome=draw.choice(
                ["completed", "completed", "cancelled", "failed", "timed_out", "worker_lost"]
            ),
            prompt_tokens=draw.choice([None, 0, 7]),
            completion_tokens=draw.choice([None, 5]),
            cached_tokens=draw.choice([None, 2]),
        )
        for _ in range(400)
    ]
    for number, begin in enumerate(range(0, len(rows), 90), start=1):
        store.add_usage("w", number, rows[begin : begin + 90])
    moments = [
        None,
        *(MIDNIGHT + draw.uniform(-0.5, 4.5) * DAY for _ in range(4)),
        MIDNIGHT,
        MIDNIGHT + 2 * DAY,
    ]
    for group_by in [(), ("key",), ("day",), ("worker", "day"), ("day", "key", "model", "worker")]:
        for since in moments:
            for until in moments:
                if since is None or until is None or since <= until:
                    query = UsageQuery(group_by, since, until, draw.choice([None, "a"]))
                    assert store.sum_usage(query) == expected(rows, query), query


def test_the_rows_of_old_days_are_deleted_and_their_sums_stay(store: Store) -> None:
    store.add_usage("w", 1, [row(MIDNIGHT + 100), row(MIDNIGHT + DAY + 100), row(MIDNIGHT + DAY + 200)])
    store.delete_usage(MIDNIGHT + DAY)
    assert store.sum_usage(UsageQuery(("day",)))[0]["requests"] == 1
    # Where rows are left, every moment counts.
    assert store.sum_usage(UsageQuery(since=MIDNIGHT + DAY + 150))[0]["requests"] == 1
    # Where they are not, the whole day does.
    assert store.sum_usage(UsageQuery(since=MIDNIGHT + 200, until=MIDNIGHT + 300))[0]["requests"] == 1
    with store._read() as connection:
        from trio_cluster.accounts import schema

        assert len(connection.execute(schema.usage.select()).all()) == 2


# Audit


def test_entries_are_kept_once_and_come_newest_first(store: Store) -> None:
    entries = [
        AuditEntry(action="worker.drain", target=f"w{number}", principal="", address="", time=number)
        for number in range(5)
    ]
    store.add_audit(entries[:3])
    store.add_audit(entries)
    assert store.load_audit(4) == entries[:0:-1]
    store.add_audit([])


# Failures


def test_a_locked_file_is_one_error_and_nothing_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_cluster.accounts.store._BUSY_TIMEOUT", 0.05)
    store = Store(tmp_path / "accounts.db")
    other = sqlite3.connect(tmp_path / "accounts.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        store.add_usage("w", 1, [row(MIDNIGHT)])
    # Reading goes on meanwhile.
    assert store.load_keys().keys == []
    other.execute("COMMIT")
    other.close()
    store.add_usage("w", 1, [row(MIDNIGHT)])
    assert store.sum_usage(UsageQuery())[0]["requests"] == 1
    store.close()


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_database_that_cannot_be_written_changes_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "accounts.db")
    store.add_usage("w", 1, [row(MIDNIGHT)])
    pragma: Callable[[bool], str] = {
        "full": lambda on: f"PRAGMA max_page_count = {1 if on else 1_000_000}",
        "read-only": lambda on: f"PRAGMA query_only = {int(on)}",
    }[what]

    def set_it(on: bool) -> None:
        with store._engine.connect() as connection:
            connection.connection.driver_connection.execute(pragma(on))  # type: ignore[union-attr]

    set_it(True)
    many = [row(MIDNIGHT, request_id="x" * 1000) for _ in range(1000)]
    with pytest.raises(StoreError, match=r"full|readonly"):
        store.add_usage("w", 2, many)
    assert store.sum_usage(UsageQuery())[0]["requests"] == 1
    set_it(False)
    store.add_usage("w", 2, many)
    assert store.sum_usage(UsageQuery())[0]["requests"] == 1001
    store.close()


def test_a_connection_that_is_in_use_when_the_store_is_closed_is_closed_when_it_is_given_back(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "a.db")
    with store._read() as connection:
        raw = connection.connection.dbapi_connection
        assert raw is not None
        store.close()
        assert raw.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        raw.execute("SELECT 1")
    store.close()

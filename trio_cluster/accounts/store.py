"""The database: SQLite in a file of the node's state directory, or PostgreSQL, which several masters may share.

Everything here blocks, and is called in threads. All statements are made with SQLAlchemy Core, so that they are the
same for both databases.

A transaction that writes takes the lock of an SQLite database when it begins. Otherwise two of them that have read
before they write would each wait for the other one, and one of them would fail.

Every failure of the database is a :class:`StoreError`, whose message is one line, without the password of the URL and
without any value that was to be stored.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import attrs
import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from ..errors import ApiError
from . import schema
from .audit import AuditEntry
from .errors import StoreError
from .keys import KeyDigest, KeyRecord
from .migrations import SchemaTooNew, migrate
from .stored_row import Bounds, Growth, StoredRow, choose_victims
from .usage_row import COLUMNS, COUNTS, DAY, UsageQuery, UsageRow, fold

__all__ = ["KeySnapshot", "Store"]

#: Seconds that SQLite waits for another process that writes; that connecting to PostgreSQL may take; and that a
#: statement may run there.
_BUSY_TIMEOUT: Final = 5.0
_CONNECT_TIMEOUT: Final = 3
_STATEMENT_TIMEOUT: Final = 10

#: How the system notices that PostgreSQL's machine is gone: after half a minute. It has no other limit for a statement,
#: which holds a thread. In seconds, but the last one in milliseconds.
_KEEPALIVE: Final = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}

#: Rows that are deleted in one transaction.
_DELETED: Final = 10_000

#: Tries to create a database, if another process does so at the same moment.
_OPEN_TRIES: Final = 20

_WRITES: Final = "trio_cluster_writes"

#: Names in ``tc_settings``.
_CHANGES: Final = "key_changes"
_REQUIRED: Final = "keys_required"
_ROWS_FROM: Final = "usage_rows_from"


def _always() -> bool:
    return True


@attrs.frozen
class KeySnapshot:
    """All keys, as they were at one moment."""

    changes: int
    """A number that is another one after each change."""
    required: bool
    """Whether there has ever been a key."""
    keys: list[tuple[KeyRecord, list[KeyDigest]]]


class Store:
    """An open database. Its methods may be called in several threads at once.

    Args:
        database: a URL that begins with ``postgresql://`` or ``sqlite:///``, or the path of an SQLite file, which is
            created if it is missing.

    Raises:
        StoreError: it cannot be opened, or not be written.
    """

    def __init__(self, database: str | Path) -> None:
        self.name: str
        self._engine = self._create_engine(database)
        self._closed = False
        self._insert = sqlite.insert if self._engine.dialect.name == "sqlite" else postgresql.insert
        # Made once, since making them costs more than executing them.
        self._note_batch = _note_batch(self._insert)
        self._add_to_days = _add_to_days(self._insert)
        self._add_usage = _add_usage(self._engine)
        try:
            self._prepare()
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Close all connections: those that are in use when they are given back. Synchronous, idempotent."""
        self._closed = True
        # The pool and not the engine, which would make another pool and leave what is in use to the garbage collector.
        self._engine.pool.dispose()

    # Keys

    def count_key_changes(self) -> int:
        """Return the number that changes with the keys."""
        with self._read() as connection:
            return _setting(connection, _CHANGES)

    def load_keys(self) -> KeySnapshot:
        """Return all keys."""
        with self._read() as connection:
            return _snapshot(connection)

    def add_key(self, record: KeyRecord, digest: str, entry: AuditEntry) -> KeySnapshot:
        """Store a new key, and return all keys.

        Raises:
            ApiError: 409: there is a key of this name.
        """
        with self._write() as connection:
            statement = self._insert(schema.keys).values(_columns(record)).on_conflict_do_nothing()
            if connection.scalar(statement.returning(schema.keys.c.name)) is None:
                raise ApiError(
                    409, f"There is a key '{record.name}' already", code="name_taken", param="name"
                )
            connection.execute(sa.insert(schema.digests).values(digest=digest, name=record.name))
            return self._changed(connection, entry)

    def change_key(self, name: str, changes: Mapping[str, Any], entry: AuditEntry) -> KeySnapshot | None:
        """Change columns of a key, and return all keys; ``None``: there is no such key."""
        columns = dict(changes)
        if "models" in columns:
            columns["models"] = json.dumps(list(columns["models"]))
        with self._write() as connection:
            this = schema.keys.c.name == name
            if not connection.scalar(sa.select(sa.func.count()).select_from(schema.keys).where(this)):
                return None
            if columns:
                connection.execute(sa.update(schema.keys).where(this).values(columns))
            return self._changed(connection, entry)

    def remove_key(self, name: str, entry: AuditEntry) -> KeySnapshot | None:
        """Delete a key and what it has stored, and return all others; ``None``: there is no such key."""
        with self._write() as connection:
            if connection.execute(sa.delete(schema.keys).where(schema.keys.c.name == name)).rowcount == 0:
                return None
            connection.execute(sa.delete(schema.digests).where(schema.digests.c.name == name))
            for table in (schema.stored, schema.stored_items):
                of_key = table.c.owner.startswith(f"{name}\n", autoescape=True)
                connection.execute(sa.delete(table).where(of_key))
            return self._changed(connection, entry)

    def rotate_key(self, name: str, digest: str, old_until: float, entry: AuditEntry) -> KeySnapshot | None:
        """Add a digest to a key, let the others expire, and return all keys; ``None``: there is no such key.

        Args:
            name: of the key.
            digest: the new one.
            old_until: when the others expire, in seconds since the epoch, if they do not expire earlier.
            entry: for the audit log.
        """
        digests = schema.digests
        with self._write() as connection:
            # The row of the key is locked, so that two rotations at once follow each other.
            found = connection.scalar(
                sa.select(schema.keys.c.name).where(schema.keys.c.name == name).with_for_update()
            )
            if found is None:
                return None
            expired = digests.c.expires_at <= time.time()
            connection.execute(sa.delete(digests).where(digests.c.name == name, expired))
            later = sa.or_(digests.c.expires_at.is_(None), digests.c.expires_at > old_until)
            old = sa.update(digests).where(digests.c.name == name, later)
            connection.execute(old.values(expires_at=old_until))
            connection.execute(sa.insert(digests).values(digest=digest, name=name))
            return self._changed(connection, entry)

    # Usage

    def add_usage(self, writer: str, batch: int, rows: Sequence[UsageRow]) -> None:
        """Store rows, and add them to the sums of their days. A batch that is there already is not stored again.

        Args:
            writer: the name of the process, which no other one has.
            batch: counts its batches up.
            rows: of this batch.
        """
        # In one order, so that two masters never wait for each other's rows.
        days = [
            {"day": _day(day * DAY), "key": key, "model": model, "worker": worker}
            | dict(zip(COUNTS, total, strict=True))
            for (day, key, model, worker), total in sorted(fold(rows).items())
        ]
        with self._write() as connection:
            note = {"writer": writer, "batch": batch, "time": time.time()}
            # One statement, which waits for another try of the same batch that is still being committed.
            if connection.scalar(self._note_batch, note) is not None:
                self._add_rows(connection, rows)
                connection.execute(self._add_to_days, days)

    def _add_rows(self, connection: sa.Connection, rows: Sequence[UsageRow]) -> None:
        # This is most of what the journal costs, so it is done in the cheapest way of each database.
        if isinstance(self._add_usage, str):
            # `connection.execute` would look at each value of each row, which takes as long as SQLite itself.
            connection.exec_driver_sql(self._add_usage, list(rows))
        else:
            # One statement with one value, instead of one for each row.
            connection.execute(self._add_usage, {"rows": _as_json(rows)})

    def delete_usage(self, before: float) -> None:
        """Delete the rows of whole days; their sums stay.

        Args:
            before: the beginning of the first day that is kept, in seconds since the epoch.
        """
        rows = schema.usage
        old = sa.select(rows.c.id).where(rows.c.time < before).limit(_DELETED)
        with self._write() as connection:
            self._set(connection, _ROWS_FROM, int(before))
            stale = schema.usage_writers.c.time < before
            connection.execute(sa.delete(schema.usage_writers).where(stale))
        while True:
            with self._write() as connection:
                if not connection.execute(sa.delete(rows).where(rows.c.id.in_(old))).rowcount:
                    return

    def sum_usage(self, query: UsageQuery) -> list[dict[str, Any]]:
        """Return the sums of each group, in the order of the groups.

        Whole days are summed up from their sums, and what is left at both ends from the rows. Where those have been
        deleted, the whole day counts.
        """
        sums: dict[tuple[str, ...], list[int]] = {}
        with self._read() as connection:
            rows_from = _setting(connection, _ROWS_FROM)
            since = query.since if query.since is None or query.since >= rows_from else _floor(query.since)
            until = query.until if query.until is None or query.until >= rows_from else -_floor(-query.until)
            for row in connection.execute(_sum_days(query, since, until)).mappings():
                _merge(sums, query, row, None)
            for begin, end in _partial_days(since, until):
                day = _day(begin)
                for row in connection.execute(_sum_rows(query, begin, end)).mappings():
                    _merge(sums, query, row, day)
        return [
            dict(zip(query.group_by, group, strict=True)) | dict(zip(COUNTS, counts, strict=True))
            for group, counts in sorted(sums.items())
        ]

    # Audit

    def add_audit(self, entries: Iterable[AuditEntry]) -> None:
        """Store entries. One that is there already is not stored again."""
        with self._write() as connection:
            self._add_audit(connection, entries)

    def load_audit(self, limit: int) -> list[AuditEntry]:
        """Return the last entries, newest first."""
        audit = schema.audit
        newest = sa.select(audit).order_by(audit.c.time.desc(), audit.c.id.desc()).limit(limit)
        with self._read() as connection:
            return [
                AuditEntry(
                    action=row.action,
                    target=row.target,
                    principal=row.principal,
                    address=row.address,
                    details=json.loads(row.details),
                    time=row.time,
                    entry=row.entry,
                )
                for row in connection.execute(newest)
            ]

    # Stored responses

    def put_stored(
        self,
        row: StoredRow | None,
        items: Iterable[str],
        growth: Growth | None = None,
        bounds: Bounds | None = None,
        is_wanted: Callable[[], bool] = _always,
    ) -> bool:
        """Store a row, in the place of one of the same owner and id, and let another one grow: both, or nothing at all.

        Args:
            row: the row; ``None``: only the other one grows.
            items: the ids of the items in it.
            growth: what is added to another row; that one stays deleted if it is.
            bounds: are kept; ``None``: they are not looked at.
            is_wanted: called at the end; if it returns ``False``, nothing is stored.

        Returns:
            Whether there is everything now: ``False`` if the row that was to grow does not exist.
        """
        grown = True
        with self._write(is_wanted) as connection:
            if row is not None:
                values = attrs.asdict(row, recurse=False) | {"size": row.size}
                insert = self._insert(schema.stored).values(values)
                connection.execute(
                    insert.on_conflict_do_update(
                        index_elements=[schema.stored.c.owner, schema.stored.c.id],
                        set_={name: insert.excluded[name] for name in values if name not in ("owner", "id")},
                    )
                )
                self._note_items(connection, row.owner, row.id, items)
            if growth is not None:
                grown = self._grow(connection, growth)
            newest = (row.owner, row.id) if row is not None else None
            if growth is not None and grown:
                newest = (growth.owner, growth.id)
            if bounds is not None and newest is not None:
                _keep_bounds(connection, *bounds, newest)
        return grown

    def _grow(self, connection: sa.Connection, growth: Growth) -> bool:
        stored = schema.stored
        wanted = _find_stored(growth.owner, [growth.id], growth.since)
        found = connection.execute(wanted.with_for_update()).one_or_none()
        if found is None:
            return False
        context = bytes(found.context)
        if context == b"[]":
            context = growth.array
        elif growth.array != b"[]":
            context = context[:-1] + b"," + growth.array[1:]
        size = len(found.head) + len(context) + len(found.output)
        this = sa.update(stored).where(stored.c.owner == growth.owner, stored.c.id == growth.id)
        connection.execute(this.values(context=context, size=size, time=growth.time))
        self._note_items(connection, growth.owner, growth.id, growth.items)
        return True

    def change_stored(
        self,
        owner: str,
        row_id: str,
        since: float,
        change: Callable[[StoredRow], StoredRow],
        is_wanted: Callable[[], bool] = _always,
    ) -> bool:
        """Replace a row by another one of the same owner and id; no other change of it can come between.

        Args:
            owner, row_id: the row.
            since: an older row counts as deleted.
            change: returns the new row; it has no items that the old one does not have.
            is_wanted: called at the end; if it returns ``False``, nothing is changed.

        Returns:
            Whether there is this row.
        """
        stored = schema.stored
        with self._write(is_wanted) as connection:
            wanted = _find_stored(owner, [row_id], since)
            found = connection.execute(wanted.with_for_update()).one_or_none()
            if found is None:
                return False
            row = change(_stored_row(found))
            this = sa.update(stored).where(stored.c.owner == owner, stored.c.id == row_id)
            connection.execute(this.values(attrs.asdict(row, recurse=False) | {"size": row.size}))
        return True

    def get_stored(self, owner: str, row_id: str, since: float) -> StoredRow | None:
        """Return a row; ``None`` if there is none of this owner and id, or only an older one."""
        with self._read() as connection:
            found = connection.execute(_find_stored(owner, [row_id], since)).one_or_none()
            return None if found is None else _stored_row(found)

    def delete_stored(self, owner: str, row_id: str, since: float) -> bool:
        """Delete a row, and return whether it was there; an older one counts as deleted."""
        with self._write() as connection:
            # Locked, and nothing is deleted if there is none. Otherwise a row that another master stores at this moment
            # could lose its items, which are deleted by a later statement.
            wanted = _find_stored(owner, [row_id], -math.inf).with_for_update()
            found = connection.execute(wanted).one_or_none()
            if found is None:
                return False
            _delete_stored(connection, [(owner, row_id)])
            return bool(found.time >= since)

    def find_stored(self, owner: str, items: Iterable[str], since: float) -> list[StoredRow]:
        """Return rows of an owner that have these items, as far as any has."""
        table = schema.stored_items
        wanted = sa.select(table.c.stored).distinct().where(table.c.owner == owner)
        with self._read() as connection:
            ids = connection.scalars(wanted.where(table.c.item.in_(list(items)))).all()
            return [_stored_row(row) for row in connection.execute(_find_stored(owner, ids, since))]

    def delete_old_stored(self, before: float) -> None:
        """Delete the rows that were stored before a time."""
        with self._write() as connection:
            _delete_old_stored(connection, before)

    def _note_items(self, connection: sa.Connection, owner: str, row_id: str, items: Iterable[str]) -> None:
        # In one order, so that two masters never wait for each other's rows.
        rows = [{"owner": owner, "item": item, "stored": row_id} for item in sorted(set(items))]
        if rows:
            table = schema.stored_items
            insert = self._insert(table)
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=[table.c.owner, table.c.item], set_={"stored": insert.excluded.stored}
                ),
                rows,
            )

    # What all of these use

    def _create_engine(self, database: str | Path) -> sa.Engine:
        options: dict[str, Any] = {"hide_parameters": True}
        try:
            if isinstance(database, Path):
                url = sa.URL.create("sqlite+pysqlite", database=str(database))
            else:
                url = sa.make_url(database)
                if url.drivername in ("postgresql", "postgres"):
                    url = url.set(drivername="postgresql+psycopg")
                elif url.drivername == "sqlite":
                    url = url.set(drivername="sqlite+pysqlite")
            self.name = url.render_as_string(hide_password=True)
            if url.get_backend_name() == "sqlite":
                self.name = url.database or ""
                if not self.name:
                    raise StoreError("database: expected sqlite:///PATH")
                options["connect_args"] = {"timeout": _BUSY_TIMEOUT}
                _create_file(Path(self.name))
            else:
                # Prepared statements do not pass a PgBouncer that pools transactions.
                options["connect_args"] = _KEEPALIVE | {
                    "connect_timeout": _CONNECT_TIMEOUT,
                    "prepare_threshold": None,
                }
                options |= {"pool_pre_ping": True, "pool_size": 4, "max_overflow": 2, "pool_timeout": 5}
            engine = sa.create_engine(url, **options)
        except (sa.exc.ArgumentError, ValueError):
            # Its message has the whole URL in it.
            raise StoreError("database: expected a URL such as postgresql://USER@HOST/NAME") from None
        except ModuleNotFoundError as error:
            raise StoreError(
                f"database: PostgreSQL needs the package {error.name}: pip install 'psycopg[binary]'"
            ) from None
        except OSError as error:
            raise StoreError(f"database {self.name}: {error.strerror}") from None
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _set_up_sqlite)
            sa.event.listen(engine, "begin", _begin_sqlite)
        else:
            sa.event.listen(engine, "connect", _set_up_postgresql)
        return engine

    def _prepare(self) -> None:
        """Bring the schema up to date."""
        for tries_left in reversed(range(_OPEN_TRIES)):
            try:
                with self._write() as connection:
                    migrate(connection)
                    # Fails if the database can only be read.
                    self._set(connection, _CHANGES, _setting(connection, _CHANGES))
                return
            except SchemaTooNew as error:
                raise StoreError(f"database {self.name}: {error}; install a later version") from None
            except StoreError as error:
                # SQLite does not wait for the change to WAL that another process makes.
                if not tries_left or "locked" not in str(error):
                    raise
                time.sleep(0.05)

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with self._connect() as connection:
            yield connection

    @contextmanager
    def _write(self, is_wanted: Callable[[], bool] = _always) -> Iterator[sa.Connection]:
        with self._connect() as connection:
            connection = connection.execution_options(**{_WRITES: True})
            with connection.begin():
                yield connection
                if not is_wanted():
                    raise StoreError(f"database {self.name}: the change was cancelled")

    @contextmanager
    def _connect(self) -> Iterator[sa.Connection]:
        try:
            with self._translate(), self._engine.connect() as connection:
                yield connection
        finally:
            if self._closed:
                self._engine.pool.dispose()

    @contextmanager
    def _translate(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            raise StoreError(f"database {self.name}: {' '.join(str(cause).split())}") from None

    def _set(self, connection: sa.Connection, name: str, value: int) -> None:
        insert = self._insert(schema.settings).values(name=name, value=value)
        connection.execute(
            insert.on_conflict_do_update(
                index_elements=[schema.settings.c.name], set_={"value": insert.excluded.value}
            )
        )

    def _changed(self, connection: sa.Connection, entry: AuditEntry) -> KeySnapshot:
        self._set(connection, _REQUIRED, 1)
        counted = sa.update(schema.settings).where(schema.settings.c.name == _CHANGES)
        connection.execute(counted.values(value=schema.settings.c.value + 1))
        self._add_audit(connection, [entry])
        return _snapshot(connection)

    def _add_audit(self, connection: sa.Connection, entries: Iterable[AuditEntry]) -> None:
        rows = [
            attrs.asdict(entry, recurse=False) | {"details": json.dumps(dict(entry.details))}
            for entry in entries
        ]
        if rows:
            connection.execute(self._insert(schema.audit).on_conflict_do_nothing(), rows)


def _find_stored(owner: str, ids: Sequence[str], since: float) -> sa.Select[Any]:
    stored = schema.stored
    return sa.select(stored).where(stored.c.owner == owner, stored.c.id.in_(ids), stored.c.time >= since)


def _stored_row(row: Any) -> StoredRow:
    return StoredRow(row.owner, row.id, row.time, bytes(row.head), bytes(row.context), bytes(row.output))


def _delete_stored(connection: sa.Connection, rows: Iterable[tuple[str, str]]) -> None:
    values = [{"of": owner, "this": row_id} for owner, row_id in rows]
    if values:
        for table, column in ((schema.stored, "id"), (schema.stored_items, "stored")):
            this = sa.delete(table).where(table.c.owner == sa.bindparam("of"))
            connection.execute(this.where(table.c[column] == sa.bindparam("this")), values)


def _delete_old_stored(connection: sa.Connection, before: float) -> None:
    stored = schema.stored
    old = sa.select(stored.c.owner, stored.c.id).where(stored.c.time < before).order_by(stored.c.owner)
    _delete_stored(connection, [(row.owner, row.id) for row in connection.execute(old)])


def _keep_bounds(
    connection: sa.Connection, most: int, most_size: int, since: float, newest: tuple[str, str]
) -> None:
    stored = schema.stored
    _delete_old_stored(connection, since)
    totals = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(stored.c.size), 0))
    count, size = connection.execute(totals.select_from(stored)).one()
    if count > most or size > most_size:
        all_rows = sa.select(stored.c.owner, stored.c.id, stored.c.size).order_by(stored.c.time)
        rows = [(row.owner, row.id, row.size) for row in connection.execute(all_rows)]
        _delete_stored(connection, sorted(choose_victims(rows, most, most_size, newest)))


def _as_json(rows: Sequence[UsageRow]) -> str:
    """Return rows as a JSON array of objects."""
    return msgspec.json.encode([dict(zip(COLUMNS, row, strict=True)) for row in rows]).decode()


def _note_batch(insert: Callable[..., Any]) -> sa.Executable:
    """Return the statement that notes the number of a batch. It returns nothing if that is not a new one."""
    writers = schema.usage_writers
    note = insert(writers)
    result: sa.Executable = note.on_conflict_do_update(
        index_elements=[writers.c.writer],
        set_={"batch": note.excluded.batch, "time": note.excluded.time},
        where=writers.c.batch < note.excluded.batch,
    ).returning(writers.c.batch)
    return result


def _add_to_days(insert: Callable[..., Any]) -> sa.Executable:
    """Return the statement that adds to the sums of days."""
    days = schema.usage_days
    add = insert(days)
    result: sa.Executable = add.on_conflict_do_update(
        index_elements=[days.c[name] for name in ("day", "key", "model", "worker")],
        set_={name: days.c[name] + add.excluded[name] for name in COUNTS},
    )
    return result


def _add_usage(engine: sa.Engine) -> str | sa.Executable:
    """Return the statement that adds rows: for SQLite as text, with values in the order of ``COLUMNS``."""
    rows = schema.usage
    if engine.dialect.name == "sqlite":
        statement = sa.insert(rows).compile(engine, column_keys=COLUMNS)
        assert tuple(statement.positiontup or ()) == COLUMNS
        return str(statement)
    record = sa.func.json_to_recordset(sa.cast(sa.bindparam("rows", sa.Text), postgresql.JSON))
    table = record.table_valued(*(sa.column(name, rows.c[name].type) for name in COLUMNS))
    return sa.insert(rows).from_select(COLUMNS, sa.select(table.render_derived(with_types=True)))


def _create_file(path: Path) -> None:
    """Create the file of a database, if there is none, for its owner only. What SQLite puts beside it is like it."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _set_up_sqlite(connection: Any, _: object) -> None:
    # Transactions are begun below, and not by the sqlite3 module, which does not begin them before it reads.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    # A key that was revoked must stay so, also if the machine loses its power.
    connection.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _set_up_postgresql(connection: Any, _: object) -> None:
    connection.execute(f"SET statement_timeout TO '{_STATEMENT_TIMEOUT}s'")
    connection.execute(f"SET lock_timeout TO '{_STATEMENT_TIMEOUT}s'")
    connection.commit()


def _setting(connection: sa.Connection, name: str) -> int:
    settings = schema.settings
    return int(connection.scalar(sa.select(settings.c.value).where(settings.c.name == name)) or 0)


def _columns(record: KeyRecord) -> dict[str, Any]:
    return attrs.asdict(record, recurse=False) | {"models": json.dumps(list(record.models))}


def _snapshot(connection: sa.Connection) -> KeySnapshot:
    # Read first: if another master changes a key meanwhile, the next look at the counter finds another number.
    changes = _setting(connection, _CHANGES)
    digests: dict[str, list[KeyDigest]] = {}
    for row in connection.execute(sa.select(schema.digests)):
        digests.setdefault(row.name, []).append(KeyDigest(row.digest, row.expires_at))
    keys = []
    for key in connection.execute(sa.select(schema.keys).order_by(schema.keys.c.name)).mappings():
        columns: dict[str, Any] = {str(name): value for name, value in key.items()}
        columns["models"] = tuple(json.loads(columns["models"]))
        keys.append((KeyRecord(**columns), digests.get(columns["name"], [])))
    return KeySnapshot(changes, bool(_setting(connection, _REQUIRED)), keys)


def _floor(moment: float) -> float:
    return moment // DAY * DAY


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d")


def _partial_days(since: float | None, until: float | None) -> list[tuple[float, float]]:
    """Return the parts of an interval that are less than a day, each within one day."""
    ends = []
    if since is not None and since != _floor(since):
        end = _floor(since) + DAY
        if until is not None and until <= end:
            return [(since, until)]
        ends.append((since, end))
    if until is not None and until != _floor(until) and (since is None or until > since):
        ends.append((_floor(until), until))
    return ends


def _sum_days(query: UsageQuery, since: float | None, until: float | None) -> sa.Select[Any]:
    """Return the statement for the sums of the days that are whole in an interval."""
    days = schema.usage_days
    groups = [days.c[name] for name in query.group_by]
    statement = sa.select(*groups, *(sa.func.sum(days.c[name]).label(name) for name in COUNTS))
    if since is not None:
        statement = statement.where(days.c.day >= _day(-_floor(-since)))
    if until is not None:
        statement = statement.where(days.c.day < _day(_floor(until)))
    if query.key is not None:
        statement = statement.where(days.c.key == query.key)
    return statement.group_by(*groups)


def _sum_rows(query: UsageQuery, begin: float, end: float) -> sa.Select[Any]:
    """Return the statement for the sums of the rows of one day, from ``begin`` until before ``end``."""
    rows = schema.usage
    groups = [rows.c[name] for name in query.group_by if name != "day"]

    def count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.sum(sa.case((condition, 1), else_=0))

    counts = {
        "requests": sa.func.count(),
        "completed": count(rows.c.outcome == "completed"),
        "failed": count(rows.c.outcome.not_in(["completed", "cancelled"])),
        "cancelled": count(rows.c.outcome == "cancelled"),
        "prompt_tokens": sa.func.sum(rows.c.prompt_tokens),
        "completion_tokens": sa.func.sum(rows.c.completion_tokens),
        "cached_tokens": sa.func.sum(rows.c.cached_tokens),
        "usage_unknown": count(sa.and_(rows.c.prompt_tokens.is_(None), rows.c.completion_tokens.is_(None))),
    }
    statement = sa.select(*groups, *(counts[name].label(name) for name in COUNTS))
    statement = statement.where(rows.c.time >= begin, rows.c.time < end)
    if query.key is not None:
        statement = statement.where(rows.c.key == query.key)
    return statement.group_by(*groups)


def _merge(
    sums: dict[tuple[str, ...], list[int]], query: UsageQuery, row: Mapping[Any, Any], day: str | None
) -> None:
    """Add a row of sums to its group.

    Args:
        sums: all groups.
        query: says which these are.
        row: the sums of one group; without any group, they may be NULL.
        day: the day that the row is of, if the row does not say so.
    """
    if not row["requests"]:
        return
    group = tuple(day if name == "day" and day is not None else row[name] for name in query.group_by)
    total = sums.setdefault(group, [0] * len(COUNTS))
    for index, name in enumerate(COUNTS):
        # PostgreSQL has decimal numbers for the sums of large ones.
        total[index] += int(row[name] or 0)

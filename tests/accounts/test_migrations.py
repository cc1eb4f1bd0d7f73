"""The steps from one version of the schema to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from trio_cluster.accounts import migrations, schema
from trio_cluster.accounts.audit import AuditEntry
from trio_cluster.accounts.keys import KeyRecord, digest_of
from trio_cluster.accounts.store import Store


def described(inspector: sa.Inspector, table: str) -> dict[str, Any]:
    """Return what the database says of a table, so that two can be compared."""
    return {
        "columns": [
            (column["name"], str(column["type"]), column["nullable"])
            for column in inspector.get_columns(table)
        ],
        "key": inspector.get_pk_constraint(table)["constrained_columns"],
        "indexes": sorted(str(index["column_names"]) for index in inspector.get_indexes(table)),
        "unique": sorted(str(each["column_names"]) for each in inspector.get_unique_constraints(table)),
    }


def open_at(database: str | Path, version: int, monkeypatch: pytest.MonkeyPatch) -> Store:
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:version])
        if version < len(migrations.MIGRATIONS):
            # The tables of usage and audit are not there yet.
            patched.setattr(Store, "_add_audit", lambda *_: None)
        return Store(database)


@pytest.mark.parametrize("version", range(len(migrations.MIGRATIONS) + 1))
def test_a_database_of_every_version_becomes_what_the_schema_says(
    version: int, database: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_at(database, version, monkeypatch).close()
    store = Store(database)
    inspector = sa.inspect(store._engine)
    made = {table: described(inspector, table) for table in inspector.get_table_names()}
    with store._engine.connect() as connection, connection.begin():
        schema.metadata.drop_all(connection)
        schema.metadata.create_all(connection)
    inspector = sa.inspect(store._engine)
    wanted = {table: described(inspector, table) for table in inspector.get_table_names()}
    assert made == wanted
    store.close()


def test_keys_of_the_first_version_are_still_there(
    database: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = AuditEntry(action="key.create", target="a", principal="", address="")
    record = KeyRecord(name="a", models=("m",), created_at=5.0)
    old = open_at(database, 1, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(Store, "_add_audit", lambda *_: None)
        old.add_key(record, digest_of(b"k"), entry)
    old.close()
    store = Store(database)
    snapshot = store.load_keys()
    assert [each for each, _ in snapshot.keys] == [record]
    assert snapshot.required
    store.add_audit([entry])
    store.close()


def test_a_step_that_fails_changes_nothing(database: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_at(database, 1, monkeypatch).close()

    def fail(connection: sa.Connection) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        steps = (*migrations.MIGRATIONS[:2], fail, *migrations.MIGRATIONS[2:])
        patched.setattr(migrations, "MIGRATIONS", steps)
        with pytest.raises(ZeroDivisionError):
            Store(database)
    old = open_at(database, 1, monkeypatch)
    assert sorted(sa.inspect(old._engine).get_table_names()) == ["tc_key_digests", "tc_keys", "tc_settings"]
    old.close()

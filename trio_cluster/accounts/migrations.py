"""The steps from one version of the database's schema to the next.

Theory of operation
===================

The database says in ``tc_settings`` which version its schema has; version N is what the first N steps make. A store
that is opened applies the steps that are missing, in one transaction, under a lock: of two masters that are started at
once, the second one waits and finds nothing left to do. A database of a later version than this package knows is
refused.

A step that was released is never changed. So it does not use ``schema.py``, which has the tables as they are after the
last step, but spells out what it adds. ``tests/accounts/test_migrations.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import sqlalchemy as sa

__all__ = ["MIGRATIONS", "SchemaTooNew", "migrate"]

#: The key of the lock that masters with one PostgreSQL database take in turns; any number that others do not use.
_LOCK: Final = 0x7472696F

_VERSION: Final = "schema_version"


class SchemaTooNew(Exception):
    """The database was made by a later version of this package."""


def migrate(connection: sa.Connection, steps: Sequence[Callable[[sa.Connection], None]] | None = None) -> int:
    """Apply the steps that are missing, and return how many there were. Blocks.

    Args:
        connection: in a transaction that may write; nothing is committed here.
        steps: all steps; those of this package if ``None``.

    Raises:
        SchemaTooNew: the database has a version that is not known here.
    """
    steps = MIGRATIONS if steps is None else steps
    if connection.dialect.name == "postgresql":
        # SQLite locks the whole database for a transaction that writes.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    settings = _settings(sa.MetaData())
    if not sa.inspect(connection).has_table(settings.name):
        settings.create(connection)
    version = connection.scalar(sa.select(settings.c.value).where(settings.c.name == _VERSION)) or 0
    if version > len(steps):
        raise SchemaTooNew(f"its schema has version {version}, and this program knows {len(steps)}")
    for step in steps[version:]:
        step(connection)
    if version < len(steps):
        connection.execute(settings.delete().where(settings.c.name == _VERSION))
        connection.execute(settings.insert().values(name=_VERSION, value=len(steps)))
    return len(steps) - version


def _settings(metadata: sa.MetaData) -> sa.Table:
    return sa.Table(
        "tc_settings",
        metadata,
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )


def _add_keys(connection: sa.Connection) -> None:
    metadata = sa.MetaData()
    sa.Table(
        "tc_keys",
        metadata,
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("models", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("max_concurrency", sa.BigInteger),
        sa.Column("budget_tokens", sa.BigInteger),
        sa.Column("budget_per", sa.Text, nullable=False),
        sa.Column("priority", sa.Text, nullable=False),
        sa.Column("weight", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53)),
        sa.Column("disabled", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
    sa.Table(
        "tc_key_digests",
        metadata,
        sa.Column("digest", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, index=True),
        sa.Column("expires_at", sa.Float(53)),
    )
    metadata.create_all(connection)


def _add_usage(connection: sa.Connection) -> None:
    metadata = sa.MetaData()
    counts = [
        "requests",
        "completed",
        "failed",
        "cancelled",
        "prompt_tokens",
        "completion_tokens",
        "cached_tokens",
        "usage_unknown",
    ]
    sa.Table(
        "tc_usage",
        metadata,
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("time", sa.Float(53), nullable=False, index=True),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("key", "model", "alias", "worker", "route")),
        *(sa.Column(name, sa.BigInteger) for name in ("prompt_tokens", "completion_tokens", "cached_tokens")),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("first_byte", sa.Float(53)),
        sa.Column("duration", sa.Float(53), nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
    )
    sa.Table(
        "tc_usage_days",
        metadata,
        *(sa.Column(name, sa.Text, primary_key=True) for name in ("day", "key", "model", "worker")),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in counts),
    )
    sa.Table(
        "tc_usage_writers",
        metadata,
        sa.Column("writer", sa.Text, primary_key=True),
        sa.Column("batch", sa.BigInteger, nullable=False),
        sa.Column("time", sa.Float(53), nullable=False),
    )
    metadata.create_all(connection)


def _add_audit(connection: sa.Connection) -> None:
    metadata = sa.MetaData()
    sa.Table(
        "tc_audit",
        metadata,
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("entry", sa.Text, nullable=False, unique=True),
        sa.Column("time", sa.Float(53), nullable=False),
        *(
            sa.Column(name, sa.Text, nullable=False)
            for name in ("principal", "address", "action", "target", "details")
        ),
    )
    metadata.create_all(connection)


def _add_stored(connection: sa.Connection) -> None:
    metadata = sa.MetaData()
    sa.Table(
        "tc_stored",
        metadata,
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("time", sa.Float(53), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.LargeBinary, nullable=False) for name in ("head", "context", "output")),
        sa.Index("tc_stored_by_time", "time", "size", "owner", "id"),
    )
    sa.Table(
        "tc_stored_items",
        metadata,
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("item", sa.Text, primary_key=True),
        sa.Column("stored", sa.Text, nullable=False),
        sa.Index("tc_stored_items_by_stored", "owner", "stored"),
    )
    metadata.create_all(connection)


#: All steps, oldest first.
MIGRATIONS: Final[tuple[Callable[[sa.Connection], None], ...]] = (
    _add_keys,
    _add_usage,
    _add_audit,
    _add_stored,
)

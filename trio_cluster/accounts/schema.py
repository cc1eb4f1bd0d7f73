"""The tables of the database, as they are after the last migration.

This module imports SQLAlchemy, and so do ``migrations.py`` and ``store.py``. They are loaded when a store is opened,
and not before: a worker never needs them.

All names begin with ``tc_``, since a PostgreSQL database may have tables of other programs as well. Times are seconds
since the epoch. Text is not limited in its length: what is stored is bounded where it enters the node.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

__all__ = [
    "audit",
    "digests",
    "keys",
    "metadata",
    "settings",
    "stored",
    "stored_items",
    "usage",
    "usage_days",
    "usage_writers",
]

metadata: Final = sa.MetaData()

#: A primary key that the database counts up. SQLite does so only for columns of the type INTEGER.
_Number: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

#: Single numbers: ``schema_version``; ``key_changes``, which is counted up whenever a key is changed, so that other
#: masters notice; and ``keys_required``, which is 1 from the first key on.
settings: Final = sa.Table(
    "tc_settings",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

keys: Final = sa.Table(
    "tc_keys",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("models", sa.Text, nullable=False),  # a JSON array
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

#: The SHA-256 digests of the keys, in hexadecimal. A key that was rotated has two for a while.
digests: Final = sa.Table(
    "tc_key_digests",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, index=True),
    sa.Column("expires_at", sa.Float(53)),
)

#: One row for each request. Tokens are NULL if they are not known.
usage: Final = sa.Table(
    "tc_usage",
    metadata,
    sa.Column("id", _Number, primary_key=True),
    sa.Column("time", sa.Float(53), nullable=False, index=True),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("alias", sa.Text, nullable=False),
    sa.Column("worker", sa.Text, nullable=False),
    sa.Column("route", sa.Text, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger),
    sa.Column("completion_tokens", sa.BigInteger),
    sa.Column("cached_tokens", sa.BigInteger),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("first_byte", sa.Float(53)),
    sa.Column("duration", sa.Float(53), nullable=False),
    sa.Column("request_id", sa.Text, nullable=False),
)

#: The sums of the rows of each day (UTC). They stay when the rows are deleted.
usage_days: Final = sa.Table(
    "tc_usage_days",
    metadata,
    sa.Column("day", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("worker", sa.Text, primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("completed", sa.BigInteger, nullable=False),
    sa.Column("failed", sa.BigInteger, nullable=False),
    sa.Column("cancelled", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("usage_unknown", sa.BigInteger, nullable=False),
)

#: The number of the last batch of rows that each process has written. It tells a process whose connection broke in the
#: middle of a commit whether the batch is there.
usage_writers: Final = sa.Table(
    "tc_usage_writers",
    metadata,
    sa.Column("writer", sa.Text, primary_key=True),
    sa.Column("batch", sa.BigInteger, nullable=False),
    sa.Column("time", sa.Float(53), nullable=False),
)

audit: Final = sa.Table(
    "tc_audit",
    metadata,
    sa.Column("id", _Number, primary_key=True),
    # Made by the node that writes the entry, so that an entry that is written again is not there twice.
    sa.Column("entry", sa.Text, nullable=False, unique=True),
    sa.Column("time", sa.Float(53), nullable=False),
    sa.Column("principal", sa.Text, nullable=False),
    sa.Column("address", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("details", sa.Text, nullable=False),  # a JSON object
)

#: Stored responses and conversations, each complete with its input, as JSON.
stored: Final = sa.Table(
    "tc_stored",
    metadata,
    # The name of the key, a line feed, and when the key was made.
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("time", sa.Float(53), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),  # an object without its items
    sa.Column("context", sa.LargeBinary, nullable=False),  # an array of items: the input
    sa.Column("output", sa.LargeBinary, nullable=False),  # an array of items
    # What the bounds need is in the index, so that the large columns are not read.
    sa.Index("tc_stored_by_time", "time", "size", "owner", "id"),
)

#: In which of them an item is.
stored_items: Final = sa.Table(
    "tc_stored_items",
    metadata,
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("item", sa.Text, primary_key=True),
    sa.Column("stored", sa.Text, nullable=False),
    sa.Index("tc_stored_items_by_stored", "owner", "stored"),
)

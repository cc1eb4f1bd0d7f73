"""Records in the database, where several masters find them.

A record is one row, complete with its input. Several rows share nothing: in a chain of responses each row repeats what
the one before it has.

The bounds are those of the whole database. Counting needs a look at all rows, so it is not done for each record that is
stored, but when this node has stored a hundredth of what there may be since it last looked. So the bounds may be
exceeded by a hundredth for each master.

If the database is away, an answer goes out all the same, and is not stored. It waits for :data:`PUT_TIMEOUT` seconds at
most, and for :data:`PAUSE` seconds after a failure, no answer waits. An answer that is not waited for any longer is not
stored later either: its transaction is rolled back, unless it is being committed at that moment.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import msgspec
import trio

from ..accounts.accounts import Accounts
from ..accounts.errors import StoreError
from ..accounts.stored_row import Bounds, Growth, StoredRow
from ..options import ClusterServerOptions
from .record import Item, Record

if TYPE_CHECKING:
    from ..accounts.store import Store

__all__ = ["GET_TIMEOUT", "PAUSE", "PUT_TIMEOUT", "DatabaseResponses"]

logger = logging.getLogger("trio_cluster.accounts")

T = TypeVar("T")

#: Seconds that an answer waits for the database to store it.
PUT_TIMEOUT: Final = 2.0
#: Seconds that a request waits for what it refers to.
GET_TIMEOUT: Final = 5.0
#: Seconds after a failure in which nothing is stored.
PAUSE: Final = 5.0

#: Seconds between two deletions of expired records.
_CLEANUP: Final = 600.0

#: A look at the bounds is due when so large a part of them was stored since the last one.
_SHARE: Final = 0.01

_items: Final = msgspec.json.Decoder(list[msgspec.Raw])


class _Identified(msgspec.Struct):
    id: str = ""


_identified: Final = msgspec.json.Decoder(_Identified)


class DatabaseResponses:
    """See ``ResponseStore``, and the top of this module. All methods are checkpoints.

    Args:
        accounts: those of the node, with the database.
        options: read at the time of use.
    """

    def __init__(self, accounts: Accounts, options: ClusterServerOptions) -> None:
        self._accounts = accounts
        self._options = options
        self._resumes_at = -1.0
        self._failing = False
        # A look is due at the start: the options may have been changed since.
        self._new_count = options.stored_responses
        self._new_size = 0

    async def run(self) -> NoReturn:
        """Delete records that have expired, from time to time, until cancelled."""
        while True:
            # If it fails it is tried again. A request that stores something logs that the database is away.
            with suppress(StoreError):
                await self._accounts.with_store(lambda store: store.delete_old_stored(self._since))
            await trio.sleep(min(_CLEANUP, self._options.stored_responses_lifetime))

    @property
    def enabled(self) -> bool:
        """See ``ResponseStore``."""
        return self._options.stored_responses > 0

    async def put(self, owner: str, record: Record) -> bool:
        """See ``ResponseStore``."""
        row = self._row(owner, record)
        if row is None:
            return False
        ids, bounds = _ids(record), self._due(row.size)
        return bool(await self._store(lambda store, wanted: store.put_stored(row, ids, None, bounds, wanted)))

    async def put_answer(
        self, owner: str, record: Record | None, conversation: str | None, items: Iterable[Item]
    ) -> None:
        """See ``ResponseStore``."""
        row = None if record is None else self._row(owner, record)
        growth = None if conversation is None else self._growth(owner, conversation, items)
        if row is None and growth is None:
            return
        ids = () if record is None else _ids(record)
        bounds = self._due((0 if row is None else row.size) + (0 if growth is None else len(growth.array)))
        await self._store(lambda store, wanted: store.put_stored(row, ids, growth, bounds, wanted))

    async def get(self, owner: str, record_id: str) -> Record | None:
        """See ``ResponseStore``."""
        row = await self._fetch(lambda store: store.get_stored(owner, record_id, self._since))
        return None if row is None else _record(row)

    async def delete(self, owner: str, record_id: str) -> bool:
        """See ``ResponseStore``."""
        return await self._fetch(lambda store: store.delete_stored(owner, record_id, self._since))

    async def find_items(self, owner: str, ids: Sequence[str]) -> dict[str, Item]:
        """See ``ResponseStore``."""
        rows = await self._fetch(lambda store: store.find_stored(owner, ids, self._since))
        wanted = set(ids)
        found: dict[str, Item] = {}
        for row in rows:
            record = _record(row)
            found |= {item.id: item for item in (*record.context, *record.output) if item.id in wanted}
        return found

    async def extend(self, owner: str, record_id: str, items: Iterable[Item]) -> bool:
        """See ``ResponseStore``."""
        growth = self._growth(owner, record_id, items)
        bounds = self._due(len(growth.array))
        return bool(
            await self._store(lambda store, wanted: store.put_stored(None, (), growth, bounds, wanted))
        )

    async def change(self, owner: str, record_id: str, change: Callable[[Record], Record]) -> bool:
        """See ``ResponseStore``."""
        now, since = time.time(), self._since

        def change_row(row: StoredRow) -> StoredRow:
            return _row(owner, change(_record(row)), now)

        return bool(
            await self._store(
                lambda store, wanted: store.change_stored(owner, record_id, since, change_row, wanted)
            )
        )

    def _row(self, owner: str, record: Record) -> StoredRow | None:
        """Return a record as a row; ``None`` if it is larger than all may be together."""
        row = _row(owner, record, time.time())
        return None if row.size > self._options.stored_responses_size else row

    def _growth(self, owner: str, record_id: str, items: Iterable[Item]) -> Growth:
        added = tuple(items)
        return Growth(owner, record_id, _array(added), [item.id for item in added], time.time(), self._since)

    @property
    def _since(self) -> float:
        """The time of the oldest record that has not expired."""
        return time.time() - self._options.stored_responses_lifetime

    def _due(self, size: int) -> Bounds | None:
        """Return the bounds if a look at them is due, with ``size`` more bytes; ``None`` if not."""
        options = self._options
        self._new_count += 1
        self._new_size += size
        if (
            self._new_count < options.stored_responses * _SHARE
            and self._new_size < options.stored_responses_size * _SHARE
        ):
            return None
        self._new_count = self._new_size = 0
        return options.stored_responses, options.stored_responses_size, self._since

    async def _store(self, function: Callable[[Store, Callable[[], bool]], T]) -> T | None:
        """Call a function that stores something; ``None`` if that is not possible now.

        Args:
            function: called in a thread, with the database, and with a function that returns whether the caller still
                waits. The thread cannot be stopped, so it must ask that before it commits: what was logged as not
                stored must not be there later, and neither must an answer whose client has left.
        """
        now = trio.current_time()
        if self._failing and now < self._resumes_at:
            return None
        waits = True
        try:
            with trio.move_on_after(PUT_TIMEOUT):
                done = await self._accounts.with_store(lambda store: function(store, lambda: waits))
                if self._failing:
                    self._failing = False
                    logger.warning("responses are stored again")
                return done
            raise StoreError(f"the database has not answered for {PUT_TIMEOUT:g} seconds")
        except StoreError as error:
            if not self._failing:
                logger.error("responses are not stored: %s", error)
            self._failing = True
            self._resumes_at = trio.current_time() + PAUSE
            return None
        finally:
            waits = False

    async def _fetch(self, function: Callable[[Store], T]) -> T:
        with trio.move_on_after(GET_TIMEOUT):
            return await self._accounts.with_store(function)
        raise StoreError(f"the database has not answered for {GET_TIMEOUT:g} seconds")


def _array(items: Iterable[Item]) -> bytes:
    return b"[" + b",".join(item.json for item in items) + b"]"


def _ids(record: Record) -> list[str]:
    return [item.id for item in (*record.context, *record.output)]


def _row(owner: str, record: Record, now: float) -> StoredRow:
    return StoredRow(owner, record.id, now, record.head, _array(record.context), _array(record.output))


def _record(row: StoredRow) -> Record:
    return Record(row.id, row.head, _read(row.context), _read(row.output))


def _read(array: bytes) -> tuple[Item, ...]:
    raw: list[Any] = _items.decode(array)
    return tuple(Item(_identified.decode(each).id, bytes(each)) for each in raw)

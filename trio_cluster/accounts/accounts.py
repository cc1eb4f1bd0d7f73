"""The accounts of a node: its keys, the usage journal and the audit log, on one database.

All work with the database is done in threads. There are three lanes for it, each with its own limit: writing, one
thread at a time; reading, so that a long report delays neither the next batch of the journal nor the look for keys that
another master has changed; and a lane for stored responses, for which answers wait.

Keys are changed under a lock, which is held until the table in memory is the new one. So the node that changes a key
applies the change when its caller learns of it. Other masters look for changes every :data:`LOOK` seconds.

If the database cannot be reached, the node goes on with the keys that it knows, and keeps what it cannot write.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio

from ..core.limits import CLOSE_TIMEOUT
from ..core.observer import Observers
from ..core.principal import Principal
from ..core.threads import NoThread, run_in_thread, start_in_thread
from ..errors import ApiError
from .audit import AuditEntry, AuditLog
from .errors import StoreError
from .fields import show_time
from .journal import PAUSE, Journal
from .keys import KeyRecord, KeyTable, digest_of, new_key
from .usage_row import UsageQuery, UsageRow

if TYPE_CHECKING:
    from .store import KeySnapshot, Store

__all__ = ["LOOK", "Accounts", "open_accounts"]

logger = logging.getLogger("trio_cluster.accounts")

T = TypeVar("T")

#: Seconds between two looks for keys that another master has changed.
LOOK: Final = 1.0

#: Threads that may read at once.
_READERS: Final = 3

#: Threads that may work for stored responses at once.
_STORERS: Final = 2

#: Seconds between two deletions of old rows.
_CLEANUP: Final = 3600.0
_DAY: Final = 86_400


def _nothing(_: str) -> None:
    pass


class Accounts:
    """What a node knows of keys and usage. Made by :func:`open_accounts`.

    Args:
        store: the database.
        audit: the audit log, whose entries are to be stored.
        usage_days: returns for how many days rows of the journal are kept.

    Attributes:
        table: the keys that are valid on this node.
        journal: observes the node's calls.
        audit: as given.
        on_revoked: called with the name of each key that is gone. Synchronous.
    """

    def __init__(self, store: Store, audit: AuditLog, usage_days: Callable[[], int]) -> None:
        self.table = KeyTable()
        self.journal = Journal(self._write_usage)
        self.audit = audit
        self.on_revoked: Callable[[str], None] = _nothing
        self._store = store
        self._usage_days = usage_days
        self._writing = trio.CapacityLimiter(1)
        self._reading = trio.CapacityLimiter(_READERS)
        self._storing = trio.CapacityLimiter(_STORERS)
        self._changing = trio.Lock()
        self._flushing = trio.Lock()
        self._records: dict[str, KeyRecord] = {}
        self._changes: int | None = None

    # Keys

    @property
    def records(self) -> list[KeyRecord]:
        """All keys, sorted by name."""
        return [self._records[name] for name in sorted(self._records)]

    def record(self, name: str) -> KeyRecord:
        """Return a key.

        Raises:
            ApiError: 404: there is none of this name.
        """
        try:
            return self._records[name]
        except KeyError:
            raise ApiError(404, f"There is no key '{name}'", code="key_not_found") from None

    async def create_key(self, record: KeyRecord, principal: Principal, address: str) -> str:
        """Make a key, and return it. It is kept nowhere.

        Args:
            record: its name and its fields.
            principal: who makes it.
            address: from where.

        Raises:
            ApiError: 409: the name is taken.
            StoreError: it cannot be stored.
        """
        key = new_key()
        entry = _entry(principal, address, "key.create", record.name, _details(record))
        await self._change(lambda store: store.add_key(record, digest_of(key.encode()), entry), entry)
        return key

    async def change_key(
        self, name: str, changes: Mapping[str, Any], principal: Principal, address: str
    ) -> KeyRecord:
        """Change fields of a key, and return it as it is then.

        Raises:
            ApiError: 404: there is none of this name.
            StoreError: it cannot be stored.
        """
        self.record(name)
        entry = _entry(principal, address, "key.change", name, _shown(changes))
        await self._change(lambda store: store.change_key(name, changes, entry), entry)
        return self.record(name)

    async def revoke_key(self, name: str, principal: Principal, address: str) -> None:
        """Delete a key; it is unknown from now on.

        Raises:
            ApiError: 404: there is none of this name.
            StoreError: it cannot be stored.
        """
        self.record(name)
        entry = _entry(principal, address, "key.revoke", name, {})
        await self._change(lambda store: store.remove_key(name, entry), entry)

    async def rotate_key(self, name: str, grace: float, principal: Principal, address: str) -> str:
        """Replace a key by a new one with the same name and fields, and return it.

        Args:
            name: of the key.
            grace: for how many seconds the old one is valid beside it.
            principal: who rotates it.
            address: from where.

        Raises:
            ApiError: 404: there is none of this name.
            StoreError: it cannot be stored.
        """
        self.record(name)
        key = new_key()
        entry = _entry(principal, address, "key.rotate", name, {"grace": grace})
        until = time.time() + grace
        await self._change(lambda store: store.rotate_key(name, digest_of(key.encode()), until, entry), entry)
        return key

    # Usage and audit

    async def usage(self, query: UsageQuery) -> list[dict[str, Any]]:
        """Return the sums of each group, with all requests of this node that are over.

        Raises:
            StoreError: the database cannot be reached.
        """
        await self._flush()
        return await self._read(lambda store: store.sum_usage(query))

    async def audit_entries(self, limit: int) -> list[AuditEntry]:
        """Return the last entries of the audit log, newest first.

        Raises:
            StoreError: the database cannot be reached.
        """
        await self._flush()
        return await self._read(lambda store: store.load_audit(limit))

    # Stored responses

    async def with_store(self, function: Callable[[Store], T]) -> T:
        """Call a function with the database in a thread, in the lane of stored responses, and return what it returns.

        A checkpoint. If it is cancelled, the thread may go on until its statement is done.

        Raises:
            StoreError: the database cannot be reached.
        """
        return await self._in_thread(function, self._storing, abandon=True)

    # Running

    async def load(self) -> None:
        """Read all keys.

        Raises:
            StoreError: the database cannot be reached.
        """
        async with self._changing:
            self._take(await self._read(lambda store: store.load_keys()))

    async def run(self) -> None:
        """Write what is collected, and look for changed keys, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_repeatedly)
            nursery.start_soon(self._look_repeatedly)
            nursery.start_soon(self._clean_up_repeatedly)

    async def close(self) -> None:
        """Write what is left, for a limited time, and close the database. Not affected by cancellation."""
        with trio.CancelScope(shield=True):
            self.journal.take_undecided()
            with trio.move_on_after(CLOSE_TIMEOUT), suppress(StoreError):
                await self._flush()
            if left := self.journal.waiting:
                logger.error("the usage of the last requests is lost", extra={"fields": {"requests": left}})
            with trio.move_on_after(CLOSE_TIMEOUT):
                # Threads that were abandoned still use connections, which would not be closed.
                for limiter in (self._writing, self._reading, self._storing):
                    for _ in range(int(limiter.total_tokens)):
                        await limiter.acquire_on_behalf_of(object())
            self._store.close()

    async def _write_repeatedly(self) -> None:
        while True:
            await trio.sleep(PAUSE)
            self.journal.take_decided()
            with suppress(StoreError):
                await self._flush()

    async def _look_repeatedly(self) -> None:
        failing = False
        while True:
            await trio.sleep(LOOK)
            try:
                if await self._read(lambda store: store.count_key_changes()) != self._changes:
                    await self.load()
            except StoreError as error:
                if not failing:
                    logger.error("changes of keys by other masters are not noticed: %s", error)
                failing = True
            else:
                if failing:
                    logger.warning("changes of keys by other masters are noticed again")
                failing = False

    async def _clean_up_repeatedly(self) -> None:
        while True:
            # What fails is tried again; the other two tasks log that the database is away.
            with suppress(StoreError):
                await self._write(self._delete_usage)
            await trio.sleep(_CLEANUP)

    def _delete_usage(self, store: Store) -> None:
        store.delete_usage(math.floor(time.time() / _DAY - self._usage_days()) * _DAY)

    async def _flush(self) -> None:
        async with self._flushing:
            await self.journal.flush()
            waiting = self.audit.waiting
            if waiting:
                entries = list(waiting)
                await self._write(lambda store: store.add_audit(entries))
                for entry in entries:
                    # More may have come, and pushed the oldest ones out.
                    if waiting and waiting[0] is entry:
                        waiting.popleft()

    async def _write_usage(self, writer: str, number: int, rows: list[UsageRow]) -> None:
        await self._write(lambda store: store.add_usage(writer, number, rows))

    async def _change(self, change: Callable[[Store], KeySnapshot | None], entry: AuditEntry) -> None:
        async with self._changing:
            # Once begun, it is not given up: nobody would know whether the key is there.
            with trio.CancelScope(shield=True):
                snapshot = await self._in_thread(change, self._writing, abandon=False)
            if snapshot is None:
                # Another master has deleted the key.
                raise ApiError(404, f"There is no key '{entry.target}'", code="key_not_found")
            self._take(snapshot)
        self.audit.log(entry)

    def _take(self, snapshot: KeySnapshot) -> None:
        self.table.replace(snapshot.keys, required=snapshot.required)
        records = {record.name: record for record, _ in snapshot.keys}
        for name, record in self._records.items():
            if name not in records or records[name].created_at != record.created_at:
                self.on_revoked(name)
        self._records = records
        self._changes = snapshot.changes

    async def _read(self, function: Callable[[Store], T]) -> T:
        return await self._in_thread(function, self._reading, abandon=True)

    async def _write(self, function: Callable[[Store], T]) -> T:
        return await self._in_thread(function, self._writing, abandon=True)

    async def _in_thread(
        self, function: Callable[[Store], T], limiter: trio.CapacityLimiter, *, abandon: bool
    ) -> T:
        try:
            return await run_in_thread(function, self._store, limiter=limiter, abandon_on_cancel=abandon)
        except NoThread as error:
            # For the tasks that keep the accounts that is what any other failure of the database is.
            raise StoreError(f"the database cannot be asked: {error.message}") from error


@asynccontextmanager
async def open_accounts(
    database: str | Path, audit: AuditLog, observers: Observers, usage_days: Callable[[], int]
) -> AsyncIterator[Accounts]:
    """Open a database, and read its keys. Within the block, calls are written down; :meth:`Accounts.run` must run.

    Args:
        database: see ``Store``.
        audit: its entries are stored from now on.
        observers: those of the node's calls.
        usage_days: returns for how many days rows of the journal are kept.

    Raises:
        StoreError: the database cannot be opened, or not be written.
    """

    def open_store() -> Store:
        # SQLAlchemy takes a third of a second to import.
        module = importlib.import_module(".store", __package__)
        store: Store = module.Store(database)
        return store

    store = await start_in_thread(open_store)
    accounts = Accounts(store, audit, usage_days)
    try:
        await accounts.load()
        audit.keep()
        observers.add(accounts.journal)
    except BaseException:
        store.close()
        raise
    try:
        yield accounts
    finally:
        observers.remove(accounts.journal)
        with trio.move_on_after(2 * CLOSE_TIMEOUT, shield=True):
            await accounts.close()
        audit.keep_no_longer()


def _entry(
    principal: Principal, address: str, action: str, target: str, details: Mapping[str, Any]
) -> AuditEntry:
    return AuditEntry(
        action=action, target=target, principal=principal.name, address=address, details=details
    )


def _details(record: KeyRecord) -> dict[str, Any]:
    """Return what a new key may do, for the audit log."""
    details: dict[str, Any] = {"role": record.role}
    if record.models:
        details["models"] = list(record.models)
    if record.expires_at is not None:
        details["expires_at"] = show_time(record.expires_at)
    return details


def _shown(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes of a key as values that JSON has."""
    shown = dict(changes)
    if "models" in shown:
        shown["models"] = list(shown["models"])
    if shown.get("expires_at") is not None:
        shown["expires_at"] = show_time(shown["expires_at"])
    return shown

"""Records in the memory of one process.

Theory of operation
===================

*Sharing.* A conversation of n turns is stored n times, each time longer by one. So the records of an owner share their
items: an item with the same id and the same content is kept once. It is counted once as well, and freed with the last
record that has it.

*Bounds.* What a record and an item take in memory is their text and a constant for the objects around it. If records
are too many, the oldest one of the owner who has most is dropped; if they are too large, that of the owner whose
records take most. So a key that stores a lot displaces its own records before those of others. The record that has just
been stored is never the one.

*Time.* Records are in the order in which they expire. :meth:`MemoryResponses.run` drops the first one when its time has
come, also if no request comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NoReturn

import attrs
import trio

from ..options import ClusterServerOptions
from .record import Item, Record

__all__ = ["MemoryResponses"]

#: Bytes that an item takes besides its text: the object, its strings, and its place in a table.
_ITEM: Final = 420
#: Bytes that a record takes besides its text, and besides the references to its items.
_RECORD: Final = 900
_REFERENCE: Final = 8


@attrs.define(eq=False)
class _Entry:
    record: Record
    stored_at: float
    """By the clock of trio."""


class _Owner:
    """The records of one owner.

    Attributes:
        entries: oldest first.
        items: the newest item of each id.
        size: bytes that all of it takes.
    """

    __slots__ = ("entries", "items", "size")

    def __init__(self) -> None:
        self.entries: OrderedDict[str, _Entry] = OrderedDict()
        self.items: dict[str, Item] = {}
        self.size = 0

    def add(self, record: Record, now: float) -> _Entry:
        context, output = self._share(record.context), self._share(record.output)
        record = attrs.evolve(record, context=context, output=output)
        self.size += _own_size(record)
        entry = self.entries[record.id] = _Entry(record, now)
        return entry

    def remove(self, record_id: str) -> None:
        record = self.entries.pop(record_id).record
        self.size -= _own_size(record)
        for items in (record.context, record.output):
            for item in items:
                item.uses -= 1
                if not item.uses:
                    self.size -= _item_size(item)
                    if self.items.get(item.id) is item:
                        del self.items[item.id]

    def _share(self, items: tuple[Item, ...]) -> tuple[Item, ...]:
        """Return the items, each as the object that other records have already if they have it."""
        shared = []
        for item in items:
            known = self.items.get(item.id)
            if known is None or known.json != item.json:
                if item.uses == 0:
                    self.size += _item_size(item)
                known = self.items[item.id] = item
            known.uses += 1
            shared.append(known)
        return tuple(shared)


class MemoryResponses:
    """See ``ResponseStore``, and the top of this module. No method is a checkpoint, and none raises ``StoreError``.

    Args:
        options: read at the time of use.
    """

    def __init__(self, options: ClusterServerOptions) -> None:
        self._options = options
        self._owners: dict[str, _Owner] = {}
        # Of all owners, in the order in which they expire.
        self._order: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._size = 0
        self._filled = trio.Event()

    @property
    def enabled(self) -> bool:
        """See ``ResponseStore``."""
        return self._options.stored_responses > 0

    @property
    def count(self) -> int:
        """How many records there are."""
        return len(self._order)

    @property
    def size(self) -> int:
        """How many bytes they take."""
        return self._size

    async def run(self) -> NoReturn:
        """Drop records when they expire, until cancelled."""
        while True:
            if not self._order:
                self._filled = trio.Event()
                await self._filled.wait()
            first = next(iter(self._order.values()))
            await trio.sleep_until(first.stored_at + self._options.stored_responses_lifetime)
            self._expire()

    async def put(self, owner: str, record: Record) -> bool:
        """See ``ResponseStore``."""
        self._expire()
        most = self._options.stored_responses_size
        if not self.enabled or _whole_size(record) > most:
            return False
        self._remove(owner, record.id)
        self._add(owner, record)
        while len(self._order) > self._options.stored_responses or self._size > most:
            if not self._evict(owner, record.id, by_size=self._size > most):
                break
        return True

    async def get(self, owner: str, record_id: str) -> Record | None:
        """See ``ResponseStore``."""
        self._expire()
        owned = self._owners.get(owner)
        entry = None if owned is None else owned.entries.get(record_id)
        return None if entry is None else entry.record

    async def delete(self, owner: str, record_id: str) -> bool:
        """See ``ResponseStore``."""
        self._expire()
        return self._remove(owner, record_id)

    async def find_items(self, owner: str, ids: Sequence[str]) -> dict[str, Item]:
        """See ``ResponseStore``."""
        self._expire()
        owned = self._owners.get(owner)
        return {} if owned is None else {each: owned.items[each] for each in ids if each in owned.items}

    async def extend(self, owner: str, record_id: str, items: Iterable[Item]) -> bool:
        """See ``ResponseStore``."""
        record = await self.get(owner, record_id)
        if record is None:
            return False
        return await self.put(owner, attrs.evolve(record, context=(*record.context, *items)))

    async def put_answer(
        self, owner: str, record: Record | None, conversation: str | None, items: Iterable[Item]
    ) -> None:
        """See ``ResponseStore``."""
        if record is not None:
            await self.put(owner, record)
        if conversation is not None:
            await self.extend(owner, conversation, items)

    async def change(self, owner: str, record_id: str, change: Callable[[Record], Record]) -> bool:
        """See ``ResponseStore``."""
        record = await self.get(owner, record_id)
        return record is not None and await self.put(owner, change(record))

    def forget(self, name: str) -> None:
        """Drop all records of the keys of a name. Synchronous."""
        for owner in [each for each in self._owners if each == name or each.startswith(name + "\n")]:
            for record_id in list(self._owners[owner].entries):
                self._remove(owner, record_id)

    def _add(self, owner: str, record: Record) -> None:
        owned = self._owners.setdefault(owner, _Owner())
        before = owned.size
        self._order[owner, record.id] = owned.add(record, trio.current_time())
        self._size += owned.size - before
        self._filled.set()

    def _remove(self, owner: str, record_id: str) -> bool:
        if self._order.pop((owner, record_id), None) is None:
            return False
        owned = self._owners[owner]
        before = owned.size
        owned.remove(record_id)
        self._size += owned.size - before
        if not owned.entries:
            del self._owners[owner]
        return True

    def _evict(self, owner: str, record_id: str, *, by_size: bool) -> bool:
        """Drop one record, but not this one; return whether there was another one."""
        new = self._owners[owner]
        others = [each for each in self._owners.values() if each is not new or len(new.entries) > 1]
        if not others:
            return False
        largest = max(others, key=lambda each: each.size if by_size else len(each.entries))
        # The new record is the last one of its owner.
        victim = next(iter(largest.entries))
        for name, owned in self._owners.items():
            if owned is largest:
                self._remove(name, victim)
                return True
        return False

    def _expire(self) -> None:
        expired = trio.current_time() - self._options.stored_responses_lifetime
        while self._order:
            (owner, record_id), entry = next(iter(self._order.items()))
            if entry.stored_at > expired:
                return
            self._remove(owner, record_id)


def _item_size(item: Item) -> int:
    return _ITEM + len(item.id) + len(item.json)


def _own_size(record: Record) -> int:
    """Return the bytes of a record without its items."""
    references = _REFERENCE * (len(record.context) + len(record.output))
    return _RECORD + len(record.id) + len(record.head) + references


def _whole_size(record: Record) -> int:
    """Return the bytes of a record that shares nothing."""
    return _own_size(record) + sum(map(_item_size, {*record.context, *record.output}))

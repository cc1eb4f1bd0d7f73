"""What is stored, and the interface of the two places where it can be: a node's memory, and the database.

A record is complete in itself: it has the whole input of its response, also what came from earlier responses, so that
it does not matter when those are gone. Everything in it is JSON text, encoded when the response was complete.

Every record belongs to an *owner*, the key of the request that made it. All other keys get the same answer as for a
record that there never was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, Protocol

import attrs

from ..core.principal import Principal

__all__ = ["Item", "Record", "ResponseStore", "owner_of"]


@attrs.define(eq=False)
class Item:
    """One item of an input or an output: a message, a call, the result of one, reasoning."""

    id: str
    json: bytes
    """The item, with its ``id``, as JSON."""
    uses: int = 0
    """How many records of a store in memory have it."""


@attrs.frozen(eq=False)
class Record:
    """A response or a conversation."""

    id: str
    head: bytes
    """The object as JSON, without its items: the member ``output`` of a response is ``null``."""
    context: tuple[Item, ...]
    """The whole input of a response; the items of a conversation."""
    output: tuple[Item, ...] = ()
    """The output of a response."""


def owner_of(principal: Principal) -> str:
    """Return the owner of what a principal stores. A key that was made again under an old name is another owner."""
    return f"{principal.name}\n{principal.created_at!r}" if principal.created_at else principal.name


class ResponseStore(Protocol):
    """Keeps records: bounded in number, bytes and time. The oldest records of the owner with most make room.

    All methods but ``enabled`` may raise ``StoreError`` if there is a database, and it cannot be reached.
    """

    @property
    def enabled(self) -> bool:
        """Whether anything is stored at all; read at the time of use."""
        ...

    async def run(self) -> NoReturn:
        """Delete records that have expired, until cancelled."""
        ...

    async def put(self, owner: str, record: Record) -> bool:
        """Store a record; return whether it is there now. It is not if it is larger than all may be together.

        A database that cannot be reached is logged, and is no error here.
        """
        ...

    async def put_answer(
        self, owner: str, record: Record | None, conversation: str | None, items: Iterable[Item]
    ) -> None:
        """Store an answer: the record of a response, and its items in its conversation. Both, or nothing at all.

        Whatever cannot be stored since it is too large is left out, and a conversation that was deleted meanwhile stays
        deleted. A database that cannot be reached is logged, and is no error here. If this is cancelled, nothing is
        stored, unless the last step is being done; then everything is.

        Args:
            owner: whose they are.
            record: the response; ``None``: it is not to be stored.
            conversation: the id of the conversation; ``None``: there is none.
            items: added to the conversation.
        """
        ...

    async def get(self, owner: str, record_id: str) -> Record | None:
        """Return a record; ``None`` if the owner has none of this id."""
        ...

    async def delete(self, owner: str, record_id: str) -> bool:
        """Delete a record, and return whether it was there. What other records share with it stays in those."""
        ...

    async def find_items(self, owner: str, ids: Sequence[str]) -> dict[str, Item]:
        """Return those of the items that are in any record of the owner, by id."""
        ...

    async def extend(self, owner: str, record_id: str, items: Iterable[Item]) -> bool:
        """Add items to the context of a record, which counts as new then; return whether it is there."""
        ...

    async def change(self, owner: str, record_id: str, change: Callable[[Record], Record]) -> bool:
        """Replace a record by what a function makes of it, and return whether it is there.

        Nothing else can change the record meanwhile, so nothing is lost. The record counts as new then.

        Args:
            owner: whose it is.
            record_id: the record.
            change: returns the new one, with no items that the old one does not have. May be called in a thread.
        """
        ...

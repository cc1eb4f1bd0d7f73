"""The row of a stored response or conversation, and which of them make room for others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import attrs

__all__ = ["Bounds", "Growth", "StoredRow", "choose_victims"]

#: How many rows there may be, how many bytes they may have, and the time before which they are deleted.
Bounds: TypeAlias = tuple[int, int, float]


@attrs.frozen
class StoredRow:
    """One row. The bytes are JSON."""

    owner: str
    id: str
    time: float
    """When it was stored, in seconds since the epoch."""
    head: bytes
    context: bytes
    output: bytes

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return len(self.head) + len(self.context) + len(self.output)


@attrs.frozen
class Growth:
    """Items that are added to the context of a row."""

    owner: str
    id: str
    array: bytes
    """The items, as a JSON array."""
    items: Sequence[str]
    """Their ids."""
    time: float
    """The new time of the row."""
    since: float
    """An older row counts as deleted."""


def choose_victims(
    rows: Iterable[tuple[str, str, int]], most: int, most_size: int, newest: tuple[str, str]
) -> list[tuple[str, str]]:
    """Return which rows must be deleted for the others to keep within the bounds.

    That is the oldest row of the owner who has most rows, or most bytes if there are too many of these, and so on.

    Args:
        rows: owner, id and size of all rows, oldest first.
        most: how many rows there may be.
        most_size: how many bytes they may have.
        newest: owner and id of a row that is not deleted.

    Returns:
        Owners and ids.
    """
    by_owner: dict[str, deque[tuple[str, int]]] = {}
    sizes: dict[str, int] = {}
    count = 0
    for owner, row_id, size in rows:
        count += 1
        sizes[owner] = sizes.get(owner, 0) + size
        if (owner, row_id) != newest:
            by_owner.setdefault(owner, deque()).append((row_id, size))
    total = sum(sizes.values())
    victims = []
    while (count > most or total > most_size) and by_owner:
        if total > most_size:
            largest = max(by_owner, key=sizes.__getitem__)
        else:
            largest = max(by_owner, key=lambda owner: len(by_owner[owner]))
        row_id, size = by_owner[largest].popleft()
        if not by_owner[largest]:
            del by_owner[largest]
        victims.append((largest, row_id))
        sizes[largest] -= size
        total -= size
        count -= 1
    return victims

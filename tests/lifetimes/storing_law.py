"""The law of lifetimes at the moment at which a response is stored, as a table.

``test_storing.py`` tests every cell of it, and ``docs/lifetimes.md`` shows it; ``test_law.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

import attrs
from law import BOUNDS, CAUSES, CLIENTS, Impossible, table

__all__ = [
    "MOMENTS",
    "STORED",
    "STORING_BOUNDS",
    "STORING_CAUSES",
    "STORING_LAW",
    "StoringCell",
    "storing_markdown",
]

#: Where a request is, in the order in which it gets there.
MOMENTS: Final = {
    "answering": "the response is not complete",
    "writing": "it is complete, and being written",
    "written": "it is written, and its client has not had the end",
}

STORING_CAUSES: Final = {
    name: CAUSES[name]
    for name in (
        "client_leaves",
        "client_resets",
        "total_timeout",
        "operator",
        "handler_raises",
        "worker_killed",
        "master_drains",
        "master_drains_too_long",
        "master_killed",
    )
} | {
    "database_fails": "the database is gone, or full",
    "database_silent": "the database does not respond",
}

STORING_BOUNDS: Final = BOUNDS | {"P": "P"}

#: What is stored afterwards.
STORED: Final = {
    "nothing": "nothing",
    "whole": "the response",
    "failed": "the response as `failed`, without output, if it was streamed",
}


@attrs.frozen
class StoringCell:
    """What follows from one cause at one moment."""

    client: str
    stored: str
    bound: str

    def __attrs_post_init__(self) -> None:
        assert self.client in CLIENTS
        assert self.stored in STORED
        assert self.bound in STORING_BOUNDS


_Entry: TypeAlias = StoringCell | Impossible

_UNAFFECTED: Final = StoringCell("complete", "whole", "end")
_AS_FAILED: Final = {
    name: StoringCell(client, "failed", bound)
    for name, client, bound in (
        ("total_timeout", "504", "B"),
        ("operator", "503 cancelled", "0"),
        ("handler_raises", "500", "0"),
        ("worker_killed", "502", "0"),
        ("master_drains_too_long", "503 cancelled", "D"),
    )
}


def _row(
    answering: _Entry, writing: _Entry = _UNAFFECTED, written: _Entry = _UNAFFECTED
) -> dict[str, _Entry]:
    return {"answering": answering, "writing": writing, "written": written}


def _left(client: str) -> dict[str, _Entry]:
    nothing = StoringCell(client, "nothing", "0")
    return _row(nothing, nothing, StoringCell(client, "whole", "0"))


def _over(cause: str, why: str) -> dict[str, _Entry]:
    return _row(_AS_FAILED[cause], Impossible(why), Impossible(why))


_NOT_STORED: Final = StoringCell("complete", "nothing", "0")
_NOT_STORED_LATE: Final = StoringCell("complete", "nothing", "P")

STORING_LAW: Final[dict[str, dict[str, _Entry]]] = {
    "client_leaves": _left("left"),
    "client_resets": _left("left"),
    "total_timeout": _row(_AS_FAILED["total_timeout"]),
    "operator": _over("operator", "the call has ended, so an operator cannot name it (404)"),
    "handler_raises": _over("handler_raises", "the handler has returned"),
    "worker_killed": _row(_AS_FAILED["worker_killed"]),
    "master_drains": _row(_UNAFFECTED),
    "master_drains_too_long": _row(_AS_FAILED["master_drains_too_long"]),
    "master_killed": _left("lost"),
    "database_fails": _row(_NOT_STORED, _NOT_STORED, StoringCell("complete", "whole", "0")),
    "database_silent": _row(_NOT_STORED_LATE, _NOT_STORED_LATE, StoringCell("complete", "whole", "P")),
}


def storing_markdown() -> Iterator[str]:
    """Yield the lines of the table as the documentation shows it."""

    def shown(cell: StoringCell) -> tuple[str, ...]:
        return CLIENTS[cell.client], STORED[cell.stored], STORING_BOUNDS[cell.bound]

    columns = ("cause", "moment", "the client sees", "stored", "client told")
    return table(columns, STORING_LAW, STORING_CAUSES, MOMENTS, shown)

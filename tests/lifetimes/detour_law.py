"""What happens to a request whose answer comes from elsewhere than it was first sent, or whose master is replaced.

It is a law of its own beside the one in ``law.py``, with the same phases: these things need another replica, another
model or another process, which the tables of that one do not have. ``test_detours.py`` tests every cell of it, and
``docs/lifetimes.md`` shows it; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

import attrs
from law import CLIENTS, HANDLERS, PHASES, Impossible, table

__all__ = ["DETOUR_BOUNDS", "DETOUR_CAUSES", "DETOUR_LAW", "DetourCell", "detour_markdown"]

DETOUR_CAUSES: Final = {
    "alias": "its worker is killed, and the client asked for a list of models",
    "hedge": "a second attempt, on another replica, answers first",
    "hedge_left": "the client leaves while there are two attempts",
    "ejected": "its replica is ejected",
    "replaced": "the master is replaced, and `drain_timeout` is long enough",
    "replaced_too_long": "the master is replaced, and `drain_timeout` passes",
}

#: When the slot of the first handler is free and the client has been told.
DETOUR_BOUNDS: Final = {"0": "at once", "D": "D", "D+V": "D + V", "end": "when it has finished"}


@attrs.frozen
class DetourCell:
    """What follows from one cause in one phase."""

    client: str
    handler: str
    """What the handler sees that the request was for at first."""
    bound: str
    master: tuple[str, ...] = ()
    """The counters that the master increments, sorted; one for each call."""
    elsewhere: bool = False
    """The answer comes from another handler."""

    def __attrs_post_init__(self) -> None:
        assert self.client in CLIENTS
        assert self.handler in HANDLERS
        assert self.bound in DETOUR_BOUNDS


_Entry: TypeAlias = DetourCell | Impossible

_RUNNING: Final = ("waiting", "streaming", "blocked", "ending")
_FINISHES: Final = DetourCell("complete", "finishes", "end", ("completed",))
_NO_ATTEMPT: Final = Impossible("there is no first attempt yet")
_HAS_BEGUN: Final = Impossible("an answer that has begun gets no second attempt")


def _row(
    *, uploading: _Entry, forwarding: _Entry, queued: _Entry, running: _Entry, **others: _Entry
) -> dict[str, _Entry]:
    row: dict[str, _Entry] = {"uploading": uploading, "forwarding": forwarding, "queued": queued}
    return row | dict.fromkeys(_RUNNING, running) | others


def _hedge(client: str, running: str, counters: tuple[str, ...], *, elsewhere: bool) -> dict[str, _Entry]:
    never = DetourCell(client, "never", "0", counters, elsewhere)
    return _row(
        uploading=_NO_ATTEMPT,
        forwarding=never,
        queued=never,
        running=DetourCell(client, running, "0", counters, elsewhere),
        streaming=_HAS_BEGUN,
        blocked=_HAS_BEGUN,
        ending=_HAS_BEGUN,
    )


DETOUR_LAW: Final[dict[str, dict[str, _Entry]]] = {
    "alias": _row(
        uploading=DetourCell("complete", "never", "end", ("completed",), elsewhere=True),
        forwarding=DetourCell("complete", "never", "0", ("completed", "worker_lost"), elsewhere=True),
        queued=DetourCell("complete", "never", "0", ("completed", "worker_lost"), elsewhere=True),
        waiting=DetourCell("complete", "dies", "0", ("completed", "worker_lost"), elsewhere=True),
        running=DetourCell("502", "dies", "0", ("worker_lost",)),
    ),
    "hedge": _hedge("complete", "cancelled", ("cancelled", "completed"), elsewhere=True),
    "hedge_left": _hedge("left", "cancelled", ("cancelled", "cancelled"), elsewhere=False),
    "ejected": _row(
        uploading=DetourCell("complete", "never", "end", ("completed",), elsewhere=True),
        forwarding=_FINISHES,
        queued=_FINISHES,
        running=_FINISHES,
    ),
    "replaced": _row(uploading=_FINISHES, forwarding=_FINISHES, queued=_FINISHES, running=_FINISHES),
    "replaced_too_long": _row(
        uploading=DetourCell("lost", "never", "D+V"),
        forwarding=Impossible(
            "a link that is so slow does not reach the new process in time, so the old one goes on"
        ),
        queued=DetourCell("503 cancelled", "never", "D", ("cancelled",)),
        running=DetourCell("503 cancelled", "cancelled", "D", ("cancelled",)),
    ),
}


def detour_markdown() -> Iterator[str]:
    """Yield the lines of the law as the documentation shows it."""

    def shown(cell: DetourCell) -> tuple[str, ...]:
        client = CLIENTS[cell.client] + (" of the other one" if cell.elsewhere else "")
        return client, HANDLERS[cell.handler], DETOUR_BOUNDS[cell.bound], ", ".join(cell.master) or "none"

    columns = (
        "cause",
        "phase",
        "the client sees",
        "the first handler sees",
        "slot free, client told",
        "counted as",
    )
    return table(columns, DETOUR_LAW, DETOUR_CAUSES, PHASES, shown)

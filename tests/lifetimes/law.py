"""The law of lifetimes as a table: whatever happens to a request, in whatever phase, and what follows from it.

``test_matrix.py`` tests every cell of it, and ``docs/lifetimes.md`` shows it; a test compares the two. This module does
not know how a cell is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import attrs

__all__ = [
    "BOUNDS",
    "CAUSES",
    "CLIENTS",
    "HANDLERS",
    "LAW",
    "PHASES",
    "Cell",
    "Entry",
    "Impossible",
    "markdown",
    "table",
]

#: What a request is doing, in the order in which it does it.
PHASES: Final = {
    "uploading": "request body still uploading",
    "forwarding": "body on its way to the worker",
    "queued": "queued for a slot",
    "waiting": "before the first output",
    "streaming": "mid-stream",
    "blocked": "output blocked on a slow client",
    "ending": "after the last output, before the end",
}

#: What can happen to a request.
CAUSES: Final = {
    "client_leaves": "the client closes its connection (FIN)",
    "client_resets": "the client resets its connection (RST)",
    "silence": "deadline: silence for longer than `default_timeout`",
    "idle_timeout": "deadline: silence for longer than the client's `x-stainless-read-timeout`",
    "total_timeout": "deadline: the client's `x-request-timeout` is used up",
    "operator": "an operator cancels it",
    "worker_killed": "the worker's process is killed",
    "worker_frozen": "the worker's process is frozen",
    "link_ends": "the link is cut (EOF)",
    "link_resumed": "the link is cut (RST), and resumed",
    "link_silent_resumed": "the link is silent (black hole), and resumed on a second connection",
    "link_not_resumed": "the link is cut (RST), and not resumed in time",
    "link_resets": "the link is cut (RST), and `resume_window` is 0",
    "link_silent": "the link is silent (black hole), and `resume_window` is 0",
    "master_killed": "the master's process is killed",
    "worker_loses_other_master": "another master of the same worker is killed",
    "master_drains": "the master drains, and `drain_timeout` is long enough",
    "master_drains_too_long": "the master drains, and `drain_timeout` passes",
    "worker_drains": "the worker drains, and `drain_timeout` is long enough",
    "worker_drains_too_long": "the worker drains, and `drain_timeout` passes",
    "handler_raises": "the handler raises",
    "handler_hangs": "the handler goes on for `h` seconds after an operator cancelled it",
}

#: What the client sees. A failure is named by its status and code.
CLIENTS: Final = {
    "left": "(it has left)",
    "complete": "the complete answer",
    "lost": "its connection ends",
    "408": "408",
    "500": "500 `handler_failed`",
    "502": "502 `worker_lost`",
    "503 cancelled": "503 `cancelled`",
    "503 model_unavailable": "503 `model_unavailable`",
    "503 shutting_down": "503 `shutting_down`",
    "504": "504 `timeout`",
}

#: What the handler sees.
HANDLERS: Final = {
    "never": "never starts",
    "cancelled": "cancelled; its `finally` runs",
    "finishes": "nothing",
    "raises": "its own exception",
    "hangs": "cancelled, and shielded from it",
    "dies": "ends with its process",
    "frozen": "stands still; cancelled when it goes on",
}

#: When the slot is free and the client has been told, counted from the cause (for a deadline, from the beginning of
#: the wait). The network adds its latency between nodes to each.
BOUNDS: Final = {
    "0": "at once",
    "T": "T",
    "T+G": "T + G",
    "R": "R",
    "R+G": "R + G",
    "B": "B",
    "B+G": "B + G",
    "W": "W",
    "D": "D",
    "S": "S",
    "U": "U",
    "V": "V",
    "h": "h",
    "end": "when it has finished",
}


@attrs.frozen
class Cell:
    """What follows from one cause in one phase."""

    client: str
    handler: str
    bound: str
    master: str = ""
    """The counter that the master increments for the call; empty if there is no call yet, or no master left."""
    worker: str = ""
    """The same for the worker. Calls that run on the master itself have no worker."""

    def __attrs_post_init__(self) -> None:
        assert self.client in CLIENTS
        assert self.handler in HANDLERS
        assert self.bound in BOUNDS


@attrs.frozen
class Impossible:
    """A cell that cannot happen."""

    why: str


Entry: TypeAlias = Cell | Impossible

_NO_HANDLER: Final = Impossible("no handler runs yet")
_RUNNING: Final = ("waiting", "streaming", "blocked", "ending")


def _row(
    *,
    running: Entry,
    queued: Entry,
    uploading: Entry,
    forwarding: Entry,
    **others: Entry,
) -> dict[str, Entry]:
    row = {"uploading": uploading, "forwarding": forwarding, "queued": queued}
    return row | dict.fromkeys(_RUNNING, running) | others


def _gone() -> dict[str, Entry]:
    return _row(
        uploading=Cell("left", "never", "0"),
        forwarding=Cell("left", "never", "0", "cancelled"),
        queued=Cell("left", "never", "0", "cancelled", "cancelled"),
        running=Cell("left", "cancelled", "0", "cancelled", "cancelled"),
    )


def _silence(limit: str) -> dict[str, Entry]:
    return _row(
        uploading=Cell("408", "never", "U"),
        forwarding=Cell("504", "never", f"{limit}+G", "cancelled"),
        queued=Cell("504", "never", limit, "timed_out", "timed_out"),
        running=Cell("504", "cancelled", limit, "timed_out", "timed_out"),
        blocked=Cell("complete", "finishes", "end", "completed", "completed"),
    )


def _link_lost() -> dict[str, Entry]:
    return _row(
        uploading=Cell("complete", "finishes", "end", "completed", "completed"),
        forwarding=Cell("502", "never", "0", "worker_lost"),
        queued=Cell("502", "never", "0", "worker_lost", "cancelled"),
        running=Cell("502", "cancelled", "0", "worker_lost", "cancelled"),
    )


_FINISHES: Final = Cell("complete", "finishes", "end", "completed", "completed")

#: The law.
LAW: Final[dict[str, dict[str, Entry]]] = {
    "client_leaves": _gone(),
    "client_resets": _gone(),
    "silence": _silence("T"),
    "idle_timeout": _silence("R"),
    "total_timeout": _row(
        uploading=Cell("408", "never", "U"),
        forwarding=Cell("504", "never", "B+G", "cancelled"),
        queued=Cell("504", "never", "B", "timed_out", "timed_out"),
        running=Cell("504", "cancelled", "B", "timed_out", "timed_out"),
    ),
    "operator": _row(
        uploading=Impossible("there is no call yet that an operator could name (404)"),
        forwarding=Cell("503 cancelled", "never", "0", "cancelled"),
        queued=Cell("503 cancelled", "never", "0", "cancelled", "cancelled"),
        running=Cell("503 cancelled", "cancelled", "0", "cancelled", "cancelled"),
    ),
    "worker_killed": _row(
        uploading=Cell("503 model_unavailable", "never", "0"),
        forwarding=Cell("502", "never", "0", "worker_lost"),
        queued=Cell("502", "never", "0", "worker_lost"),
        running=Cell("502", "dies", "0", "worker_lost"),
    ),
    "worker_frozen": _row(
        uploading=Cell("503 model_unavailable", "never", "W"),
        forwarding=Cell("502", "never", "W", "worker_lost"),
        queued=Cell("502", "never", "W", "worker_lost"),
        running=Cell("502", "frozen", "W", "worker_lost"),
    ),
    "link_ends": _link_lost(),
    "link_resumed": _row(uploading=_FINISHES, forwarding=_FINISHES, queued=_FINISHES, running=_FINISHES),
    "link_silent_resumed": _row(
        uploading=_FINISHES, forwarding=_FINISHES, queued=_FINISHES, running=_FINISHES
    ),
    "link_not_resumed": _row(
        uploading=Cell("503 model_unavailable", "never", "S"),
        forwarding=Cell("502", "never", "S", "worker_lost"),
        queued=Cell("502", "never", "S", "worker_lost", "cancelled"),
        running=Cell("502", "cancelled", "S", "worker_lost", "cancelled"),
    ),
    "link_resets": _link_lost(),
    "link_silent": _row(
        uploading=_FINISHES,
        forwarding=Cell("502", "never", "W", "worker_lost"),
        queued=Cell("502", "never", "W", "worker_lost", "cancelled"),
        running=Cell("502", "cancelled", "W", "worker_lost", "cancelled"),
    ),
    "master_killed": _row(
        uploading=Cell("lost", "never", "0"),
        forwarding=Cell("lost", "never", "0"),
        queued=Cell("lost", "never", "0", "", "cancelled"),
        running=Cell("lost", "cancelled", "0", "", "cancelled"),
    ),
    "worker_loses_other_master": _row(
        uploading=_FINISHES, forwarding=_FINISHES, queued=_FINISHES, running=_FINISHES
    ),
    "master_drains": _row(
        uploading=Cell("503 shutting_down", "never", "0"),
        forwarding=_FINISHES,
        queued=_FINISHES,
        running=_FINISHES,
    ),
    "master_drains_too_long": _row(
        uploading=Cell("lost", "never", "V"),
        forwarding=Cell("503 cancelled", "never", "D", "cancelled"),
        queued=Cell("503 cancelled", "never", "D", "cancelled", "cancelled"),
        running=Cell("503 cancelled", "cancelled", "D", "cancelled", "cancelled"),
    ),
    "worker_drains": _row(
        uploading=Cell("503 model_unavailable", "never", "0"),
        forwarding=Cell("503 shutting_down", "never", "0", "failed"),
        queued=_FINISHES,
        running=_FINISHES,
    ),
    "worker_drains_too_long": _row(
        uploading=Impossible("a worker without calls stops at once"),
        forwarding=Impossible("the call is given back as soon as the worker drains"),
        queued=Cell("503 shutting_down", "never", "D", "failed", "cancelled"),
        waiting=Cell("503 shutting_down", "cancelled", "D", "failed", "cancelled"),
        running=Cell("503 cancelled", "cancelled", "D", "failed", "cancelled"),
    ),
    "handler_raises": _row(
        uploading=_NO_HANDLER,
        forwarding=_NO_HANDLER,
        queued=_NO_HANDLER,
        running=Cell("500", "raises", "0", "failed", "failed"),
        blocked=Impossible("a handler that is held back does not run"),
    ),
    "handler_hangs": _row(
        uploading=_NO_HANDLER,
        forwarding=_NO_HANDLER,
        queued=_NO_HANDLER,
        running=Cell("503 cancelled", "hangs", "h", "cancelled", "cancelled"),
    ),
}


def markdown() -> Iterator[str]:
    """Yield the lines of the law as the documentation shows it: a heading and a table for each cause."""
    for cause, title in CAUSES.items():
        yield f"### {title[0].upper()}{title[1:]}"
        yield ""
        yield "| phase | the client sees | the handler sees | slot free, client told | counted as |"
        yield "|---|---|---|---|---|"
        for phase, entry in LAW[cause].items():
            if isinstance(entry, Impossible):
                yield f"| {PHASES[phase]} | *not possible: {entry.why}* | | | |"
                continue
            counters = _counters(entry) if entry.master or entry.worker else "none"
            yield (
                f"| {PHASES[phase]} | {CLIENTS[entry.client]} | {HANDLERS[entry.handler]} "
                f"| {BOUNDS[entry.bound]} | {counters} |"
            )
        yield ""


def table(
    columns: tuple[str, ...],
    law: Mapping[str, Mapping[str, Any]],
    causes: Mapping[str, str],
    phases: Mapping[str, str],
    shown: Callable[[Any], tuple[str, ...]],
) -> Iterator[str]:
    """Yield the lines of another law as the documentation shows it: one table, with a row for each cell.

    Args:
        columns: the heads; the first two are those of causes and phases.
        law: the entries by cause and phase.
        causes, phases: what they are called.
        shown: returns what is in the other columns of a cell that is possible.
    """
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for cause, row in law.items():
        for phase, entry in row.items():
            if isinstance(entry, Impossible):
                yield f"| {causes[cause]} | {phases[phase]} | *not possible: {entry.why}* |" + " |" * (
                    len(columns) - 3
                )
            else:
                yield f"| {' | '.join((causes[cause], phases[phase], *shown(entry)))} |"


def _counters(cell: Cell) -> str:
    if cell.master == cell.worker or not cell.worker:
        return cell.master
    return f"{cell.master or '(gone)'}; on the worker {cell.worker}"

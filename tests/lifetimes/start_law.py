"""The law of lifetimes for a model that runs on demand, as a table.

``test_starts.py`` tests every cell of it, and ``docs/lifetimes.md`` shows it; ``test_law.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

import attrs
from law import BOUNDS, CAUSES, CLIENTS, Impossible, table

__all__ = [
    "START_BOUNDS",
    "START_CAUSES",
    "START_CLIENTS",
    "START_LAW",
    "START_MODELS",
    "START_PHASES",
    "StartCell",
    "start_markdown",
]

#: Where a request for such a model is, in the order in which it gets there.
START_PHASES: Final = {
    "memory": "it waits for memory",
    "starting": "its model is started",
    "answering": "its model answers",
}

START_CAUSES: Final = {
    name: CAUSES[name]
    for name in (
        "client_leaves",
        "client_resets",
        "total_timeout",
        "operator",
        "worker_killed",
        "worker_drains",
    )
} | {
    "start_fails": "the start fails",
    "start_late": "it takes longer than `start_timeout`",
    "dies": "the model dies",
    "needed": "another model needs the memory",
    "unload": "an operator unloads the model",
}

START_BOUNDS: Final = BOUNDS | {"A": "A", "K": "K", "A+K": "A + K"}

START_CLIENTS: Final = CLIENTS | {
    "503 start": "503 `model_start_failed`",
    "503 capacity": "503 `over_capacity`",
    "502 upstream": "502 `upstream_lost`",
}

#: What becomes of the model.
START_MODELS: Final = {
    "cold": "it is not started",
    "given_up": "its start is given up",
    "runs": "it goes on",
    "ready": "it becomes ready",
    "stopped": "it is stopped",
    "after": "it is stopped after the answer",
    "failed": "it has failed; what is left of it is stopped",
}


@attrs.frozen
class StartCell:
    """What follows from one cause in one phase."""

    client: str
    model: str
    bound: str

    def __attrs_post_init__(self) -> None:
        assert self.client in START_CLIENTS
        assert self.model in START_MODELS
        assert self.bound in START_BOUNDS


_Entry: TypeAlias = StartCell | Impossible

_NO_START: Final = Impossible("nothing is being started")


def _row(memory: _Entry, starting: _Entry, answering: _Entry) -> dict[str, _Entry]:
    return {"memory": memory, "starting": starting, "answering": answering}


def _all(client: str, bound: str = "0", answering: str = "runs") -> dict[str, _Entry]:
    return _row(
        StartCell(client, "cold", bound),
        StartCell(client, "given_up", bound),
        StartCell(client, answering, bound),
    )


START_LAW: Final[dict[str, dict[str, _Entry]]] = {
    "client_leaves": _all("left"),
    "client_resets": _all("left"),
    "total_timeout": _all("504", "B"),
    "operator": _all("503 cancelled"),
    "worker_killed": _all("502", answering="stopped"),
    "worker_drains": _row(
        StartCell("complete", "ready", "end"),
        StartCell("complete", "ready", "end"),
        StartCell("complete", "runs", "end"),
    ),
    "start_fails": _row(_NO_START, StartCell("503 start", "failed", "K"), _NO_START),
    "start_late": _row(
        StartCell("503 capacity", "cold", "A"), StartCell("503 start", "failed", "A+K"), _NO_START
    ),
    "dies": _row(_NO_START, StartCell("503 start", "failed", "K"), StartCell("502 upstream", "failed", "0")),
    "needed": _row(
        StartCell("complete", "ready", "end"),
        StartCell("complete", "ready", "end"),
        StartCell("complete", "after", "end"),
    ),
    "unload": _row(
        StartCell("complete", "ready", "end"),
        StartCell("complete", "after", "end"),
        StartCell("complete", "after", "end"),
    ),
}


def start_markdown() -> Iterator[str]:
    """Yield the lines of the table as the documentation shows it."""

    def shown(cell: StartCell) -> tuple[str, ...]:
        return START_CLIENTS[cell.client], START_MODELS[cell.model], START_BOUNDS[cell.bound]

    columns = ("cause", "the request", "its client sees", "the model", "client told")
    return table(columns, START_LAW, START_CAUSES, START_PHASES, shown)

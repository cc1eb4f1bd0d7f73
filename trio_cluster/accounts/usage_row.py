"""The rows of the usage journal, and what can be asked of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

import attrs

__all__ = ["COLUMNS", "COUNTS", "DAY", "GROUPS", "UsageQuery", "UsageRow", "fold"]

#: Seconds of a day.
DAY: Final = 86_400

#: What usage can be grouped by.
GROUPS: Final = ("key", "model", "worker", "day")

#: What is counted for each group. ``failed`` is every outcome but completed and cancelled; ``usage_unknown`` counts the
#: requests of which nothing reported how many tokens they took.
COUNTS: Final = (
    "requests",
    "completed",
    "failed",
    "cancelled",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "usage_unknown",
)


#: One request that is over: the columns of a row, in the order of :data:`COLUMNS`. A plain tuple, since one is made for
#: every request:
#:
#: - ``time``: when the request was handed to a model, in seconds since the epoch;
#: - ``key``: the name of the principal; empty where no key is required;
#: - ``model``: the model that answered;
#: - ``alias``: the name that the client asked for, if it was another one;
#: - ``worker``: the worker that answered, or ``local``;
#: - ``route``: the name of the endpoint;
#: - ``prompt_tokens``, ``completion_tokens``, ``cached_tokens``: as reported; ``None``: not known;
#: - ``outcome``: see ``core/outcome.py``;
#: - ``first_byte``: seconds until the answer began; ``None``: it did not;
#: - ``duration``: seconds until the work had stopped;
#: - ``request_id``.
UsageRow: TypeAlias = tuple[
    float,
    str,
    str,
    str,
    str,
    str,
    int | None,
    int | None,
    int | None,
    str,
    float | None,
    float,
    str,
]

COLUMNS: Final = (
    "time",
    "key",
    "model",
    "alias",
    "worker",
    "route",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "outcome",
    "first_byte",
    "duration",
    "request_id",
)


def fold(rows: Iterable[UsageRow]) -> dict[tuple[int, str, str, str], list[int]]:
    """Return the sums of rows, in the order of :data:`COUNTS`, by day, key, model and worker.

    A day is the number of days since the epoch.
    """
    sums: dict[tuple[int, str, str, str], list[int]] = {}
    for time, key, model, _, worker, _, prompt, completion, cached, outcome, _, _, _ in rows:
        group = int(time // DAY), key, model, worker
        total = sums.get(group)
        if total is None:
            total = sums[group] = [0] * len(COUNTS)
        total[0] += 1
        total[1 if outcome == "completed" else 3 if outcome == "cancelled" else 2] += 1
        total[4] += prompt or 0
        total[5] += completion or 0
        total[6] += cached or 0
        if prompt is None and completion is None:
            total[7] += 1
    return sums


@attrs.frozen
class UsageQuery:
    """Which usage is asked for."""

    group_by: tuple[str, ...] = ()
    """Some of :data:`GROUPS`; empty: one sum of everything."""
    since: float | None = None
    """Requests from this moment on, in seconds since the epoch."""
    until: float | None = None
    """Requests before this moment."""
    key: str | None = None
    """Only requests of this principal."""

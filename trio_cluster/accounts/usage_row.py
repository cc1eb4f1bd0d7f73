"""The rows of the usage journal, and what can be asked of them."""

from __future__ import annotations

from typing import Final, TypedDict

import attrs

__all__ = ["COUNTS", "GROUPS", "UsageQuery", "UsageRow", "add_to_counts"]

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


class UsageRow(TypedDict):
    """One request that is over: the columns of a row. A dict, since one is made for every request."""

    time: float
    """When the request was handed to a model, in seconds since the epoch."""
    key: str
    """The name of the principal; empty where no key is required."""
    model: str
    """The model that answered."""
    alias: str
    """The name that the client asked for, if it was another one."""
    worker: str
    """The worker that answered, or ``local``."""
    route: str
    """The name of the endpoint."""
    prompt_tokens: int | None
    """As reported; ``None``: not known."""
    completion_tokens: int | None
    cached_tokens: int | None
    outcome: str
    """See ``core/outcome.py``."""
    first_byte: float | None
    """Seconds until the answer began; ``None``: it did not."""
    duration: float
    """Seconds until the work had stopped."""
    request_id: str


def add_to_counts(row: UsageRow, total: list[int]) -> None:
    """Add a row to counts, which are in the order of :data:`COUNTS`."""
    outcome, prompt, completion = row["outcome"], row["prompt_tokens"], row["completion_tokens"]
    total[0] += 1
    total[1 if outcome == "completed" else 3 if outcome == "cancelled" else 2] += 1
    total[4] += prompt or 0
    total[5] += completion or 0
    total[6] += row["cached_tokens"] or 0
    if prompt is None and completion is None:
        total[7] += 1


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

"""The outcome of a call: how it ended, in one word."""

from __future__ import annotations

from typing import Literal, TypeAlias

from ..errors import WorkerLost
from .answer import Done
from .call import Call

__all__ = ["Outcome", "outcome_of"]

Outcome: TypeAlias = Literal["completed", "cancelled", "timed_out", "worker_lost", "failed"]


def outcome_of(call: Call) -> Outcome:
    """Return the outcome of a call whose answer has ended."""
    end = call.end
    if call.cancelled is not None:
        return "cancelled"
    if isinstance(end, Done):
        return "completed"
    if end is not None and isinstance(end.error, WorkerLost):
        return "worker_lost"
    return "timed_out" if end is not None and end.timed_out else "failed"

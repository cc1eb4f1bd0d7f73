"""How long an attempt at a request has waited, and when things have happened to it, by the clock of this node.

The facts of an attempt (``story.py``) have two sources for that: what this node has measured itself, of calls that it
answers, and what a worker has reported, of calls that were forwarded. A report counts in the place of what this node
has measured. The functions here hide which of the two it is. ``gateway/request_stats.py`` does the same without calling
them, since it does so for each request.

A worker counts from the moment at which it got the call. When that was by the clock of this node, is not known: the way
there and back is known only as a whole, from a moment that both ends have measured. Half of it is taken for each way.
"""

from __future__ import annotations

from typing import Final

from .story import AttemptFacts

__all__ = ["cold_time", "held_back_time", "queue_times", "worker_moment"]

_MICROSECONDS: Final = 1e6


def queue_times(attempt: AttemptFacts) -> tuple[float, float]:
    """Return for how many seconds the call has waited for a slot of its node, and for one of its model."""
    if times := attempt.times:
        return times.get("queued", 0) / _MICROSECONDS, times.get("queued_model", 0) / _MICROSECONDS
    return attempt.queued_for, attempt.queued_for_model


def cold_time(attempt: AttemptFacts) -> float:
    """Return for how many seconds the call has waited for its model to start."""
    if attempt.times:
        return attempt.times.get("cold", 0) / _MICROSECONDS
    # What a master knows of a worker's model comes with heartbeats, so it is about right.
    return attempt.cold_for


def held_back_time(attempt: AttemptFacts) -> float:
    """Return for how many seconds the handler was held back, since what it had given was not taken."""
    if attempt.times:
        return attempt.times.get("held_back", 0) / _MICROSECONDS
    return attempt.held_back


def worker_moment(attempt: AttemptFacts, name: str) -> float | None:
    """Return when something has happened on a worker, by the clock of this node.

    Args:
        attempt: that was forwarded to the worker.
        name: a moment of :data:`~trio_cluster.core.story.TIMES`, such as ``started``.

    Returns:
        ``None`` if the worker has not reported it. What it has reported is believed: the time may lie after the end.
    """
    if name not in attempt.times:
        return None
    return attempt.opened_at + _way(attempt) / 2 + attempt.times[name] / _MICROSECONDS


def _way(attempt: AttemptFacts) -> float:
    """Return how many seconds the way to the worker and back took: the earlier it was measured, the better, since what
    comes later waits for what the client has not taken yet.
    """
    moments = [(attempt.begun_at, "first_output"), (attempt.released_at, "stopped")]
    if attempt.cancelled is None:
        # A cancelled call has ended here before it did there.
        moments.append((attempt.ended_at, "ended"))
    for at, name in moments:
        if at >= 0 and name in attempt.times:
            return max(0.0, at - attempt.opened_at - attempt.times[name] / _MICROSECONDS)
    return 0.0

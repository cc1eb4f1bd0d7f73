"""The facts of a request's story: what was recorded of a request, and of each attempt at it.

They are raw: times, references and names, as they were at hand. Words are made of them when somebody reads the story
(``admin/story.py``). Times are of ``core/clock.py``, in seconds; ``NEVER`` stands for what has not happened.

These are structs of msgspec, since making one calls no function in Python, and a request pays for them.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from .answer import Usage

__all__ = ["NOTES_MAX", "TIMES", "AttemptFacts", "CandidateFacts", "ErrorFacts", "StoryFacts", "WorkerTimes"]

#: A replica that could have been chosen: its name, its cost in seconds, and the bytes of the prompt that were expected
#: in its cache.
CandidateFacts: TypeAlias = tuple[str, float, int]

#: An error: its status, its code and its message.
ErrorFacts: TypeAlias = tuple[int, str, str]

#: What a worker has measured of a call, by some of the names of :data:`TIMES`, in microseconds.
WorkerTimes: TypeAlias = dict[str, int]

#: What a worker reports at the end of a call. The first four are counted from the moment at which it got the call, the
#: others are durations.
#:
#: - ``started``: the handler began;
#: - ``first_output``: the answer began;
#: - ``ended``: the answer was complete, or had failed;
#: - ``stopped``: the work had stopped;
#: - ``queued``: it waited for a slot of the worker;
#: - ``queued_model``: it waited for a slot of the model;
#: - ``cold``: it waited for its model to run;
#: - ``held_back``: the handler was held back, since what it had given was not taken;
#: - ``traced``: no time: it is 1 if the worker exports the span of the handler itself.
TIMES: Final = (
    "started",
    "first_output",
    "ended",
    "stopped",
    "queued",
    "queued_model",
    "cold",
    "held_back",
    "traced",
)

#: Notes of one attempt, at most.
NOTES_MAX: Final = 32


class AttemptFacts(msgspec.Struct):
    """One attempt at a request: a call. It is complete when ``released_at`` is set."""

    node: str
    model: str
    forwarded: bool
    why: str
    """The reason of the routing policy."""
    candidates: list[CandidateFacts]
    """The replicas among which the policy has chosen by their costs; empty if it did not."""
    cached: int
    """Bytes of the prompt that were expected in the cache of the chosen one."""
    prompt_size: int
    opened_at: float
    started_at: float
    """The handler began; known of calls that this node answers itself."""
    begun_at: float
    ended_at: float
    released_at: float
    waiting: bool
    """It waits for a slot."""
    queued_at: float
    queued_for: float
    queued_for_model: float
    cold_since: float
    cold_for: float
    """It waited for its model to run, which is started when it is asked for."""
    cold: str
    """What it waits for until its model runs; empty if it does not."""
    held_back: float
    notes: list[tuple[float, str]]
    cancelled: str | None
    """The reason of the cancellation; ``None`` if there was none."""
    cancelled_by: str
    """The operator who has cancelled it; empty if none has."""
    cancelled_at: float
    overdue: bool
    superseded: bool
    complete: bool
    lost: bool
    """The worker was lost."""
    retryable: bool
    timed_out: bool
    over_capacity: bool
    error: ErrorFacts | None
    usage: Usage | None
    delivered: int
    times: WorkerTimes
    finish: str = ""
    """Why the choices of a text ended, with commas; empty: not known."""


class StoryFacts(msgspec.Struct):
    """One request."""

    request_id: str
    endpoint: str
    path: str
    model: str
    """The name that the client asked for; empty if the request was refused before that was known."""
    key: str
    """The name of the API key; empty if none is required."""
    client: str
    size: int
    """Bytes of the body; -1: not known."""
    idle_timeout: float
    total_timeout: float
    default_timeout: float
    """The option of that name."""
    began: float
    uploaded_at: float
    """All of a body had arrived that was forwarded while it came; other bodies arrive before the first attempt."""
    answered_at: float
    """The head of the response was sent."""
    ended_at: float
    status: int
    """Of the response; 0: none was sent."""
    error: ErrorFacts | None
    """The error that was sent in the place of an answer."""
    left: bool
    """The client disconnected before the response was complete."""
    delivered: bool
    """The response was sent to its end."""
    early: bool
    """The head was sent before there was an answer, since the client waited for long."""
    attempts: list[AttemptFacts]
    answering: int
    """The number of the attempt that counts, from 0; -1: there is none."""
    streamed: bool = False
    """The answer was sent while it came: events, or audio."""

"""How a request ended, and by whom, as its story says.

The facts were recorded without words (``stories.py``). This is for what is shown: the story itself, the access log, the
metrics. All of them say the same of a request.
"""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias

import attrs

from ..core.story import AttemptFacts, ErrorFacts, StoryFacts
from ..core.wake_target import ASLEEP
from .stories import CLIENT_LEFT

__all__ = ["EndedBy", "Ending", "StoryOutcome", "ending_of", "error_text", "is_asleep", "place_of"]

#: How a request ended; ``running``: it has not.
StoryOutcome: TypeAlias = Literal[
    "running", "completed", "cancelled", "timed_out", "worker_lost", "failed", "refused"
]
#: Who has ended it: for ``timed_out`` the one who has set the limit.
EndedBy: TypeAlias = Literal["", "client", "operator", "worker", "model", "node"]

_GIVEN_BACK: Final = ("shutting_down", "model_unavailable")
_REQUEST_TIMEOUT: Final = 408
#: Seconds by which a deadline may seem to have come too early: different nodes measured.
_EARLY: Final = 0.05


@attrs.frozen
class Ending:
    """How a request ended."""

    outcome: StoryOutcome
    by: EndedBy
    text: str


def ending_of(story: StoryFacts) -> Ending:
    """Return how a request has ended, and by whom."""
    if story.ended_at < 0:
        return Ending("running", "", "it is not over")
    attempt = story.attempts[_decisive(story)] if story.attempts else None
    if attempt is None:
        if story.error is not None:
            return _refused(story.error)
        if story.left:
            return Ending("cancelled", "client", "the client left before its request was admitted")
        return Ending("cancelled", "node", "this node ended it before it was admitted: it is being stopped")
    if attempt.complete:
        return _delivery(story)
    if attempt.cancelled is not None:
        return _cancelled(story, attempt)
    return _failed(story, attempt)


def _decisive(story: StoryFacts) -> int:
    """Return the number of the attempt whose end the client was told: of two that have failed, it need not be the last
    one.
    """
    told, last = story.error, story.attempts[story.answering]
    if told is not None and not last.complete and last.error is not None and last.error[:2] != told[:2]:
        for index, attempt in enumerate(story.attempts):
            if attempt.error is not None and attempt.error[:2] == told[:2] and attempt.cancelled is None:
                return index
    return story.answering


def _refused(error: ErrorFacts) -> Ending:
    if error[0] == _REQUEST_TIMEOUT:
        return Ending("timed_out", "client", "the client did not send its body in time")
    return Ending("refused", "node", f"refused: {error_text(error)}")


def _delivery(story: StoryFacts) -> Ending:
    if story.error is not None:
        return Ending("failed", "model", f"the answer could not be used: {error_text(story.error)}")
    if story.delivered:
        return Ending("completed", "model", f"the answer was complete, with status {story.status}")
    if story.left:
        return Ending("cancelled", "client", "the client left before it had all of the answer")
    return Ending("cancelled", "node", "this node was stopped before the client had all of the answer")


def _cancelled(story: StoryFacts, attempt: AttemptFacts) -> Ending:
    if attempt.cancelled_by:
        text = f"cancelled by an operator ({attempt.cancelled_by}): {attempt.cancelled}"
        return Ending("cancelled", "operator", text)
    if attempt.overdue:
        return _late(story, attempt, attempt.cancelled_at)
    if attempt.cancelled == CLIENT_LEFT:
        return Ending("cancelled", "client", f"the client left {_phase(attempt, attempt.cancelled_at)}")
    if story.error is not None and attempt.error is not None and story.error[1] != attempt.error[1]:
        return _refused(story.error)
    return Ending("cancelled", "node", f"cancelled by this node: {attempt.cancelled}")


def _failed(story: StoryFacts, attempt: AttemptFacts) -> Ending:
    node, error = place_of(attempt), error_text(attempt.error)
    if story.error is not None and attempt.error is not None and story.error[:2] != attempt.error[:2]:
        if story.error[:2] == (504, "timeout"):
            # The deadline of this node passed in the moment in which the attempt failed, or after it.
            return _late(story, attempt, max(attempt.ended_at, story.ended_at))
        text = f"{node} failed ({error}), and it could not be tried elsewhere: {error_text(story.error)}"
        return Ending("refused", "node", text)
    if attempt.timed_out:
        return _late(story, attempt, attempt.ended_at)
    if attempt.lost:
        return Ending("worker_lost", "worker", f"{node} was lost: {error}")
    by: EndedBy = "worker" if attempt.forwarded else "node"
    code = attempt.error[1] if attempt.error is not None else ""
    if attempt.over_capacity:
        return Ending("failed", by, f"{node} could not take it: {error}")
    if attempt.retryable:
        what = "gave it back" if code in _GIVEN_BACK else "could not answer it"
        return Ending("failed", by, f"{node} {what}: {error}")
    if code == "cancelled":
        return Ending("cancelled", by, f"cancelled by {node}: {error}")
    return Ending("failed", "model", f"the model '{attempt.model}' failed on {node}: {error}")


def _late(story: StoryFacts, attempt: AttemptFacts, at: float) -> Ending:
    """Return the end of a request whose deadline passed at ``at``: who has set it, and which it was."""
    idle, total = story.idle_timeout, story.total_timeout
    if total < math.inf and at - story.attempts[0].opened_at >= total - _EARLY:
        limit = f"the client's time limit for the whole answer (x-request-timeout: {total:g} s)"
        return Ending("timed_out", "client", f"not complete within {limit}")
    if attempt.forwarded and attempt.begun_at < 0 and at - attempt.opened_at < idle - _EARLY:
        return Ending(
            "timed_out",
            "worker",
            f"silent for longer than {place_of(attempt)} allows: {error_text(attempt.error)}",
        )
    if idle < story.default_timeout:
        header = "x-request-timeout" if idle == total else "x-stainless-read-timeout"
        return Ending(
            "timed_out", "client", f"silent for longer than the client waits ({header}: {idle:g} s)"
        )
    return Ending("timed_out", "node", f"silent for {idle:g} s (option default_timeout)")


def _phase(attempt: AttemptFacts, at: float) -> str:
    if 0 <= attempt.begun_at <= at:
        return "in the middle of the answer"
    return "before the answer had begun"


def place_of(attempt: AttemptFacts) -> str:
    """Return where an attempt was made, in words."""
    if is_asleep(attempt):
        return f"the sleeping worker '{attempt.node.removesuffix(ASLEEP)}'"
    return f"worker '{attempt.node}'" if attempt.forwarded else "this node"


def is_asleep(attempt: AttemptFacts) -> bool:
    """Return whether the attempt was the wait for a machine to wake."""
    return not attempt.forwarded and attempt.node.endswith(ASLEEP)


def error_text(error: ErrorFacts | None) -> str:
    """Return an error in words."""
    if error is None:
        return "no reason is known"
    status, code, message = error
    return f"{status} {code}: {message}" if code else f"{status}: {message}"

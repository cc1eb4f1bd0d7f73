"""What the stories of requests must say: each request that was answered has one, it ends, and it names the end that the
client saw.

Stories are compared when the cluster is quiescent. Those of a process that was killed say nothing: its clients saw
something else, and nobody can read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from ..core.story import StoryFacts
from ..gateway.stories import Stories
from ..gateway.story_ending import Ending, ending_of
from ._simulation import ProcessRun, Simulation
from ._workload import Outcome

__all__ = ["StoryCheck"]

#: The outcomes that a story may have for a client that saw an error with this code.
_OUTCOMES: Final = {
    "timeout": {"timed_out"},
    "worker_lost": {"worker_lost"},
    "cancelled": {"cancelled"},
    "handler_failed": {"failed"},
    "scripted": {"failed"},
    "replica_failing": {"failed"},
    "upstream_lost": {"failed"},
    "model_start_failed": {"failed"},
    "over_capacity": {"failed", "refused"},
    "shutting_down": {"failed", "refused"},
    "rate_limit_exceeded": {"refused"},
    "model_unavailable": {"failed", "refused"},
    "model_not_found": {"refused"},
}


class StoryCheck:
    """Compares the stories of a simulation with what its clients saw.

    Args:
        simulation: the cluster.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._stories: dict[int, tuple[ProcessRun, Stories]] = {}

    def follow(self) -> None:
        """Remember the stories of each process, which outlive it here. To be called often. Synchronous."""
        for process in self._simulation.processes:
            if process.number not in self._stories and (stories := process.server.stories) is not None:
                self._stories[process.number] = process, stories

    def endless(self) -> Iterator[str]:
        """Yield the requests whose story does not end, although the cluster is quiescent."""
        for process, stories in self._stories.values():
            if not process.killed:
                for context in stories.live:
                    yield f"{process.name}: the story of request {context.request_id} does not end"

    def complaints(self, outcomes: Iterable[Outcome]) -> Iterator[tuple[Outcome, str]]:
        """Yield what is wrong with the stories of requests that have ended."""
        for outcome in outcomes:
            found = list(self._stories_of(outcome))
            if not found and outcome.status:
                yield outcome, "it was answered, and has no story"
            if len(found) > 1:
                yield outcome, f"it has {len(found)} stories"
            for process, facts in found:
                if not process.killed and (complaint := _complaint(outcome, facts)):
                    yield outcome, complaint

    def _stories_of(self, outcome: Outcome) -> Iterator[tuple[ProcessRun, StoryFacts]]:
        for process, stories in self._stories.values():
            if process.name == outcome.request.master:
                for facts in stories.find(f"r{outcome.request.number}"):
                    yield process, facts


def _complaint(outcome: Outcome, facts: StoryFacts) -> str:
    """Return what is wrong with a story; empty if it fits to what the client saw."""
    told, verdict = ending_of(facts), outcome.verdict
    if told.outcome == "running" or any(attempt.released_at < 0 for attempt in facts.attempts):
        return "its story does not end"
    seen = (
        f"the client saw {verdict}, and its story says {told.outcome} by {told.by or 'nobody'}: {told.text}"
    )
    if outcome.status and facts.status not in (0, outcome.status):
        return f"its story says status {facts.status}; {seen}"
    if verdict in ("complete", "stream finished"):
        return "" if told.outcome == "completed" else seen
    if outcome.ending == "answered" and (code := _code(verdict)):
        return "" if told.outcome in _OUTCOMES.get(code, ()) and _by_the_right_one(code, told) else seen
    return ""


def _by_the_right_one(code: str, told: Ending) -> bool:
    if code in ("handler_failed", "scripted", "replica_failing", "upstream_lost"):
        return told.by == "model"
    if code == "model_unavailable" and told.outcome == "failed":
        # The model was taken back while the request was on its way there.
        return told.by == "worker"
    # The client is there, and waits.
    return told.by != "client" or code == "timeout"


def _code(verdict: str) -> str:
    """Return the code of the error that a verdict names; empty if it names none."""
    first, _, code = verdict.rpartition(" ")
    return code if first.isdecimal() or first == "stream failed" else ""

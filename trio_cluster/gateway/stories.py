"""The stories of requests: what is recorded of each, and the last ones that are over.

Theory of operation
===================

A request for a model has a story from the moment at which its sender is known. While it runs, nothing is recorded for
it here: its context and its calls have all the facts anyway, each where it belongs (``Call.opened_at``, ``Call.why``),
and the story is made of them when somebody asks. When the request is over, its facts are copied, once, since the
context holds bodies and connections that must go.

The work of a call may go on after that, until its handler has stopped. The call then has a reference to its part of the
story (``Call.facts``), and completes it when it is released. The story refers to no call.

Tokens cost nothing, and a request two calls of functions at its end, whether its story is kept or not, for the
statistics are made of them as well (``request_stats.py``). Words are made when they are read, by
``admin/story.py``.

No story has a text of a request or an answer, nor a key; only the key's name.
"""

from __future__ import annotations

from collections import deque
from heapq import nsmallest
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..core import clock
from ..core.answer import Done, Failed
from ..core.story import AttemptFacts, CandidateFacts, ErrorFacts, StoryFacts
from ..errors import ApiError, WorkerLost
from ..options import ClusterServerOptions
from ..routing.cost import Placement

if TYPE_CHECKING:
    from .context import RequestContext

__all__ = ["CLIENT_LEFT", "MAX_BYTES", "RequestTracer", "Stories", "error_facts", "story_of"]

#: The reason with which the HTTP servers cancel a request, and the gateway its calls, when the client has disconnected.
CLIENT_LEFT: Final = "client left"

#: Bytes that all stories together may take, about.
MAX_BYTES: Final = 64 * 1024 * 1024
#: Replicas of one decision that are kept, the cheapest ones.
_CANDIDATES_MAX: Final = 32
#: Characters of a text that is kept, at most; and of a name.
_TEXT_MAX: Final = 500
_NAME_MAX: Final = 256
#: Stories that are counted together.
_BATCH: Final = 64
#: What a story takes, in bytes, for the count: itself, each attempt, each candidate, each note.
_STORY: Final = 1600
_ATTEMPT: Final = 1200
_CANDIDATE: Final = 200
_NOTE: Final = 250


class RequestTracer(Protocol):
    """Makes spans and metrics of requests that are over."""

    def trace_of(self, context: RequestContext) -> Any:
        """Return the trace of a request; ``None`` if it is not sampled. Synchronous."""

    def end(self, context: RequestContext, trace: Any, story: StoryFacts) -> None:
        """Take a request that is over. Synchronous; must not raise, nor keep the context.

        Args:
            context: of the request.
            trace: what :meth:`trace_of` has returned.
            story: of the request. Attempts whose work goes on complete it, before the callbacks of
                :meth:`Call.on_release` are called.
        """


class Counting(Protocol):
    """Who makes statistics of stories; see ``request_stats.py``."""

    pending: list[StoryFacts]

    def count(self) -> None:
        """Count the stories that are pending. Synchronous."""
        ...


class Stories:
    """The requests that run, and the stories of the last ones that are over.

    Args:
        options: read at the time of use.
        stats: gets every story, whether it is kept or not; ``None``: there are no statistics.

    Attributes:
        stats: as given.
        live: the contexts of the requests that run, oldest first.
        over: the stories of those that are over, each with its size in bytes, oldest first. To be read only.
        size: the bytes of all stories, about.
        tracer: gets each request that is over; ``None``: there is no telemetry.
    """

    def __init__(self, options: ClusterServerOptions, stats: Counting | None = None) -> None:
        self._options = options
        self.stats = stats
        self.live: dict[RequestContext, None] = {}
        self.over: deque[tuple[int, StoryFacts]] = deque()
        self.size = 0
        self.tracer: RequestTracer | None = None

    def end(self, context: RequestContext, *, left: bool) -> None:
        """Record the story of a request that is over. Synchronous.

        Args:
            context: of the request; all its calls have ended.
            left: the client disconnected before the response was complete.
        """
        if self.live.pop(context, False) is not None:
            return
        limit, stats = self._options.stories, self.stats
        story = context.story = story_of(context, self._options)
        story.left, story.ended_at = left, clock.now()
        if stats is not None:
            stats.pending.append(story)
            if len(stats.pending) >= _BATCH:
                stats.count()
        if limit:
            size = _STORY
            for attempt in story.attempts:
                size += _ATTEMPT + _CANDIDATE * len(attempt.candidates) + _NOTE * len(attempt.notes)
            self.over.append((size, story))
            self.size += size
        while len(self.over) > limit or self.size > MAX_BYTES:
            self.size -= self.over.popleft()[0]
        if self.tracer is not None:
            self.tracer.end(context, self.tracer.trace_of(context), story)

    def find(self, request_id: str) -> list[StoryFacts]:
        """Return the stories of all requests that have this id, oldest first. Clients may use an id repeatedly."""
        if not self._options.stories:
            return []
        found = [story for _, story in self.over if story.request_id == request_id]
        found += [story_of(each, self._options) for each in self.live if each.request_id == request_id]
        return found


def story_of(context: RequestContext, options: ClusterServerOptions) -> StoryFacts:
    """Return the facts of a request as they are now.

    Its calls that have ended, and whose work has not stopped, complete them; of others, the facts stay as they are.
    """
    # Neither is set if the request was refused before, or its body is still being read.
    request, answering_call = getattr(context, "request", None), getattr(context, "call", None)
    endpoint = context.endpoint
    attempts: list[AttemptFacts] = []
    answering = -1
    for call in context.calls:
        if call is answering_call:
            answering = len(attempts)
        end, placement, served = call.end, call.tracker, call.request
        candidates: list[CandidateFacts] = []
        cached = prompt_size = 0
        if type(placement) is Placement:
            candidates, cached, prompt_size = placement.candidates, placement.cached, placement.prompt.size
            if len(candidates) > _CANDIDATES_MAX:
                candidates = _cheapest(candidates, call.served_by)
        error: ErrorFacts | None = None
        lost = retryable = timed_out = over_capacity = False
        if type(end) is Failed:
            # Written out, as in `error_facts`: a function would cost every stream that is left a call.
            failure = end.error
            code = "" if failure.code is None else str(failure.code)[:_NAME_MAX]
            error = failure.status, code, str(failure.message)[:_TEXT_MAX]
            lost = isinstance(end.error, WorkerLost)
            retryable, timed_out, over_capacity = end.retryable, end.timed_out, end.over_capacity
        facts = AttemptFacts(
            call.served_by,
            served.model[:_NAME_MAX],
            call.forwarded,
            call.why[:_TEXT_MAX],
            candidates,
            cached,
            prompt_size,
            call.opened_at,
            call.started_at,
            call.begun_at,
            call.ended_at,
            call.released_at,
            call.queued,
            call.queued_at,
            call.queued_for,
            call.queued_for_model,
            call.cold_since,
            call.cold_for,
            "" if call.model_wait is None else call.model_wait.what[:_TEXT_MAX],
            call.body.held_back,
            call.notes or [],
            None if call.cancelled is None else call.cancelled[:_TEXT_MAX],
            call.cancelled_by[:_NAME_MAX],
            call.cancelled_at,
            call.overdue,
            call.superseded,
            type(end) is Done,
            lost,
            retryable,
            timed_out,
            over_capacity,
            error,
            end.usage if type(end) is Done else None,
            call.body.delivered,
            call.worker_times or {},
            end.finish if type(end) is Done else "",
        )
        if end is not None and not call.released:
            call.facts = facts
        attempts.append(facts)
    size = -1
    if request is not None:
        size = len(request.body) if request.upload is None else request.upload.size
    return StoryFacts(
        context.request_id,
        "" if endpoint is None else endpoint.name[:_NAME_MAX],
        context.path[:_NAME_MAX],
        (context.missing_model if request is None else request.alias or request.model)[:_NAME_MAX],
        context.principal.name[:_NAME_MAX],
        context.client,
        size,
        0.0 if request is None else request.idle_timeout,
        0.0 if request is None else request.total_timeout,
        options.server.default_timeout,
        context.began,
        context.uploaded_at,
        context.answered_at,
        clock.NEVER,
        context.status,
        context.error,
        False,
        context.delivered,
        context.early,
        attempts,
        answering,
        context.streamed or context.early,
    )


def error_facts(error: ApiError) -> ErrorFacts:
    """Return what a story keeps of an error."""
    code, message = error.code, error.message
    return error.status, "" if code is None else str(code)[:_NAME_MAX], str(message)[:_TEXT_MAX]


def _cheapest(candidates: list[CandidateFacts], chosen: str) -> list[CandidateFacts]:
    """Return the replicas that cost least, and the one that was chosen."""
    found = nsmallest(_CANDIDATES_MAX, candidates, key=lambda each: each[1])
    if not any(name == chosen for name, _, _ in found):
        # The names of nodes that have left may be elsewhere by now, so it need not be there.
        found[-1:] = [each for each in candidates if each[0] == chosen] or found[-1:]
    return found

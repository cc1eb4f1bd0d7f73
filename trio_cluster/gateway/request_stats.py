"""Statistics of requests: how many ended how, how long they took, and their tokens; by model, key and worker.

Theory of operation
===================

Nothing is counted while a request runs. When it is over, its story (``stories.py``) has all that is needed, and waits
in :attr:`RequestStats.pending`. Stories are counted together: when there are 64 of them, and before the statistics are
read. So a request costs an entry in a list, and a token nothing. The loop that counts calls no functions in Python for
requests that ended in one of the usual ways, since it runs in the task of some request.

The work of a call may go on after its request was over, and what it has used is known when it has stopped. A story of
which that is true waits for :data:`LATE_FOR` seconds, and is then counted as it is.

*Labels are bounded.* The first :data:`LABELS_MAX` models, keys and workers have statistics of their own; all others
share those of the name :data:`OTHER`. Models count under the name that has answered, not under an alias. A name that no
model has, which a client may choose freely, counts under the empty name.

*Counters never fall*: nothing is removed when a model, a key or a worker is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Final, TypeAlias

import attrs

from ..core import clock
from ..core.story import ErrorFacts, StoryFacts
from ..core.wake_target import ASLEEP
from .stories import CLIENT_LEFT
from .story_ending import ending_of

__all__ = [
    "COLD_WAIT",
    "DURATION",
    "ERRORS_MAX",
    "FIRST_TOKEN",
    "LABELS_MAX",
    "LATE_FOR",
    "OTHER",
    "QUEUE_WAIT",
    "STATUS_CLASSES",
    "TOKEN_INTERVAL",
    "Exemplar",
    "RequestStats",
    "RequestSums",
    "SumsByName",
    "Timings",
    "TokenStats",
]

#: Seconds for which a story waits until the work of its calls has stopped, and how many may wait.
LATE_FOR: Final = 10.0
LATE_MAX: Final = 1000
#: Models, keys and workers with statistics of their own.
LABELS_MAX: Final = 200
#: The name under which all others count.
OTHER: Final = "other"
#: Errors of one name that are told apart by their code; the code of all others is :data:`OTHER`.
ERRORS_MAX: Final = 50

#: The upper bounds of the buckets, in seconds. Those of the first two begin with the ones that the conventions of
#: OpenTelemetry for generative AI advise.
FIRST_TOKEN: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
TOKEN_INTERVAL: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION: Final = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
)  # fmt: skip
QUEUE_WAIT: Final = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
COLD_WAIT: Final = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

#: By the hundreds of a status; 0: nothing was sent.
STATUS_CLASSES: Final = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")

#: A duration, the id of its request, and the time at which that was over, by ``core/clock.py``.
Exemplar: TypeAlias = tuple[float, str, float]

_MICROSECONDS: Final = 1e6
_FIRST_ERROR: Final = 400
_TIMEOUT: Final[ErrorFacts] = (504, "timeout", "")
_CANCELLED: Final = frozenset({"cancelled", "refused"})


class Timings:
    """A histogram of durations.

    Args:
        bounds: the upper bounds of the buckets. One more bucket counts durations above the last bound.

    Attributes:
        bounds: as given.
        counts: how many durations are in each bucket.
        total: the sum of all durations, in seconds.
        exemplars: the last duration that was counted in each bucket.
    """

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: list[Exemplar | None] = [None] * (len(bounds) + 1)

    def copy(self) -> Timings:
        """Return what it is now."""
        # Past `__init__`, since a scrape copies thousands of them in the event loop.
        copied = Timings.__new__(Timings)
        copied.bounds, copied.total = self.bounds, self.total
        copied.counts, copied.exemplars = self.counts[:], self.exemplars[:]
        return copied


@attrs.define(eq=False)
class RequestSums:
    """What was counted under one name: of requests, or, under the name of a worker, of calls."""

    ended: dict[tuple[str, str], int] = attrs.field(factory=dict)
    """How many ended, by outcome and the class of the status; of calls, that class is empty."""
    errors: dict[tuple[int, str], int] = attrs.field(factory=dict)
    """How many ended with an error, by its status and its code, which may be empty."""
    input_tokens: int = 0
    cached_tokens: int = 0
    """Those of the input that were read from a prompt cache."""
    output_tokens: int = 0
    streamed_bytes: int = 0
    """Bytes of the streams that were complete and have reported their tokens."""
    streamed_tokens: int = 0
    """The tokens of these."""
    timings: tuple[Timings, ...] = attrs.field(
        factory=lambda: tuple(
            Timings(bounds) for bounds in (FIRST_TOKEN, TOKEN_INTERVAL, DURATION, QUEUE_WAIT, COLD_WAIT)
        )
    )
    """To the first token of a streamed answer; between its tokens, on average; of all; in queues; for the model to
    start, if that was waited for."""

    def copy(self) -> RequestSums:
        """Return what they are now."""
        timings = tuple(each.copy() for each in self.timings)
        return attrs.evolve(self, ended=self.ended.copy(), errors=self.errors.copy(), timings=timings)


SumsByName: TypeAlias = dict[str, RequestSums]


@attrs.frozen
class TokenStats:
    """What was counted of the tokens of a model. ``None``: no stream was measured."""

    input_tokens: int = 0
    cached_tokens: int = 0
    """Those of the input that were read from a prompt cache."""
    tokens_per_second: float | None = None
    """Of a stream, on average."""
    bytes_per_token: float | None = None
    """Of a stream, on average."""


def _none_known(_: str) -> bool:
    return False


class RequestStats:
    """See the top of this module. All methods are synchronous.

    Args:
        is_model: tells whether a model of this name is served, or was a short while ago.

    Attributes:
        pending: stories of requests that are over, which were not counted yet.
    """

    def __init__(self, is_model: Callable[[str], bool] = _none_known) -> None:
        self.pending: list[StoryFacts] = []
        self._is_model = is_model
        self._late: list[StoryFacts] = []
        self._models: SumsByName = {}
        self._keys: SumsByName = {}
        self._workers: SumsByName = {}

    def read(self) -> tuple[SumsByName, SumsByName, SumsByName]:
        """Count all that is over, and return copies of the statistics, by model, by key and by worker."""
        self.catch_up()
        models, keys, workers = (
            {name: sums.copy() for name, sums in table.items()}
            for table in (self._models, self._keys, self._workers)
        )
        return models, keys, workers

    def catch_up(self) -> None:
        """Count all that is over."""
        late, self._late = self._late, []
        self.pending[:0] = late
        self.count()

    def tokens_of(self, model: str) -> TokenStats:
        """Return what was counted of the tokens of a model."""
        sums = self._models.get(model)
        if sums is None:
            return TokenStats()
        intervals = sums.timings[1]
        count = sum(intervals.counts)
        speed = count / intervals.total if count and intervals.total > 0 else None
        size = sums.streamed_bytes / sums.streamed_tokens if sums.streamed_tokens else None
        return TokenStats(sums.input_tokens, sums.cached_tokens, speed, size)

    def refused(self, key: str, error: ErrorFacts) -> None:
        """Count a request that was refused before it was known to be for a model."""
        for sums in (self._sums(self._models, ""), self._sums(self._keys, key)):
            kind = "refused", STATUS_CLASSES[min(error[0] // 100, 5)]
            sums.ended[kind] = sums.ended.get(kind, 0) + 1
            _add_error(sums, error)

    def count(self) -> None:
        """Count the stories that are pending."""
        if len(self._late) >= LATE_MAX:
            self.pending[:0] = self._late
            self._late.clear()
            too_late = clock.now()
        else:
            too_late = clock.now() - LATE_FOR
        stories = self.pending[:]
        self.pending.clear()
        for story in stories:
            began, ended_at, attempts = story.began, story.ended_at, story.attempts
            if ended_at > too_late:
                is_late = False
                for attempt in attempts:
                    if attempt.released_at < 0:
                        is_late = True
                if is_late:
                    self._late.append(story)
                    continue
            # The attempts, each under its worker.
            queued = cold = 0.0
            for attempt in attempts:
                if times := attempt.times:
                    waited = (times.get("queued", 0) + times.get("queued_model", 0)) / _MICROSECONDS
                    waited_cold = times.get("cold", 0) / _MICROSECONDS
                else:
                    waited = attempt.queued_for + attempt.queued_for_model
                    waited_cold = attempt.cold_for
                opened_at, call_ended_at = attempt.opened_at, attempt.ended_at
                if (
                    attempt.waiting
                    and attempt.queued_at >= 0.0
                    and waited < call_ended_at - attempt.queued_at
                ):
                    # It has never got a slot.
                    waited = call_ended_at - attempt.queued_at
                if not attempt.superseded:
                    queued += waited
                    cold += waited_cold
                if not attempt.forwarded and attempt.node.endswith(ASLEEP):
                    if not attempt.superseded:
                        cold += call_ended_at - opened_at
                    continue
                sums = self._workers.get(attempt.node) or self._sums(self._workers, attempt.node)
                if attempt.complete:
                    kind = "completed", ""
                elif attempt.cancelled is not None:
                    kind = "timed_out" if attempt.overdue else "cancelled", ""
                elif attempt.lost:
                    kind = "worker_lost", ""
                else:
                    kind = "timed_out" if attempt.timed_out else "failed", ""
                sums.ended[kind] = sums.ended.get(kind, 0) + 1
                if kind[0] != "cancelled" and attempt.error is not None:
                    _add_error(sums, _TIMEOUT if attempt.overdue else attempt.error)
                interval = first = -1.0
                if (usage := attempt.usage) is not None:
                    sums.input_tokens += usage.prompt_tokens
                    sums.cached_tokens += usage.cached_tokens
                    sums.output_tokens += usage.completion_tokens
                if story.streamed and attempt.begun_at >= 0.0:
                    first = attempt.begun_at - opened_at
                    if usage is not None and attempt.complete and usage.completion_tokens > 1:
                        interval = (call_ended_at - attempt.begun_at) / (usage.completion_tokens - 1)
                of_call = first, interval, call_ended_at - opened_at, waited, waited_cold or -1.0
                for timings, seconds in zip(sums.timings, of_call, strict=True):
                    if seconds >= 0.0:
                        timings.counts[bisect_left(timings.bounds, seconds)] += 1
                        timings.total += seconds
            # The request, under its model and its key.
            error = story.error
            interval = first = -1.0
            if attempts:
                attempt = attempts[story.answering]
                model, usage = attempt.model, attempt.usage
                if attempt.complete and story.delivered and error is None:
                    outcome: str = "completed"
                elif (
                    attempt.cancelled == CLIENT_LEFT and not attempt.overdue and not attempt.cancelled_by
                ) and error is None:
                    outcome = "cancelled"
                else:
                    outcome = ending_of(story).outcome
                if error is None and outcome not in _CANCELLED:
                    error = _TIMEOUT if attempt.overdue else attempt.error
                if story.streamed and attempt.begun_at >= 0.0:
                    first = attempt.begun_at - began
                    if usage is not None and attempt.complete and usage.completion_tokens > 1:
                        interval = (attempt.ended_at - attempt.begun_at) / (usage.completion_tokens - 1)
            else:
                outcome, usage = ending_of(story).outcome, None
                model = story.model
                if model and model not in self._models and not self._is_model(model):
                    model = ""
            if error is None and story.status >= _FIRST_ERROR:
                # A server behind the model has answered with it.
                error = story.status, "", ""
            kind = outcome, STATUS_CLASSES[min(story.status // 100, 5)]
            of_request = first, interval, ended_at - began, queued if attempts else -1.0, cold or -1.0
            for by_model, sums in (
                (True, self._models.get(model) or self._sums(self._models, model)),
                (False, self._keys.get(story.key) or self._sums(self._keys, story.key)),
            ):
                sums.ended[kind] = sums.ended.get(kind, 0) + 1
                if error is not None:
                    _add_error(sums, error)
                if usage is not None:
                    sums.input_tokens += usage.prompt_tokens
                    sums.cached_tokens += usage.cached_tokens
                    sums.output_tokens += usage.completion_tokens
                    if interval >= 0.0:
                        sums.streamed_bytes += attempt.delivered
                        sums.streamed_tokens += usage.completion_tokens
                for timings, seconds in zip(sums.timings, of_request, strict=True):
                    if seconds >= 0.0:
                        bucket = bisect_left(timings.bounds, seconds)
                        timings.counts[bucket] += 1
                        timings.total += seconds
                        if by_model:
                            timings.exemplars[bucket] = seconds, story.request_id, ended_at

    def _sums(self, table: SumsByName, name: str) -> RequestSums:
        """Return the statistics of a name, or those of all others if there are too many names."""
        if name not in table and len(table) >= LABELS_MAX:
            name = OTHER
        return table.setdefault(name, RequestSums())


def _add_error(sums: RequestSums, error: ErrorFacts) -> None:
    kind = error[0], error[1]
    if kind not in sums.errors and len(sums.errors) >= ERRORS_MAX:
        kind = error[0], OTHER
    sums.errors[kind] = sums.errors.get(kind, 0) + 1

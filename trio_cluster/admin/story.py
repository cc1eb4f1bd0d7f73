"""The story of a request in words: what happened when, why it ended, and what took longest.

The facts were recorded without words (``gateway/stories.py``); they are made into steps here, each time a story is
read. All times are in seconds since the request arrived.

What a worker has measured is counted by its own clock; ``core/attempt_times.py`` makes times of this node of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Final, Literal, TypeAlias

import attrs
from msgspec import UNSET, UnsetType

from ..core import clock
from ..core.attempt_times import cold_time, held_back_time, queue_times, worker_moment
from ..core.story import AttemptFacts, StoryFacts
from ..core.wake_target import ASLEEP
from ..gateway.story_ending import EndedBy, Ending, StoryOutcome, ending_of, error_text, is_asleep, place_of

__all__ = ["AttemptView", "CandidateView", "StepView", "StoryView", "story_view"]

#: Why there is an attempt: it is the first; the one before had failed; that is late; the client has asked for a list of
#: models, and this is the next.
AttemptKind: TypeAlias = Literal["first", "retry", "hedge", "next_name"]

#: Replicas that a step lists.
_SHOWN: Final = 5
#: Seconds that are worth a line of their own.
_NOTABLE: Final = 0.001
#: Seconds that a client may take for the end of an answer without being called slow.
_SLOW: Final = 0.1


@attrs.frozen
class StepView:
    """One thing that happened."""

    at: float
    """Seconds since the request arrived."""
    text: str
    node: str = ""
    """The worker by whose clock this was measured; empty for the node that tells the story."""


@attrs.frozen
class CandidateView:
    """A replica that could have been chosen."""

    node: str
    cost: float
    """Seconds until it was expected to have answered."""
    cached_bytes: int
    """Bytes of the prompt that were expected in its cache."""
    chosen: bool


@attrs.frozen(kw_only=True)
class AttemptView:
    """One attempt at the request. Times are seconds since the request arrived; ``null``: not known, or not yet."""

    kind: AttemptKind
    node: str
    """The worker that was asked, or ``local``."""
    model: str
    why: str
    """Why this node was chosen."""
    candidates: list[CandidateView]
    """The replicas among which was chosen by cost; empty if there was no choice, or another policy."""
    prompt_bytes: int
    opened: float
    started: float | None
    """The handler began."""
    first_output: float | None
    ended: float | None
    """The answer was complete, or had failed."""
    stopped: float | None
    """The work had stopped."""
    queued_for: float
    """Seconds of waiting for a slot."""
    cold_for: float
    """Seconds of waiting for the model to start, which runs on demand."""
    held_back: float
    """Seconds for which the handler was held back, since the client did not take what it had given."""
    delivered_bytes: int
    error: str | UnsetType = UNSET
    prompt_tokens: int | UnsetType = UNSET
    completion_tokens: int | UnsetType = UNSET
    cached_tokens: int | UnsetType = UNSET


@attrs.frozen(kw_only=True)
class StoryView:
    """What has become of a request."""

    request_id: str
    began: str
    """When the request arrived, in the format of ISO 8601."""
    seconds: float
    """From then until it was over; if it runs, until now."""
    outcome: StoryOutcome
    by: EndedBy
    """Who has ended it: the client, an operator, a worker, the model, or this node. For ``timed_out``: who has set the
    limit."""
    why: str
    """How it ended, in words."""
    slowest: str
    """What took longest, in words."""
    endpoint: str
    path: str
    model: str
    """The name that the client asked for."""
    key: str
    """The name of the API key; empty if none is required."""
    client: str
    status: int
    """Of the response; 0: none was sent."""
    attempts: list[AttemptView]
    steps: list[StepView]
    """All that happened, in order."""
    earlier: int
    """Earlier requests with the same id, whose stories are known, too."""


def story_view(story: StoryFacts, earlier: int = 0) -> StoryView:
    """Return a story in words.

    Args:
        story: the facts.
        earlier: how many earlier requests have the same id.
    """
    now = clock.now()
    until = now if story.ended_at < 0 else story.ended_at
    ending = ending_of(story)
    began = time.gmtime(time.time() - (now - story.began))
    return StoryView(
        request_id=story.request_id,
        began=time.strftime("%Y-%m-%dT%H:%M:%SZ", began),
        seconds=round(until - story.began, 6),
        outcome=ending.outcome,
        by=ending.by,
        why=ending.text,
        slowest=_slowest(story, until),
        endpoint=story.endpoint,
        path=story.path,
        model=story.model,
        key=story.key,
        client=story.client,
        status=story.status,
        attempts=[_attempt_view(story, index) for index in range(len(story.attempts))],
        steps=sorted(_steps(story, ending), key=lambda step: step.at),
        earlier=earlier,
    )


# The steps


def _steps(story: StoryFacts, ending: Ending) -> Iterator[StepView]:
    began = story.began
    whom = f" with key '{story.key}'" if story.key else ""
    model = f" for '{story.model}'" if story.model else ""
    yield StepView(
        0.0, f"the request arrived: {story.endpoint}{model}{whom} from {story.client or 'a client'}"
    )
    for index, attempt in enumerate(story.attempts):
        if not index:
            size = f"its body of {story.size} bytes" if story.size >= 0 else "its body"
            came = "admitted while its body arrives" if story.uploaded_at >= 0 else f"admitted with {size}"
            yield StepView(_since(attempt.opened_at, began), came)
        yield from _attempt_steps(story, index)
    if story.uploaded_at >= 0:
        yield StepView(_since(story.uploaded_at, began), "the client had sent all of its body")
    if story.answered_at >= 0:
        early = ", before there was an answer, so that the client goes on waiting" if story.early else ""
        yield StepView(
            _since(story.answered_at, began), f"the response began with status {story.status}{early}"
        )
    if story.ended_at < 0:
        yield from _running_steps(story)
        return
    last = story.attempts[story.answering].ended_at if story.attempts else -1.0
    slow = story.ended_at - max(last, story.answered_at)
    if ending.outcome == "completed" and slow >= _SLOW:
        text = f"the client took {slow:.3f} s more to read the answer"
        yield StepView(_since(story.ended_at, began), text)
    yield StepView(_since(story.ended_at, began), f"over: {ending.text}")


def _running_steps(story: StoryFacts) -> Iterator[StepView]:
    at = _since(clock.now(), story.began)
    attempt = story.attempts[story.answering] if story.attempts else None
    if attempt is None:
        text = "waiting for its body, or for its admission"
    elif attempt.complete:
        text = "waiting for the client to read the rest of the answer"
    elif attempt.begun_at >= 0:
        text = f"answering: {attempt.delivered} bytes are on their way to the client"
    elif attempt.cold:
        text = f"waiting for model '{attempt.model}' on {place_of(attempt)}: {attempt.cold}"
    elif attempt.waiting:
        text = f"waiting for a slot of {place_of(attempt)}"
    else:
        text = f"waiting for the first output of '{attempt.model}' on {place_of(attempt)}"
    yield StepView(at, f"now: {text}")


def _attempt_steps(story: StoryFacts, index: int) -> Iterator[StepView]:
    attempt, began = story.attempts[index], story.began
    place = place_of(attempt)
    yield StepView(_since(attempt.opened_at, began), _opened(story, index))
    for at, text in attempt.notes:
        yield StepView(_since(at, began), text)
    start, queued, held_back, node = _handler_times(attempt)
    waited_until, cold_for = attempt.ended_at if start is None else start, cold_time(attempt)
    if queued >= _NOTABLE and waited_until >= 0:
        queue = f"of model '{attempt.model}'" if _queued_for_model(attempt) else f"of {place}"
        yield StepView(_since(waited_until, began), f"waited {queued:.3f} s in the queue {queue}", node)
    if cold_for >= _NOTABLE and waited_until >= 0:
        text = f"waited {cold_for:.3f} s for {_what_was_cold(attempt)}"
        yield StepView(_since(waited_until, began), text, node)
    if start is not None:
        yield StepView(_since(start, began), f"the handler of '{attempt.model}' began on {place}", node)
    if attempt.begun_at >= 0:
        after = attempt.begun_at - attempt.opened_at
        yield StepView(
            _since(attempt.begun_at, began), f"first output, {after:.3f} s after it was sent to {place}"
        )
    if attempt.ended_at < 0:
        return
    if held_back >= _NOTABLE:
        text = f"the handler was held back for {held_back:.3f} s: the client was slow to read"
        yield StepView(_since(attempt.ended_at, began), text, node)
    ended = f"a worker has brought '{attempt.model}'" if _came(story, index) else _ended(attempt)
    yield StepView(_since(attempt.ended_at, began), ended)
    if attempt.released_at - attempt.ended_at >= _NOTABLE:
        after = attempt.released_at - attempt.ended_at
        text = f"the work on {place} had stopped, {after:.3f} s later, and its slot was free"
        yield StepView(_since(attempt.released_at, began), text)
    elif attempt.released_at < 0 and story.ended_at >= 0:
        yield StepView(_since(clock.now(), began), f"the work on {place} has not stopped yet")


def _opened(story: StoryFacts, index: int) -> str:
    attempt, kind = story.attempts[index], _kind(story, index)
    place = place_of(attempt)
    if kind == "first":
        text = f"sent to {place}"
        if story.model and attempt.model != story.model:
            text += f" as model '{attempt.model}', which '{story.model}' stands for"
    elif kind == "retry":
        text = f"sent to {place}" if _came(story, index - 1) else f"tried once more, on {place}"
    elif kind == "hedge":
        text = f"sent to {place} as well, since the first attempt is late"
    else:
        text = f"went on to the next name, '{attempt.model}', on {place}"
    return f"{text}: {_decision(attempt)}"


def _decision(attempt: AttemptFacts) -> str:
    if not attempt.candidates:
        return attempt.why
    ranked = sorted(attempt.candidates, key=lambda each: (each[1], each[0] != attempt.node))
    count, least = len(ranked), ranked[0][1]
    cost, cached = next((each[1:] for each in ranked if each[0] == attempt.node), (math.nan, 0))
    why = "the least cost"
    if cost > least:
        more = cached > max(each[2] for each in ranked if each[1] < cost)
        why = "about the least cost, and " + ("most in its cache" if more else "used longest ago")
    shown = "; ".join(
        f"'{name}' {cost:.3f} s, {cached} of {attempt.prompt_size} bytes cached"
        for name, cost, cached in ranked[:_SHOWN]
    )
    rest = f"; and {count - _SHOWN} more" if count > _SHOWN else ""
    return f"{why} of {count} replicas ({shown}{rest})"


def _ended(attempt: AttemptFacts) -> str:
    if attempt.superseded and attempt.cancelled is not None:
        return f"the attempt on {place_of(attempt)} was cancelled: {attempt.cancelled}"
    if attempt.cancelled is not None:
        by = f" by an operator ({attempt.cancelled_by})" if attempt.cancelled_by else ""
        return f"cancelled{by}: {attempt.cancelled}"
    if not attempt.complete:
        return f"{place_of(attempt)} failed: {error_text(attempt.error)}"
    usage = attempt.usage
    if usage is None:
        return "the answer was complete"
    cached = f" ({usage.cached_tokens} from the cache)" if usage.cached_tokens else ""
    return f"the answer was complete: {usage.prompt_tokens} tokens read{cached}, {usage.completion_tokens} written"


# What took how long


def _slowest(story: StoryFacts, until: float) -> str:
    """Return what took longest, of all that a request waits for one after the other."""
    total = until - story.began
    if not story.attempts:
        return f"{total:.3f} of {total:.3f} s for its body and its admission"
    first, last = story.attempts[0], story.attempts[story.answering]
    place = place_of(last)
    _, queued, held_back, _ = _handler_times(last)
    ended = until if last.ended_at < 0 else last.ended_at
    begun = ended if last.begun_at < 0 else last.begun_at
    if last.waiting and last.ended_at < 0:
        queued = max(queued, ended - (last.opened_at if last.queued_at < 0 else last.queued_at))
    queue = f"in the queue of model '{last.model}'" if _queued_for_model(last) else f"in the queue of {place}"
    cold = cold_time(last)
    if last.cold:
        cold += ended - last.cold_since
    before = "attempts that did not answer"
    if all(_came(story, index) for index in range(story.answering)):
        before = _what_was_cold(first)
    parts = (
        (first.opened_at - story.began, "for its body and its admission"),
        (last.opened_at - first.opened_at, f"for {before}"),
        (queued, queue),
        (cold, f"for {_what_was_cold(last)}"),
        (begun - last.opened_at - queued - cold, f"for the first output of '{last.model}' on {place}"),
        (ended - begun - held_back, f"for the rest of the output of '{last.model}' on {place}"),
        (held_back + max(0.0, until - ended), "for the client to read the answer"),
    )
    seconds, what = max(parts, key=lambda part: part[0])
    return f"{max(0.0, seconds):.3f} of {total:.3f} s {what}"


def _what_was_cold(attempt: AttemptFacts) -> str:
    if is_asleep(attempt):
        return f"the machine of worker '{attempt.node.removesuffix(ASLEEP)}' to wake"
    return f"model '{attempt.model}' to start on {place_of(attempt)}"


def _attempt_view(story: StoryFacts, index: int) -> AttemptView:
    attempt, began = story.attempts[index], story.began
    start, queued, held_back, _ = _handler_times(attempt)
    usage = attempt.usage
    return AttemptView(
        kind=_kind(story, index),
        node=attempt.node,
        model=attempt.model,
        why=attempt.why,
        candidates=[
            CandidateView(name, round(cost, 6), cached, name == attempt.node)
            for name, cost, cached in attempt.candidates
        ],
        prompt_bytes=attempt.prompt_size,
        opened=_since(attempt.opened_at, began),
        started=None if start is None else _since(start, began),
        first_output=_moment(attempt.begun_at, began),
        ended=_moment(attempt.ended_at, began),
        stopped=_moment(attempt.released_at, began),
        queued_for=round(queued, 6),
        cold_for=round(cold_time(attempt), 6),
        held_back=round(held_back, 6),
        delivered_bytes=attempt.delivered,
        error=UNSET if attempt.error is None else error_text(attempt.error),
        prompt_tokens=UNSET if usage is None else usage.prompt_tokens,
        completion_tokens=UNSET if usage is None else usage.completion_tokens,
        cached_tokens=UNSET if usage is None else usage.cached_tokens,
    )


def _handler_times(attempt: AttemptFacts) -> tuple[float | None, float, float, str]:
    """Return when the handler began, for how long the call was queued, for how long the handler was held back, and by
    whose clock that is.
    """
    if attempt.times:
        start, node = worker_moment(attempt, "started"), attempt.node
    else:
        start, node = attempt.started_at if attempt.started_at >= 0 else None, ""
    return start, sum(queue_times(attempt)), held_back_time(attempt), node


def _queued_for_model(attempt: AttemptFacts) -> bool:
    """Return whether most of the waiting was for a slot of the model, and not of the process."""
    queued, for_model = queue_times(attempt)
    return for_model > queued


def _kind(story: StoryFacts, index: int) -> AttemptKind:
    if not index:
        return "first"
    attempt, before = story.attempts[index], story.attempts[index - 1]
    if attempt.model != before.model:
        return "next_name"
    return "retry" if 0 <= before.ended_at <= attempt.opened_at else "hedge"


def _came(story: StoryFacts, index: int) -> bool:
    """Return whether an attempt was the wait for a machine, and ended since a worker has brought the model."""
    attempt = story.attempts[index]
    followed = index + 1 < len(story.attempts) and story.attempts[index + 1].model == attempt.model
    return followed and is_asleep(attempt) and attempt.retryable and attempt.cancelled is None


def _since(at: float, began: float) -> float:
    return round(max(0.0, at - began), 6)


def _moment(at: float, began: float) -> float | None:
    return None if at < 0 else _since(at, began)

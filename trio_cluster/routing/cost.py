"""The default policy: a request goes to the replica where it is expected to be answered first.

Theory of operation
===================

The cost of a replica is in seconds: the work that it has left (``speed.py``), plus what this request adds: the bytes of
its prompt that are not cached there (``prefix_cache.py``), times seconds per byte; and the tokens that such answers
usually have, times seconds per token. The least cost wins. There are no thresholds: a cache is worth exactly the time
that it saves, so a conversation stays where it was until waiting there costs more than reading it again elsewhere.

A model that runs on demand may have to be started first. The time that this is expected to take is a part of the cost,
so a replica that is ready is chosen before one that starts, and that before a cold one; and a cold one is started when
waiting for the others would take longer.

What follows from that alone: a slow machine gets less; a prompt that all clients have in common goes to one replica
until its work is as much as reading the prompt costs, and then to a second one; siblings that come in a burst go
together as long as that is worth it, since a prompt counts as cached from the moment at which it is sent.

Measured values are never equal, so replicas count as equally good within :data:`_SAME`. Of these, those that have most
of the prompt are chosen, and of these the least recently used.

Nothing of this is done for a model with one replica. Several masters do not exchange what they know. Each measures the
replicas for itself, and the reported cached tokens tell it how much of their caches the others use. A worker says how
many calls the other masters have there; each counts as half of a usual answer.

Everything is synchronous. A call that was placed here is followed by its :class:`Placement`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from weakref import WeakKeyDictionary

import attrs
import trio

from ..core.answer import Done
from ..core.call import Call
from ..core.request import Request
from .backend import Backend
from .prefix_cache import DEFAULT_CAPACITY, PrefixCache
from .prompt import Prompt, read_prompt
from .speed import Rate, Workload

__all__ = ["LeastCost", "Placement", "PromptCounts"]

#: What is believed before anything was measured: seconds per byte of a prompt (5000 tokens per second), seconds per
#: token of an answer, and tokens of an answer.
_READING: Final = 5e-5
_SAYING: Final = 0.01
_ANSWER: Final = 100.0
#: What a request costs besides the bytes of its prompt, as if it were so many more.
_OVERHEAD: Final = 256
#: Bytes of a prompt for each token that a cache is said to hold.
BYTES_PER_TOKEN: Final = 4
#: Costs that differ by less count as equal: by this share, and by so many seconds.
_SAME: Final = 0.1
_SAME_SECONDS: Final = 0.001
#: What is believed to be left of a call of another master, of which only the number is known: this share of an answer.
_OTHERS_LEFT: Final = 0.5
#: What counts of the answers before the last one for the usual length of an answer.
_KEEP: Final = 0.95
#: Models of which something is remembered.
_MODELS: Final = 4096


@attrs.define
class PromptCounts:
    """Tokens of the prompts of a model's complete answers.

    Attributes:
        total: all of them; only those of answers that report their usage.
        predicted: those that were expected to be cached.
        reported: those that were cached, by the answers.
    """

    total: int = 0
    predicted: float = 0.0
    reported: float = 0.0

    def add(self, tokens: int, predicted: float, reported: float) -> None:
        """Count a prompt of so many tokens, and the shares of it that were expected to be cached, and were."""
        self.total += tokens
        self.predicted += tokens * predicted
        self.reported += tokens * reported


class _Replica:
    """What is known of one replica of one model."""

    __slots__ = (
        "_busy",
        "_counted_until",
        "_saying_now",
        "cache",
        "last_read",
        "reading",
        "reports",
        "saying",
        "workload",
    )

    def __init__(self, workload: Workload, cache_size: int) -> None:
        self.workload = workload
        self.cache = PrefixCache(cache_size)
        self.reading = Rate()
        self.saying = Rate()
        # Whether its answers report cached tokens. Otherwise zero of them means nothing.
        self.reports = False
        # When it had read a prompt last.
        self.last_read = -1.0
        # How many calls are being answered, for how long there were any since the last sample, counted until when.
        self._saying_now = 0
        self._busy = 0.0
        self._counted_until = 0.0

    def begin_answer(self, now: float) -> None:
        """Record that an answer begins."""
        self._count(now)
        self._saying_now += 1

    def end_answer(self, now: float) -> float:
        """Record that an answer ends, and return the seconds that were spent on answers since the last sample."""
        self._count(now)
        self._saying_now -= 1
        busy, self._busy = self._busy, 0.0
        return busy

    def break_answer(self, now: float) -> None:
        """Record that an answer ends of which nobody knows how long it was: its share of the time is left out."""
        self._count(now)
        self._saying_now -= 1
        self._busy *= self._saying_now / (self._saying_now + 1)

    def _count(self, now: float) -> None:
        if self._saying_now:
            self._busy += now - self._counted_until
        self._counted_until = now


class _Model:
    """What is known of a model: what is usual, and its replicas."""

    __slots__ = ("answer", "counts", "reading", "replicas", "reports", "saying")

    def __init__(self) -> None:
        self.replicas: WeakKeyDictionary[Backend, _Replica] = WeakKeyDictionary()
        self.reading = Rate()
        self.saying = Rate()
        # Tokens of an answer; of models that report none, every answer counts as one.
        self.answer = -1.0
        # Whether its answers report how many tokens they have.
        self.reports = False
        self.counts = PromptCounts()

    def learn_answer(self, tokens: float) -> None:
        """Learn from an answer of so many tokens."""
        self.answer = tokens if self.answer < 0 else self.answer * _KEEP + tokens * (1 - _KEEP)


class Placement:
    """A request that was given to a replica: why, and what is learned from it.

    Attributes:
        prompt: what is known of its prompt.
        cached: the bytes of it that were expected in the cache of the replica.
        candidates: for each replica that could have been chosen: its name, its cost in seconds, and the bytes that were
            expected in its cache.
    """

    __slots__ = (
        "_clock",
        "_full",
        "_model",
        "_opened",
        "_reading",
        "_reading_took",
        "_replica",
        "_saying",
        "_since",
        "cached",
        "candidates",
        "prompt",
    )

    def __init__(
        self,
        clock: Callable[[], float],
        model: _Model,
        replica: _Replica,
        prompt: Prompt,
        candidates: list[tuple[str, float, int]],
        *,
        cached: int,
        reading: float,
        saying: float,
        full: bool,
    ) -> None:
        self._clock, self._model, self._replica = clock, model, replica
        self.prompt, self.cached, self.candidates = prompt, cached, candidates
        # The seconds of work that are expected of it, and that have not been taken back.
        self._reading, self._saying = reading, saying
        # Its replica had no free slot.
        self._full = full
        self._opened = 0.0
        self._reading_took = 0.0
        # When the answer began.
        self._since = -1.0

    def follow(self, call: Call) -> None:
        """Follow the call that was opened for the request. Synchronous."""
        now, replica = self._clock(), self._replica
        self._opened = now
        replica.workload.begin(self._reading + self._saying, now)
        replica.cache.add(self.prompt)
        call.tracker = self
        call.on_release(lambda: self._released(call))
        if call.begun:
            self.first_byte()

    def first_byte(self) -> None:
        """Record that the answer has begun, so the prompt has been read. Synchronous."""
        if self._since >= 0:
            return
        now, replica = self._clock(), self._replica
        # Prompts are read in turn, and behind a full replica's answers: only the time of this one counts.
        begun = max(self._opened, replica.last_read, replica.workload.last_end if self._full else -1.0)
        self._reading_took = now - begun
        replica.last_read = self._since = now
        replica.workload.finish(self._reading, now)
        self._reading = 0.0
        replica.begin_answer(now)

    def _released(self, call: Call) -> None:
        now, replica, model = self._clock(), self._replica, self._model
        replica.workload.finish(self._reading + self._saying, now, ended=True)
        if self._since < 0:
            return
        if not isinstance(call.end, Done):
            replica.break_answer(now)
            return
        usage = call.end.usage
        tokens = 1.0
        if usage is not None and usage.completion_tokens:
            tokens, model.reports = float(usage.completion_tokens), True
        busy = replica.end_answer(now)
        replica.saying.add(busy, tokens, now)
        model.saying.add(busy, tokens, now)
        model.learn_answer(tokens)
        new = self.prompt.size - self.cached
        if usage is not None and usage.prompt_tokens > 0:
            replica.reports = replica.reports or usage.cached_tokens > 0
            share = min(1.0, usage.cached_tokens / usage.prompt_tokens)
            if replica.reports:
                model.counts.add(usage.prompt_tokens, self.cached / max(1, self.prompt.size), share)
                reported = int(share * self.prompt.size)
                replica.cache.correct(self.cached, reported)
                new = self.prompt.size - reported
        if call.ready_since:
            # The model was started for the call: how long that took says nothing of its speed.
            return
        replica.reading.add(self._reading_took, new + _OVERHEAD, self._since)
        model.reading.add(self._reading_took, new + _OVERHEAD, self._since)


class LeastCost:
    """Chooses the replica where the request is expected to be answered first. See the top of this module.

    Args:
        cache_tokens: returns how many tokens the prompt cache of a backend holds for a model; ``None``: unknown.
        clock: the time, in seconds.
    """

    def __init__(
        self,
        cache_tokens: Callable[[str, Backend], int | None] = lambda model, backend: None,
        *,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._cache_tokens = cache_tokens
        self._clock = clock
        self._models: dict[str, _Model] = {}
        self._workloads: WeakKeyDictionary[Backend, Workload] = WeakKeyDictionary()
        #: See ``LearningPolicy``; ``None`` if there was nothing to choose from.
        self.placement: Placement | None = None
        self.why = ""

    @property
    def counts(self) -> Mapping[str, PromptCounts]:
        """How much of their prompts was expected in a cache and was there, for each model that has had a choice."""
        return {name: model.counts for name, model in self._models.items()}

    def speeds(self, model: str) -> tuple[float | None, Mapping[str, float]]:
        """Return the tokens per second that a model's replicas have answered with lately, for display. Synchronous.

        Returns:
            The speed of the usual replica, and those by the names of nodes. What is not known is left out: nothing is
            measured of a model with one replica, or of answers that do not report their tokens.
        """
        known = self._models.get(model)
        if known is None or not known.reports:
            return None, {}
        speeds = {backend.name: replica.saying.per_second for backend, replica in known.replicas.items()}
        return known.saying.per_second, {name: speed for name, speed in speeds.items() if speed is not None}

    def pick(self, replicas: Sequence[Backend], request: Request) -> Backend | None:
        """See ``RoutingPolicy``."""
        if len(replicas) < 2:
            self.placement, self.why = None, "the only one"
            return replicas[0] if replicas else None
        now, prompt, model = self._clock(), read_prompt(request), self._model(request.model)
        reading, saying = model.reading.value(now, _READING), model.saying.value(now, _SAYING)
        answer = _ANSWER if model.answer < 0 else model.answer
        if 0 < request.max_tokens < answer:
            answer = float(request.max_tokens)
        known = model.replicas
        searched = bool(prompt.blocks or prompt.conversation)
        candidates: list[tuple[str, float, int]] = []
        states = []
        least = math.inf
        for backend in replicas:
            replica = known.get(backend)
            if replica is None:
                replica = known[backend] = self._new_replica(request.model, backend)
            cached = replica.cache.hit(prompt) if searched else 0
            seconds_to_read = (prompt.size - cached + _OVERHEAD) * replica.reading.value(now, reading)
            seconds_to_say = answer * replica.saying.value(now, saying)
            cost = replica.workload.left(now) + seconds_to_read + seconds_to_say
            if (starts := backend.health.model_states) and (state := starts.get(request.model)) is not None:
                cost += state.ready_in(now)
            if backend.elsewhere:
                cost += backend.elsewhere * _OTHERS_LEFT * seconds_to_say
            candidates.append((backend.name, cost, cached))
            states.append((backend, replica, seconds_to_read, seconds_to_say))
            if cost < least:
                least = cost
        # The first one of equals was used longest ago.
        limit, best, most = least * (1 + _SAME) + _SAME_SECONDS, 0, -1
        for index, (_, cost, cached) in enumerate(candidates):
            if cost <= limit and cached > most:
                best, most = index, cached
        backend, replica, seconds_to_read, seconds_to_say = states[best]
        _, cost, cached = candidates[best]
        self.why = (
            f"{cost:.2f} s expected, {cached} of {prompt.size} bytes cached; {len(candidates)} replicas"
        )
        self.placement = Placement(
            self._clock,
            model,
            replica,
            prompt,
            candidates,
            cached=cached,
            reading=seconds_to_read,
            saying=seconds_to_say,
            full=backend.load >= 1,
        )
        return backend

    def _model(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            if len(self._models) >= _MODELS:
                # Names come from workers. The one that was new longest ago makes room.
                del self._models[next(iter(self._models))]
            model = self._models[name] = _Model()
        return model

    def _new_replica(self, model: str, backend: Backend) -> _Replica:
        # The models of a backend share what it can do.
        workload = self._workloads.get(backend)
        if workload is None:
            workload = self._workloads[backend] = Workload()
        tokens = self._cache_tokens(model, backend)
        return _Replica(workload, DEFAULT_CAPACITY if tokens is None else tokens * BYTES_PER_TOKEN)

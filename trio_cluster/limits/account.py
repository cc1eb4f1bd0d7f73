"""The account of one key: what it has used of its limits, and whether one more request is within them. Without IO.

A request *reserves*: one of the requests of a minute, a slot, and as many tokens as it may use. When it has really
ended, its reservation is *settled*: the slot is free, and the tokens are what was used.

- Tokens count in the minute, and in the calendar period, in which their request was admitted.
- What a request has used beyond its reservation counts in full, from the moment of settling on: later requests wait for
  it. That is the only way in which more tokens than the limit can count within a minute.
- A request that may use more than is ever allowed at once is refused for good. If that is only a guess, because its
  prompt may have fewer tokens than its size suggests or because it does not say how long its answer may be, it
  reserves all that there is instead.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import attrs

from ..core.principal import Limits
from .calendar import period_of
from .window import Entry, SlidingLog

__all__ = ["MOST_TOKENS", "Account", "Demand", "Grant", "LimitState", "Refusal", "RefusalKind", "Standing"]

#: Tokens that are counted of one request, at most. Clients may name any number, and so may models; the sums of what
#: they name must be numbers that a Redis server can count, since another one stops the counting for all keys.
MOST_TOKENS: Final = 1 << 40

#: Why a request is refused. ``size``: it can never be admitted; ``budget``: the period's tokens are used up.
RefusalKind: TypeAlias = Literal["requests", "tokens", "concurrency", "size", "budget"]

#: Microseconds after which a client is told to try again if all slots are taken: nobody knows when one will be free.
_SLOT_WAIT = 1_000_000


@attrs.frozen
class Demand:
    """The tokens that a request may use."""

    tokens: int = 0
    """Estimated with a margin: of the prompt and of the answer together."""
    least: int = 0
    """What it has to reserve at least: with a prompt that is estimated without a margin, and the length of the answer
    only if the request names it."""
    prompt: int = 0
    """Those of ``tokens`` that are estimated for the prompt."""


@attrs.frozen
class Standing:
    """How much of one limit is left."""

    limit: int
    remaining: int
    reset: int
    """Microseconds after which nothing counts any more, if nothing is added."""


@attrs.frozen
class LimitState:
    """What the headers of an answer say. ``None``: there is no such limit."""

    requests: Standing | None = None
    tokens: Standing | None = None


@attrs.frozen
class Refusal:
    """A request is over a limit."""

    kind: RefusalKind
    wait: int
    """Microseconds after which it would be admitted, if nothing else happens; 0 for ``size`` and ``budget``."""
    limit: int
    """The limit that is in the way."""
    needed: int
    """How much of it the request needs."""
    state: LimitState


@attrs.define(eq=False)
class Grant:
    """A request was admitted, and has reserved what it needs."""

    tokens: int
    """Reserved."""
    time: int
    """When it was admitted, in microseconds."""
    entry: Entry
    period: str
    """The calendar period whose budget it counts for; empty: there is no budget."""
    state: LimitState


class Account:
    """See the top of this module. All methods are synchronous; times are whole microseconds of a steady clock.

    Args:
        window: the length of the sliding window, in microseconds.

    Attributes:
        log: what was admitted in the last window.
        slots: reservations that are not settled.
        reserved: their tokens.
        period: the calendar period that ``period_tokens`` are of.
        period_tokens: used or reserved in that period.
    """

    __slots__ = ("log", "period", "period_tokens", "reserved", "slots")

    def __init__(self, window: int) -> None:
        self.log = SlidingLog(window)
        self.slots = 0
        self.reserved = 0
        self.period = ""
        self.period_tokens = 0

    def reserve(self, limits: Limits, demand: Demand, now: int, wall: float) -> Grant | Refusal:
        """Reserve what a request may use, or say why not. A refusal changes nothing.

        Args:
            limits: of the key; they may be others than the last time.
            demand: of the request.
            now: the time.
            wall: the time in seconds since the epoch, for the calendar.
        """
        log = self.log
        now = log.advance(now)
        most = demand.tokens
        if limits.budget_tokens is not None:
            self._turn_period(limits, wall)
            left = limits.budget_tokens - self.period_tokens
            if demand.least > left or left <= 0:
                return Refusal("budget", 0, limits.budget_tokens, demand.least, self.state(limits, now))
            most = min(most, left)
        per_minute = limits.tokens_per_minute
        if per_minute is not None:
            if demand.least > per_minute:
                return Refusal("size", 0, per_minute, demand.least, self.state(limits, now))
            most = min(most, per_minute)
        if (refusal := self._refusal(limits, most, now)) is not None:
            return refusal
        entry = log.add(now, 1, most)
        self.slots += 1
        self.reserved += most
        period = ""
        if limits.budget_tokens is not None:
            period = self.period
            self.period_tokens += most
        # What was just added is what counts longest.
        rpm, window = limits.requests_per_minute, log.window
        requests = None if rpm is None else Standing(rpm, rpm - log.requests, window)
        tokens = None
        if per_minute is not None:
            reset = window if most else log.reset_of_tokens(now)
            tokens = Standing(per_minute, per_minute - log.tokens, reset)
        return Grant(most, now, entry, period, LimitState(requests, tokens))

    def _refusal(self, limits: Limits, tokens: int, now: int) -> Refusal | None:
        """Return the refusal that lasts longest, if there is one."""
        wait: int | None = 0
        kind: RefusalKind = "requests"
        limit = needed = 0
        if limits.requests_per_minute is not None:
            wait = self.log.wait_for_requests(limits.requests_per_minute, 1, now)
            limit, needed = limits.requests_per_minute, 1
        if limits.tokens_per_minute is not None and wait is not None:
            tokens_wait = self.log.wait_for_tokens(limits.tokens_per_minute, tokens, now)
            assert tokens_wait is not None  # it was checked before
            if tokens_wait > wait:
                kind, wait, limit, needed = "tokens", tokens_wait, limits.tokens_per_minute, tokens
        if limits.max_concurrency is not None and self.slots >= limits.max_concurrency and wait is not None:
            kind, wait, limit, needed = "concurrency", max(wait, _SLOT_WAIT), limits.max_concurrency, 1
        if wait == 0:
            return None
        # A limit of 0 requests: there is no time to wait for, and a window is as good as any.
        return Refusal(
            kind, self.log.window if wait is None else wait, limit, needed, self.state(limits, now)
        )

    def settle(self, grant: Grant, tokens: int, now: int, *, counts: bool = True) -> int:
        """End a reservation; the caller does so exactly once.

        Args:
            grant: as :meth:`reserve` returned it.
            tokens: that were really used.
            now: the time.
            counts: it was a request; otherwise it does not count as one either, since nothing was begun for it.

        Returns:
            The tokens that were used beyond the reservation.
        """
        self.slots -= 1
        self.reserved -= grant.tokens
        more = tokens - grant.tokens
        self.log.advance(now)
        self.log.change(grant.entry, 0 if counts else -1, min(more, 0))
        if more > 0:
            self.log.add(now, 0, more)
        if grant.period and grant.period == self.period:
            self.period_tokens += more
        return max(more, 0)

    def state(self, limits: Limits, now: int) -> LimitState:
        """Return how much is left."""
        log = self.log
        now = log.advance(now)
        requests = tokens = None
        if (limit := limits.requests_per_minute) is not None:
            requests = Standing(limit, max(0, limit - log.requests), log.reset_of_requests(now))
        if (limit := limits.tokens_per_minute) is not None:
            tokens = Standing(limit, max(0, limit - log.tokens), log.reset_of_tokens(now))
        return LimitState(requests, tokens)

    def is_empty(self, now: int, wall: float) -> bool:
        """Tell whether the account is as a new one would be, so that it need not be kept."""
        self.log.advance(now)
        return not (self.slots or len(self.log) or (self.period_tokens and self.period in _current(wall)))

    def _turn_period(self, limits: Limits, wall: float) -> None:
        period = period_of(limits.budget_per, wall)
        if period != self.period:
            self.period, self.period_tokens = period, 0


def _current(wall: float) -> set[str]:
    return {period_of("day", wall), period_of("week", wall), period_of("month", wall)}

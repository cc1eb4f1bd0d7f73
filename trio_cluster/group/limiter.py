"""The limits of keys, counted by the supervisor for all processes of a master.

So a key has its limits once, whichever processes answer it, and they are kept in the state directory as those of a
master that is one process. A reservation costs a message to the supervisor and one back, for keys with limits only.
What a process has reserved that ends is settled as if all of it had been used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, Protocol

import trio

from ..core.answer import Usage
from ..core.call import Call
from ..core.principal import Limits, Principal
from ..core.request import Request
from ..errors import ApiError
from ..limits.account import LimitState, Refusal
from ..limits.estimate import Estimator
from ..limits.limiter import CountedElsewhere, refused
from ..limits.memory import MemoryLimiter
from ..limits.reservation import Reservation, Settle as SettleFunction
from .messages import AskState, Reserve, Reserved, Settle

__all__ = ["GroupLimiter", "LimitCounter"]

#: Seconds that the supervisor may take.
_PATIENCE: Final = 1.0


class Counter(Protocol):
    """The way to the supervisor; see :class:`~trio_cluster.group.member.Member`."""

    async def reserve(self, message: Reserve | AskState) -> Reserved | None:
        """See ``Member``."""
        ...

    def settle(self, message: Settle) -> None:
        """See ``Member``."""
        ...


class LimitCounter:
    """The side of the supervisor. All methods are synchronous.

    Args:
        limiter: counts.
    """

    def __init__(self, limiter: MemoryLimiter) -> None:
        self._limiter = limiter
        # Of the reservations that are not settled, by the process and the id that it has given them.
        self._open: dict[tuple[int, int], SettleFunction] = {}

    def receive(self, process: int, message: Reserve | AskState | Settle) -> Reserved | None:
        """Do what a process asks for, and return the answer, if there is one."""
        if isinstance(message, Settle):
            settle = self._open.pop((process, message.id), None)
            if settle is not None:
                settle(message.tokens, message.counts)
            return None
        if isinstance(message, AskState):
            return Reserved(message.id, state=self._limiter.state_nowait(message.key, message.limits))
        found = self._limiter.book(message.key, message.limits, message.demand)
        if isinstance(found, Refusal):
            return Reserved(message.id, refusal=found)
        granted, self._open[process, message.id] = found
        return Reserved(message.id, granted.tokens, granted.state)

    def lost(self, process: int) -> None:
        """A process has ended: what it has reserved counts as used."""
        for key in [key for key in self._open if key[0] == process]:
            self._open.pop(key)(None, True)


class GroupLimiter(CountedElsewhere):
    """The side of a member. See ``Limiter``; nothing is kept here, so what concerns the state directory has no effect.

    Args:
        counter: the way to the supervisor.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._estimator = Estimator()
        self._ids = 0
        self._open: dict[int, int] = {}

    async def reserve(self, principal: Principal, limits: Limits, request: Request) -> Reservation:
        """See ``Limiter``. A checkpoint."""
        demand = await self._estimator.estimate_request(request)
        self._ids += 1
        number, answer = self._ids, None
        try:
            with trio.move_on_after(_PATIENCE):
                answer = await self._counter.reserve(Reserve(number, principal.name, limits, demand))
        finally:
            if answer is None:
                # It may be reserved nevertheless.
                self._counter.settle(Settle(number, 0, False))
        if answer is None:
            raise ApiError(
                503,
                "The limits of this key cannot be checked at the moment; try again shortly",
                code="limits_unavailable",
                retry_after=1.0,
            )
        if answer.refusal is not None:
            raise refused(answer.refusal, limits)
        self._open[number] = answer.tokens
        state = LimitState() if answer.state is None else answer.state
        return Reservation(demand, answer.tokens, state, partial(self._settle, number), self._learn)

    def _settle(self, number: int, tokens: int | None, counts: bool) -> None:
        del self._open[number]
        self._counter.settle(Settle(number, tokens, counts))

    def _learn(self, call: Call, usage: Usage) -> None:
        self._estimator.learn(call.request, usage)

    async def state(self, principal: Principal, limits: Limits) -> LimitState:
        """See ``Limiter``. A checkpoint."""
        self._ids += 1
        answer = None
        with trio.move_on_after(_PATIENCE):
            answer = await self._counter.reserve(AskState(self._ids, principal.name, limits))
        return LimitState() if answer is None or answer.state is None else answer.state

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """See ``Limiter``. No checkpoint."""
        yield

    @property
    def open_reservations(self) -> int:
        """See ``Limiter``."""
        return len(self._open)

    @property
    def open_tokens(self) -> int:
        """See ``Limiter``."""
        return sum(self._open.values())

"""Counting in the memory of this process; with a state directory, over restarts of it, too (``ledger.py``)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from ..core.answer import Usage
from ..core.call import Call
from ..core.principal import Limits, Principal
from ..core.request import Request
from ..core.state_dir import StateDir
from .account import Account, Demand, Grant, LimitState, Refusal
from .estimate import Estimator
from .ledger import Ledger
from .limiter import refused
from .reservation import Reservation, Settle

__all__ = ["MINUTE", "MemoryLimiter"]

#: The length of the sliding window, in seconds.
MINUTE: Final = 60.0

#: Seconds between two times at which accounts are saved or forgotten.
_PAUSE: Final = 1.0
#: Accounts that are kept without looking whether they are empty.
_MANY: Final = 1000


def _seconds_now() -> float:
    return trio.current_time()


class MemoryLimiter:
    """See ``Limiter``. :meth:`state` is no checkpoint, and :meth:`reserve` is none unless the body is large.

    Args:
        window: the length of the sliding window, in seconds.
        state_dir: where what was used is kept; ``None``: nowhere.
        estimator: of the tokens of requests; ``None``: a new one.
        clock: the steady clock of the windows, in seconds; ``None``: that of trio.
        wall_clock: the time of the calendar, in seconds since the epoch.

    Raises:
        StateDirError: the state directory cannot be read or written.
    """

    def __init__(
        self,
        window: float = MINUTE,
        state_dir: StateDir | None = None,
        *,
        estimator: Estimator | None = None,
        clock: Callable[[], float] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._window = round(window * 1_000_000)
        self._clock = _seconds_now if clock is None else clock
        self._wall_clock = wall_clock
        self._estimator = Estimator() if estimator is None else estimator
        self._accounts: dict[str, Account] = {}
        self._many = _MANY
        self._work = trio.Event()
        self._ledger: Ledger | None = None
        if state_dir is not None:
            self.load(state_dir)

    async def reserve(self, principal: Principal, limits: Limits, request: Request) -> Reservation:
        """See ``Limiter``."""
        demand = await self._estimator.estimate_request(request)
        return self.reserve_nowait(principal.name, limits, demand)

    def reserve_nowait(self, key: str, limits: Limits, demand: Demand) -> Reservation:
        """Reserve what a request may use. Synchronous.

        Raises:
            Refused: the request is over a limit.
        """
        found = self.book(key, limits, demand)
        if isinstance(found, Refusal):
            raise refused(found, limits)
        granted, settle = found
        return Reservation(demand, granted.tokens, granted.state, settle, self._learn)

    def book(self, key: str, limits: Limits, demand: Demand) -> tuple[Grant, Settle] | Refusal:
        """Reserve what a request may use, and return what was granted and how it is settled. Synchronous."""
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = Account(self._window)
            if len(self._accounts) > self._many:
                self._work.set()
        granted = account.reserve(limits, demand, self._now(), self._wall_clock())
        if isinstance(granted, Refusal):
            return granted
        if self._ledger is not None:
            self._ledger.note(key, granted.time, 1, granted.tokens, granted.period)
            if self._ledger.wants_snapshot:
                self._work.set()
        return granted, partial(self._settle, key, account, granted)

    def _settle(self, key: str, account: Account, grant: Grant, tokens: int | None, counts: bool) -> None:
        used = grant.tokens if tokens is None else tokens
        now = self._now()
        more = account.settle(grant, used, now, counts=counts)
        if self._ledger is not None and (used != grant.tokens or not counts):
            requests, less = 0 if counts else -1, min(0, used - grant.tokens)
            if less or requests:
                self._ledger.note(key, grant.time, requests, less, grant.period)
            if more:
                self._ledger.note(key, now, 0, more, grant.period)

    def _learn(self, call: Call, usage: Usage) -> None:
        self._estimator.learn(call.request, usage)

    async def state(self, principal: Principal, limits: Limits) -> LimitState:
        """See ``Limiter``."""
        return self.state_nowait(principal.name, limits)

    def state_nowait(self, key: str, limits: Limits) -> LimitState:
        """Return how much is left. Synchronous."""
        account = self._accounts.get(key)
        if account is None:
            account = Account(self._window)
        return account.state(limits, self._now())

    def load(self, state_dir: StateDir) -> None:
        """See ``Limiter``. What was used since this object was made is not kept, and counts no more."""
        now = self._now()
        ledger = Ledger(state_dir, round(self._wall_clock() * 1_000_000) - now)
        self._accounts = ledger.restore(self._window, now)
        self._ledger = ledger

    async def release(self, forward: Callable[[bytes], None]) -> None:
        """See ``Limiter``."""
        if self._ledger is not None:
            await self._ledger.release(self._accounts, forward)

    def retake(self) -> None:
        """See ``Limiter``."""
        if self._ledger is not None:
            self._ledger.retake(self._accounts)

    def unload(self) -> None:
        """See ``Limiter``."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def apply(self, line: bytes) -> None:
        """See ``Limiter``."""
        if self._ledger is not None:
            self._ledger.apply(self._accounts, line, self._window, self._now())

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """See ``Limiter``. Entering and leaving it are no checkpoints."""
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._maintain)
                try:
                    yield
                except Exception as error:
                    # Nothing else in this nursery raises, so the error of the block needs no group around it.
                    failure = error
                nursery.cancel_scope.cancel(reason="the node has ended")
        finally:
            if self._ledger is not None:
                self._ledger.save(self._accounts)
                self._ledger.close()
        if failure is not None:
            raise failure

    async def _maintain(self) -> None:
        """Forget accounts that are empty, and save them when the log has grown.

        A node without keys that have limits has no timer for that.
        """
        while True:
            await self._work.wait()
            self._work = trio.Event()
            self._forget_empty()
            self._many = max(_MANY, 2 * len(self._accounts))
            if self._ledger is not None and self._ledger.wants_snapshot:
                await self._ledger.save_in_thread(self._accounts)
            await trio.sleep(_PAUSE)

    def _forget_empty(self) -> None:
        now, wall = self._now(), self._wall_clock()
        for key in [key for key, account in self._accounts.items() if account.is_empty(now, wall)]:
            del self._accounts[key]

    @property
    def open_reservations(self) -> int:
        """See ``Limiter``."""
        return sum(account.slots for account in self._accounts.values())

    @property
    def open_tokens(self) -> int:
        """See ``Limiter``."""
        return sum(account.reserved for account in self._accounts.values())

    def _now(self) -> int:
        return round(self._clock() * 1_000_000)
